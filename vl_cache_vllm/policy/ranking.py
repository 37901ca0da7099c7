# SPDX-License-Identifier: Apache-2.0
"""Two rankings in one."""

import torch

from vl_cache_vllm.ops.rank import rank


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
