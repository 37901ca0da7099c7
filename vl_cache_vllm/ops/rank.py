# SPDX-License-Identifier: Apache-2.0
"""Rank the tokens of every KV head by score, and merge several rankings."""

import torch

from vl_cache_vllm.ops.dispatch import operation


@operation
def rank(scores: torch.Tensor) -> torch.Tensor:
    """Index of each entry in the descending order of the last dimension, int64.

    The highest entry has rank 0; of equal entries the lower position comes first. This order
    defines `select`.

    Args:
        scores: float32 ``[..., tokens]``.
    """
    return torch_rank(scores)


@operation
def merge_ranking(merged: torch.Tensor, scores: torch.Tensor, share: torch.Tensor) -> None:
    """Raise each entry of ``merged`` to ``1 / ((rank + 1) / share)``, with its `rank` by score.

    Args:
        merged: float32, of the shape of ``scores``, contiguous; 0 before the first ranking.
        scores: float32 ``[..., tokens]``.
        share: fraction of the tokens that this ranking chooses, 0 to 1, float32 ``[]`` on the
            device.
    """
    torch.maximum(merged, ((rank(scores) + 1).float() / share).reciprocal_(), out=merged)


def torch_rank(scores: torch.Tensor) -> torch.Tensor:
    """`rank` by sorting, for scores of any type."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter_(-1, order, ranks.expand_as(order))
