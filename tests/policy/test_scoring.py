# SPDX-License-Identifier: Apache-2.0
"""Pooling against naive loops, and rankings that are interleaved."""

import pytest
import torch

from vl_cache_vllm.policy import Attention
from vl_cache_vllm.policy.prompt import PatchGrid, Prompt
from vl_cache_vllm.policy.scoring import average, interleave, smooth
from vl_cache_vllm.policy.snapkv import SnapKVPolicy
from vl_cache_vllm.policy.vlcache import VLCachePolicy

TOKENS = pytest.mark.parametrize("tokens", [1, 2, 63, 64, 200])


@TOKENS
def test_no_smoothing_changes_nothing(tokens: int) -> None:
    scores = torch.rand(2, 3, tokens)
    assert average(scores, 1) is scores


def naive_on_grid(row: list[float], grid: PatchGrid, width: int) -> dict[int, float]:
    """The smoothed score of each position of a grid."""
    result, near = {}, range(-(width // 2), width // 2 + 1)
    for r in range(grid.rows):
        for c in range(grid.columns):
            inside = []
            for y in (r + d for d in near):
                for x in (c + d for d in near):
                    if 0 <= y < grid.rows and 0 <= x < grid.columns:
                        inside.append(row[grid.first + y * grid.row_stride + x])
            result[grid.first + r * grid.row_stride + c] = sum(inside) / len(inside)
    return result


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize(
    "grids",
    [
        (PatchGrid(3, 4, 7, 7),),
        (PatchGrid(3, 4, 7, 8), PatchGrid(50, 3, 3, 3)),
        (PatchGrid(0, 1, 1, 1), PatchGrid(1, 2, 30, 30)),
    ],
    ids=["one", "rows-with-ends-and-a-second", "tiny-and-flat"],
)
def test_neighbours_on_the_patch_grid(width: int, grids: tuple[PatchGrid, ...]) -> None:
    scores = torch.rand(2, 3, 80)
    along = average(scores, width)
    found = smooth(scores, width, grids)
    for layer in range(2):
        for head in range(3):
            expected = dict(enumerate(along[layer, head].tolist()))
            for grid in grids:
                expected |= naive_on_grid(scores[layer, head].tolist(), grid, width)
            torch.testing.assert_close(found[layer, head], torch.tensor([*expected.values()]))


def test_an_image_has_no_weaker_edges() -> None:
    found = smooth(torch.ones(1, 1, 60), 3, (PatchGrid(20, 4, 5, 5),))
    torch.testing.assert_close(found[0, 0, 20:40], torch.ones(20))


def test_policies_that_average_can_do_so_on_the_grid() -> None:
    prompt = Prompt(70, ((5, 30),), (PatchGrid(5, 5, 5, 5),))
    attention = torch.rand(2, 3, 70)
    expected = smooth(attention, 3, prompt.grids)
    policy = VLCachePolicy(pooling=3, pooling_2d=True)
    assert torch.equal(policy.token_scores(Attention(attention), prompt), expected)
    attention[..., -9:] = 0  # SnapKV's window does not count
    expected = smooth(attention, 3, prompt.grids)
    snapkv = SnapKVPolicy(pooling=3, pooling_2d=True, max_observation_tokens=9)
    assert torch.equal(snapkv.token_scores(Attention(attention), prompt), expected)
    flat = SnapKVPolicy(pooling=3, max_observation_tokens=9)
    assert not torch.equal(flat.token_scores(Attention(attention), prompt), expected)


@pytest.mark.parametrize("policy", [VLCachePolicy, SnapKVPolicy])
def test_a_grid_without_neighbours_is_refused(policy: type) -> None:
    with pytest.raises(ValueError, match="pooling_2d has no effect with pooling 1"):
        policy(pooling=1, pooling_2d=True)


def best(scores: torch.Tensor, k: int) -> set[int]:
    return set(torch.argsort(scores, descending=True, stable=True)[:k].tolist())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [1, 2, 7, 200])
def test_any_cut_is_the_best_of_both(share: float, tokens: int) -> None:
    torch.manual_seed(tokens)
    one, other = torch.rand(2, 1, 1, tokens)
    merged = interleave([(one, 1 - share), (other, share)])[0, 0]
    for cut in torch.linspace(0.123, 1.5 * tokens, 100).tolist():
        kept = set((merged >= 1 / cut).nonzero().flatten().tolist())
        first = best(one[0, 0], int(cut * (1 - share)))
        assert kept == first | best(other[0, 0], int(cut * share))


def test_shares() -> None:
    one, other = torch.zeros(2, 1, 1, 1000)
    one[..., :500] = torch.arange(500, 0, -1)
    other[..., 500:] = torch.arange(500, 0, -1)
    kept = best(interleave([(one, 0.75), (other, 0.25)])[0, 0], 100)
    assert kept == {*range(75), *range(500, 525)}


@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_a_share_of_zero_or_one_is_one_ranking(tokens: int) -> None:
    one, other = torch.rand(2, 2, 3, tokens)
    for share, alone in ((0.0, one), (1.0, other)):
        merged = interleave([(one, 1 - share), (other, share)])
        order = torch.argsort(merged, descending=True, stable=True)
        assert torch.equal(order, torch.argsort(alone, descending=True, stable=True))


def test_layers_and_heads_rank_by_themselves() -> None:
    one, other = torch.rand(2, 2, 3, 50)
    merged = interleave([(one, 0.6), (other, 0.4)])
    for layer in range(2):
        for head in range(3):
            here = slice(layer, layer + 1), slice(head, head + 1)
            row = interleave([(one[here], 0.6), (other[here], 0.4)])
            assert torch.equal(merged[layer, head], row[0, 0])


def test_any_cut_is_the_best_of_four() -> None:
    torch.manual_seed(0)
    shares = (0.1, 0.2, 0.3, 0.4)
    rankings = [(torch.rand(1, 1, 90), torch.tensor(share).double()) for share in shares]
    merged = interleave(rankings)[0, 0]
    for cut in torch.linspace(0.123, 100, 50).tolist():
        kept = set((merged >= 1 / cut).nonzero().flatten().tolist())
        tops = (best(rankings[i][0][0, 0], int(cut * shares[i])) for i in range(4))
        assert kept == set().union(*tops)
