# SPDX-License-Identifier: Apache-2.0
"""`rank` and `merge_ranking` against sorting in Python."""

import math

import pytest
import torch

from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.ops.rank import merge_ranking, rank, torch_rank

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.mark.parametrize("tokens", [1, 2, 63, 1100])
def test_rank(tokens: int) -> None:
    scores = torch.rand(2, 3, tokens, generator=torch.Generator().manual_seed(tokens))
    scores[0] *= 1e-30
    scores[1, 0] = (4 * scores[1, 0]).floor()  # many ties
    scores[1, 1] -= 0.5
    ranks = rank(scores)
    assert ranks.dtype == torch.int64
    assert torch.equal(ranks, torch_rank(scores))
    for layer in range(2):
        for head in range(3):
            row = scores[layer, head].tolist()
            order = sorted(range(tokens), key=lambda position: (-row[position], position))
            assert [ranks[layer, head, position].item() for position in order] == [*range(tokens)]


def test_rank_of_special_values() -> None:
    scores = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, 0.0])
    assert rank(scores).tolist() == [2, 3, 0, 5, 1, 4]


def test_rank_of_rows_that_are_not_contiguous() -> None:
    scores = torch.rand(3, 70, 2, generator=torch.Generator().manual_seed(6)).transpose(1, 2)
    assert torch.equal(rank(scores), torch_rank(scores.contiguous()))


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_merged_rankings(tokens: int) -> None:
    """Bits, not only order: equal entries must be equal in all implementations."""
    generator = torch.Generator().manual_seed(tokens)
    shares = torch.tensor([0.1375, 0.4125, 0.45, 0.0])
    rankings = torch.rand(4, 2, 1, tokens, generator=generator)
    rankings[1] = (4 * rankings[1]).floor()  # many ties
    merged, expected = torch.zeros(2, 2, 1, tokens)
    for scores, share in zip(rankings, shares, strict=True):
        merge_ranking(merged, scores, share)
        with dispatch.use("torch"):
            merge_ranking(expected, scores, share)
    assert torch.equal(merged, expected)
    ranks = torch_rank(rankings) + 1
    for position in range(tokens):
        best = max(float(shares[i]) / int(ranks[i, 1, 0, position]) for i in range(4))
        assert float(merged[1, 0, position]) == pytest.approx(best, rel=1e-6)
