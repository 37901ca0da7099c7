# SPDX-License-Identifier: Apache-2.0
"""SnapKV against a naive loop: the window is kept, the others rank by smoothed attention."""

import pytest
import torch

from vl_cache_vllm.ops.select import select
from vl_cache_vllm.policy import POLICIES, Attention, Prompt
from vl_cache_vllm.policy.snapkv import SnapKVPolicy


def naive_kept(row: list[float], window: int, width: int, kept: int) -> list[int]:
    """Positions that one KV head keeps."""
    before = max(0, len(row) - window)
    ends = list(range(len(row) - 1, before - 1, -1))[:kept]
    smooth = []
    for i in range(before):
        near = [row[j] for j in range(i - width // 2, i + width // 2 + 1) if 0 <= j < before]
        smooth.append(sum(near) / width)
    ranked = sorted(range(before), key=lambda i: (-smooth[i], i))
    return sorted(ends + ranked[: kept - len(ends)])


def test_defaults_are_the_paper() -> None:
    policy = SnapKVPolicy()
    assert POLICIES["snapkv"] is SnapKVPolicy
    assert (policy.max_observation_tokens, policy.pooling) == (32, 5)
    assert not policy.post_vision_only
    assert policy.observation_start(70, 100) == 68
    assert policy.observation_start(20, 30) == 0


@pytest.mark.parametrize("tokens", [40, 63, 7, 1])
@pytest.mark.parametrize("window", [1, 7, 32])
@pytest.mark.parametrize("pooling", [1, 5])
@pytest.mark.parametrize("kept", [1, 6, 35])
def test_kept_tokens(tokens: int, window: int, pooling: int, kept: int) -> None:
    kept = min(kept, tokens)
    torch.manual_seed(tokens)
    attention = torch.rand(2, 3, tokens, dtype=torch.float64).float()
    policy = SnapKVPolicy(max_observation_tokens=window, pooling=pooling)
    prompt = Prompt(tokens)
    scores = policy.token_scores(Attention(attention), prompt)
    assert scores.shape == attention.shape and scores.dtype == torch.float32
    precedence = policy.precedence(prompt, scores.device)
    found = select(
        scores,
        torch.full((2,), scores.shape[2]),
        torch.tensor([kept, kept]),
        policy.recent_ratio,
        kept,
        precedence,
    )
    for layer in range(2):
        for head in range(3):
            row = attention[layer, head].tolist()
            assert found[layer, head].tolist() == naive_kept(row, window, pooling, kept)


def test_the_attention_of_a_huge_prompt_does_not_beat_the_window() -> None:
    policy, prompt = SnapKVPolicy(max_observation_tokens=2, sink_tokens=1), Prompt(8)
    scores = policy.token_scores(Attention(torch.full((1, 1, 8), 1e9)), prompt)
    precedence = policy.precedence(prompt, scores.device)
    for kept, expected in ((1, [7]), (2, [6, 7]), (3, [0, 6, 7])):
        found = select(
            scores, torch.tensor([scores.shape[2]]), torch.tensor([kept]), 0.0, kept, precedence
        )
        assert found[0, 0].tolist() == expected


def test_uniform_budgets() -> None:
    weights = SnapKVPolicy().layer_weights(torch.tensor([0.1, 0.9]).double(), 0.1, Prompt(1000))
    assert weights.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": 4}, "pooling must be an odd number of tokens, got 4"),
        ({"max_observation_tokens": None}, "snapkv needs max_observation_tokens"),
        ({"max_observation_tokens": 0}, "at least 1 or null, got 0"),
    ],
)
def test_bad_parameters(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SnapKVPolicy(**changes)
