# SPDX-License-Identifier: Apache-2.0
"""Two rankings in one."""

import torch


def interleave(scores: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Scores whose best k tokens are, for every k, the best of two rankings.

    Of the places, ``share`` goes down ``other``'s ranking and the rest down that of ``scores``; a
    token that both rank high takes one place.

    Args:
        scores, other: ``[layers, kv_heads, tokens]``; ties go to the lower position.
        share: 0 (``scores`` alone) to 1 (``other`` alone).
    """
    return -torch.minimum(_rank(scores) / (1.0 - share), _rank(other) / share)


def _rank(scores: torch.Tensor) -> torch.Tensor:
    """1 for the highest score, float32."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    place = torch.arange(1, scores.shape[-1] + 1, dtype=torch.float32, device=scores.device)
    return torch.empty_like(scores).scatter_(-1, order, place.expand_as(scores))
