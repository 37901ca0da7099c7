# SPDX-License-Identifier: Apache-2.0
"""Operations on token scores: pooling over neighbours and mixing several rankings.

Scores are ``[num_layers, num_kv_heads, tokens]`` throughout.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from vl_cache_vllm.ops.rank import merge_ranking
from vl_cache_vllm.policy.prompt import PatchGrid

POOLING = (
    "Width in tokens, an odd number, of an average over neighbouring positions that is applied to "
    "the scores. 1: no pooling."
)
POOLING_2D = (
    "Pool visual tokens over pooling x pooling neighbours on the patch grid of their image, if the "
    "model's grid is known. Other tokens are pooled along the sequence."
)


def check_pooling(pooling: int, on_grid: bool) -> None:
    """Raise ValueError unless the width is odd and from 1 to 1e6, and not 1 on a grid."""
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(f"pooling must be an odd number of tokens, got {pooling}")
    if pooling > 1e6:
        raise ValueError(f"pooling must be at most 1e6 tokens, got {pooling}")
    if on_grid and pooling == 1:
        raise ValueError("pooling_2d has no effect with pooling 1; choose 3 or more")


def average(scores: torch.Tensor, pooling: int) -> torch.Tensor:
    """Mean of ``pooling`` neighbours along the sequence.

    Positions beyond the ends count as zero, as in SnapKV.
    """
    if pooling == 1:
        return scores
    return F.avg_pool1d(scores, pooling, stride=1, padding=pooling // 2)


def smooth(scores: torch.Tensor, pooling: int, grids: Sequence[PatchGrid]) -> torch.Tensor:
    """`average`, but over the two-dimensional neighbours for tokens of ``grids``.

    On a grid only the existing neighbours count: an image has many edges, a prompt two ends.
    """
    result = average(scores, pooling)
    for grid in grids:
        positions = grid.positions(scores.device)
        patches = scores[..., positions]  # [num_layers, num_kv_heads, rows, columns]
        result[..., positions] = F.avg_pool2d(
            patches, pooling, stride=1, padding=pooling // 2, count_include_pad=False
        )
    return result


def interleave(rankings: Iterable[tuple[torch.Tensor, float | torch.Tensor]]) -> torch.Tensor:
    """Scores whose best k tokens are, for every k, the best of several rankings.

    Each ranking contributes its share of the k tokens from its top. A token at the top of several
    counts once, and the next ones follow. For example, with two rankings of equal shares and the
    ranks

        one       0 1 2 3
        other     3 2 0 1

    the best two tokens are the first and the third.

    Args:
        rankings: scores and share of each. Of equal scores the lower position is better. The shares
            are not negative and add up to 1.

    Returns:
        Positive scores that fall like 1 / rank.
    """
    merged: torch.Tensor | None = None
    for scores, share in rankings:
        if merged is None:
            merged = torch.zeros_like(scores, memory_format=torch.contiguous_format)
        if not isinstance(share, torch.Tensor):
            share = torch.full((), share, device=scores.device)
        merge_ranking(merged, scores, share.float())
    assert merged is not None
    return merged
