# SPDX-License-Identifier: Apache-2.0
"""Scores that spread to neighbouring positions."""

import math

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


def look_ahead(scores: torch.Tensor, length: float, weight: float) -> torch.Tensor:
    """``max(s[j], weight * max over d >= 1 of s[j - d] * exp(-d / length))``.

    An answer is read on from where the prompt's attention finds its beginning: what follows an
    attended token inherits its score, fading by e every ``length`` tokens.

    Args:
        scores: not negative, ``[layers, kv_heads, tokens]``.
        length: tokens; 0 returns the scores as they are.
        weight: of what is inherited, 0 to 1.
    """
    if length == 0:
        return scores
    tokens = scores.shape[-1]
    inherited = torch.zeros_like(scores)
    inherited[..., 1:] = scores[..., :-1] * math.exp(-1 / length)
    shift = 1  # `inherited` covers the last `shift` tokens
    while shift < tokens:
        fade = math.exp(-shift / length)
        if fade == 0.0:
            break
        earlier = inherited[..., :-shift] * fade
        inherited[..., shift:] = torch.maximum(inherited[..., shift:], earlier)
        shift *= 2
    return torch.maximum(scores, weight * inherited)
