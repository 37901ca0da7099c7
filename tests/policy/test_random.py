# SPDX-License-Identifier: Apache-2.0
"""The floor: scores that know nothing of the attention."""

import pytest
import torch

from vl_cache_vllm.policy import POLICIES, Attention, Prompt, Shard
from vl_cache_vllm.policy.random import RandomPolicy


def scores(seed: int = 0, layers: int = 4, heads: int = 3, tokens: int = 5000) -> torch.Tensor:
    attention = torch.rand(layers, heads, tokens)
    return RandomPolicy(seed=seed).token_scores(Attention(attention), Prompt(attention.shape[-1]))


def test_registered() -> None:
    assert POLICIES["random"] is RandomPolicy


def test_scores_are_uniform() -> None:
    found = scores()
    assert found.shape == (4, 3, 5000) and found.dtype == torch.float32
    assert found.min() >= 0 and found.max() <= 1
    histogram = torch.histc(found.flatten(), bins=10, min=0, max=1) / found.numel()
    assert (histogram - 0.1).abs().max() < 0.01


def test_scores_ignore_attention_and_length() -> None:
    torch.testing.assert_close(scores(tokens=5000)[..., :700], scores(tokens=700), atol=0, rtol=0)


def test_heads_layers_seeds_and_neighbours_are_independent() -> None:
    found, other = scores(), scores(seed=1)
    rows = torch.cat([found.flatten(0, 1), other.flatten(0, 1), found[0, 0].roll(1)[None]])
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 0.06


def test_uniform_budgets() -> None:
    weights = RandomPolicy().layer_weights(torch.tensor([0.1, 0.9, 0.5]).double(), 0.1, Prompt(100))
    assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_bad_seed(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be from 0 to"):
        RandomPolicy(seed=seed)


def test_largest_seed() -> None:
    assert scores(seed=2**31 - 1).std() > 0.25


def test_workers_that_share_a_model_draw_what_one_draws() -> None:
    whole = RandomPolicy().token_scores(Attention(torch.zeros(4, 4, 30)), Prompt(30))
    for layer, head in ((0, 2), (2, 0), (2, 2)):
        prompt = Prompt(30, shard=Shard((layer, layer + 1), head, 4))
        part = RandomPolicy().token_scores(Attention(torch.zeros(2, 2, 30)), prompt)
        assert torch.equal(part, whole[layer : layer + 2, head : head + 2])
