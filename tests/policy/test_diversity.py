# SPDX-License-Identifier: Apache-2.0
"""MixKV's diversity against cosine similarities pair by pair."""

import pytest
import torch

from vl_cache_vllm.policy.diversity import key_similarity, mix_diversity


def naive_mix(scores: list[float], keys: torch.Tensor, strength: float) -> list[float]:
    """One KV head."""
    count = len(scores)
    cosine = [
        [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for b in keys] for a in keys
    ]
    others = [cosine[i][j] for i in range(count) for j in range(count) if i != j]
    weight = strength * min(max(sum(others) / len(others), 0.0), 1.0)
    unlike = [-sum(row) / count for row in cosine]
    low, high = min(unlike), max(unlike)
    unlike = [(u - low) / (high - low) for u in unlike]
    scale = sum(scores) / sum(unlike)
    return [(1 - weight) * s + weight * scale * u for s, u in zip(scores, unlike, strict=True)]


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("alike", [0.0, 1.0, 4.0])
def test_equals_pair_by_pair(strength: float, alike: float) -> None:
    torch.manual_seed(3)
    keys = torch.randn(2, 3, 20, 8, dtype=torch.float64) + alike * torch.randn(2, 3, 1, 8)
    scores = torch.rand(2, 3, 20)
    similarity = torch.stack([key_similarity(layer) for layer in keys])
    assert similarity.dtype == torch.float32
    found = mix_diversity(scores, similarity, strength)
    for layer in range(2):
        for head in range(3):
            expected = naive_mix(scores[layer, head].tolist(), keys[layer, head], strength)
            torch.testing.assert_close(
                found[layer, head], torch.tensor(expected), rtol=2e-4, atol=2e-4
            )


def test_the_one_that_differs_is_kept() -> None:
    keys = torch.ones(1, 6, 4)
    keys[0, 4] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = torch.tensor([[[0.3, 0.2, 0.2, 0.2, 0.1, 0.2]]])
    similarity = key_similarity(keys)[None]
    assert int(mix_diversity(scores, similarity, 1.0).argmax()) == 4
    assert int(mix_diversity(scores, similarity, 0.0).argmax()) == 0


def test_heads_whose_keys_differ_keep_their_scores() -> None:
    similarity = key_similarity(torch.eye(5)[None])[None]
    scores = torch.rand(1, 1, 5)
    torch.testing.assert_close(mix_diversity(scores, similarity, 1.0), scores)


@pytest.mark.parametrize("tokens", [1, 4])
def test_keys_all_alike_leave_the_order(tokens: int) -> None:
    scores = torch.arange(1.0, tokens + 1)[None, None]
    mixed = mix_diversity(scores, key_similarity(torch.ones(1, tokens, 2))[None], 0.5)
    assert mixed.isfinite().all()
    assert torch.equal(mixed.argsort(), scores.argsort())
