# SPDX-License-Identifier: Apache-2.0
"""Scores that spread to neighbouring positions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vl_cache_vllm.ops.select import rank
from vl_cache_vllm.policy.prompt import PatchGrid

POOLING_2D = "average visual tokens over pooling x pooling neighbours on their patch grid"


def check_pooling(pooling: int, on_grid: bool) -> None:
    """Raises ValueError unless the width is odd, positive and sane, and more than 1 on a grid."""
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(f"pooling must be an odd number of tokens, got {pooling}")
    if pooling > 1e6:
        raise ValueError(f"pooling must be at most 1e6 tokens, got {pooling}")
    if on_grid and pooling == 1:
        raise ValueError("pooling_2d has no effect with pooling 1; choose 3 or more")


def smooth(scores: torch.Tensor, pooling: int, grids: Sequence[PatchGrid]) -> torch.Tensor:
    """`average` along the positions, but on their patch grid for the tokens of ``grids``.

    There it is the mean of the neighbours that exist: images have many edges, prompts two ends.
    """
    result = average(scores, pooling)
    for grid in grids:
        positions = grid.positions(scores.device)
        patches = scores[..., positions]  # [layers, kv_heads, rows, columns]
        result[..., positions] = F.avg_pool2d(
            patches, pooling, stride=1, padding=pooling // 2, count_include_pad=False
        )
    return result


def average(scores: torch.Tensor, pooling: int) -> torch.Tensor:
    """Mean of ``pooling`` neighbours along the last dimension of ``[layers, kv_heads, tokens]``.

    Positions beyond the ends count as zero, as in SnapKV.
    """
    if pooling == 1:
        return scores
    return F.avg_pool1d(scores, pooling, stride=1, padding=pooling // 2)


def look_ahead(scores: torch.Tensor, length: float) -> torch.Tensor:
    """``max over d >= 0 of s[j - d] * exp(-d / length)``.

    An answer is read on from where the prompt's attention finds its beginning: what follows an
    attended token inherits its score, fading by e every ``length`` tokens.

    Args:
        scores: not negative, ``[layers, kv_heads, tokens]``.
        length: tokens, more than 0.
    """
    scores = scores.clone()
    shift = 1  # every token has looked back at `shift - 1` others
    while shift < scores.shape[-1]:
        fade = math.exp(-shift / length)
        if fade == 0.0:
            break
        inherited = scores[..., :-shift] * fade
        scores[..., shift:] = torch.maximum(scores[..., shift:], inherited)
        shift *= 2
    return scores


def interleave(scores: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Scores whose best k tokens are, for every k, the best of two rankings.

    Of the places, ``share`` goes down ``other``'s ranking and the rest down that of ``scores``; a
    token that both rank high takes one place.

    The result is positive and falls like 1 / place.

    Args:
        scores, other: ``[layers, kv_heads, tokens]``; ties go to the lower position.
        share: 0 (``scores`` alone) to 1 (``other`` alone).
    """
    return 1.0 / torch.minimum((rank(scores) + 1) / (1.0 - share), (rank(other) + 1) / share)
