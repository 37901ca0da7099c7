# SPDX-License-Identifier: Apache-2.0
"""Key diversity: scores that prefer tokens whose keys differ from the other keys (MixKV)."""

import torch
import torch.nn.functional as F


def key_similarity(key: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each key with all keys of its head, itself included.

    Args:
        key: ``[num_kv_heads, tokens, head_size]``.

    Returns:
        float32 ``[num_kv_heads, tokens]``.
    """
    unit = F.normalize(key.float(), dim=-1)
    return (unit @ unit.mean(1, keepdim=True).transpose(1, 2))[..., 0]


def mix_diversity(scores: torch.Tensor, similarity: torch.Tensor, strength: float) -> torch.Tensor:
    """Mix a token's score with its diversity; heads with redundant keys weigh diversity more.

    Args:
        scores: not negative, ``[num_layers, num_kv_heads, tokens]``.
        similarity: result of `key_similarity` for each layer, same shape.
        strength: 0 (the scores alone) to 1 (MixKV).

    Returns:
        ``(1 - w) * score + w * diversity``. The weight w is ``strength`` times the mean similarity
        of two different keys of the head. Diversity is the negative similarity, mapped to 0..1 and
        then scaled to the mean of the head's scores.

    Source: MixKV (arXiv 2510.20707), whose importance also includes the norms of the values.
    """
    tokens = scores.shape[-1]
    diversity = similarity.amax(-1, keepdim=True) - similarity
    diversity = diversity / diversity.amax(-1, keepdim=True).clamp(min=1e-8)
    diversity *= scores.mean(-1, keepdim=True) / diversity.mean(-1, keepdim=True).clamp(min=1e-8)
    redundancy = (tokens * similarity.mean(-1, keepdim=True) - 1) / max(1, tokens - 1)
    return torch.lerp(scores, diversity, strength * redundancy.clamp(0, 1))
