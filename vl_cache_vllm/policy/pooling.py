# SPDX-License-Identifier: Apache-2.0
"""Scores smoothed over neighbouring positions."""

import torch
import torch.nn.functional as F


def check_width(pooling: int) -> None:
    """Raises ValueError unless the width is odd and positive."""
    if pooling < 1 or pooling % 2 == 0:
        raise ValueError(f"pooling must be an odd number of tokens, got {pooling}")


def average(scores: torch.Tensor, pooling: int) -> torch.Tensor:
    """Mean of ``pooling`` neighbours along the last dimension of ``[layers, kv_heads, tokens]``.

    Positions beyond the ends count as zero, as in SnapKV.
    """
    if pooling == 1:
        return scores
    return F.avg_pool1d(scores, pooling, stride=1, padding=pooling // 2)
