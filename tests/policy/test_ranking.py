# SPDX-License-Identifier: Apache-2.0
"""Two rankings in one, against taking from both by hand."""

import pytest
import torch

from vl_cache_vllm.policy.ranking import interleave


def best(scores: torch.Tensor, k: int) -> set[int]:
    return set(torch.argsort(scores, descending=True, stable=True)[:k].tolist())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [1, 2, 7, 200])
def test_any_cut_is_the_best_of_both(share: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    one, other = torch.rand(2, 1, 1, tokens)
    merged = interleave(one, other, share)[0, 0]
    for cut in torch.linspace(0.123, 1.5 * tokens, 100).tolist():
        kept = set((merged >= 1 / cut).nonzero().flatten().tolist())
        first = best(one[0, 0], int(cut * (1 - share)))
        assert kept == first | best(other[0, 0], int(cut * share))


def test_shares() -> None:
    one, other = torch.zeros(2, 1, 1, 1000)
    one[..., :500] = torch.arange(500, 0, -1)
    other[..., 500:] = torch.arange(500, 0, -1)
    kept = best(interleave(one, other, 0.25)[0, 0], 100)
    assert kept == {*range(75), *range(500, 525)}


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_a_share_of_zero_or_one_is_one_ranking(tokens: int) -> None:
    one, other = torch.rand(2, 2, 3, tokens)
    for share, alone in ((0.0, one), (1.0, other)):
        order = torch.argsort(interleave(one, other, share), descending=True, stable=True)
        assert torch.equal(order, torch.argsort(alone, descending=True, stable=True))


def test_layers_and_heads_rank_by_themselves() -> None:
    one, other = torch.rand(2, 2, 3, 50)
    merged = interleave(one, other, 0.4)
    for layer in range(2):
        for head in range(3):
            row = interleave(
                one[layer : layer + 1, head : head + 1],
                other[layer : layer + 1, head : head + 1],
                0.4,
            )
            assert torch.equal(merged[layer, head], row[0, 0])
