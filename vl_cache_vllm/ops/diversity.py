# SPDX-License-Identifier: Apache-2.0
"""Scores that also favour tokens whose keys are unlike the others'."""

import torch
import torch.nn.functional as F


def key_similarity(key: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each key with all keys of its head, itself included.

    ``[num_kv_heads, tokens, head_size]`` to float32 ``[num_kv_heads, tokens]``.
    """
    unit = F.normalize(key.float(), dim=-1)
    return (unit @ unit.mean(1, keepdim=True).transpose(1, 2))[..., 0]


def mix_diversity(scores: torch.Tensor, similarity: torch.Tensor, strength: float) -> torch.Tensor:
    """A token's score and how unlike the others it is, weighted by how alike a head's keys are.

    Args:
        scores: not negative, ``[num_layers, num_kv_heads, tokens]``.
        similarity: of `key_similarity`, same shape.
        strength: 0 (the scores alone) to 1 (MixKV).

    Returns:
        ``(1 - w) * score + w * unlikeness``, where w is the strength times the mean similarity of
        two different keys of the head, and unlikeness is the negative similarity brought to 0..1
        and then to the scores' mean.

    Source: MixKV (arXiv 2510.20707); its importance also adds the values' norms, ours does not.
    """
    tokens = scores.shape[-1]
    unlike = similarity.amax(-1, keepdim=True) - similarity
    unlike = unlike / unlike.amax(-1, keepdim=True).clamp(min=1e-8)
    unlike *= scores.mean(-1, keepdim=True) / unlike.mean(-1, keepdim=True).clamp(min=1e-8)
    redundancy = (tokens * similarity.mean(-1, keepdim=True) - 1) / max(1, tokens - 1)
    return torch.lerp(scores, unlike, strength * redundancy.clamp(0, 1))
