# SPDX-License-Identifier: Apache-2.0
"""The decayed running maximum of the scores along the tokens."""

import torch
import torch.nn.functional as F

from vl_cache_vllm.ops.decay import decay_frame, inherits_nothing
from vl_cache_vllm.ops.dispatch import operation


@operation
def look_ahead(scores: torch.Tensor, length: float) -> torch.Tensor:
    """``max over d >= 0 of s[j - d] * exp(-d / length)``, where s is the score.

    The tokens are divided into frames. In a frame, score i is multiplied by ``exp(i / length)``,
    so that the decayed maximum becomes a plain running maximum, and the result is multiplied by
    ``exp(-i / length)``. The maximum of a frame, decayed by ``exp(-frame / length)``, enters the
    next frame. Every product is one float64 multiplication by a factor of `decay_frame`, and a
    maximum does not depend on the order in which it is taken. So all implementations give the same
    bits, and equal scores stay equal.

    Args:
        scores: not negative, float32 ``[..., tokens]``.
        length: decay length in tokens, more than 0. Below 1 / 104 nothing is inherited.

    Returns:
        float32, of the shape of ``scores``.
    """
    if inherits_nothing(length):
        return scores.clone()
    decay = decay_frame(length, scores.device)
    tokens = scores.shape[-1]
    padded = F.pad(scores, (0, -tokens % decay.size))
    frames = padded.double().unflatten(-1, (-1, decay.size))  # [..., num_frames, frame]
    grown = (frames * decay.growth).cummax(-1).values
    best = torch.zeros_like(grown[..., 0, 0])
    for frame in range(1, grown.shape[-2]):
        best = torch.maximum(best, grown[..., frame - 1, -1]) * decay.of_frame
        grown[..., frame, :].clamp_(min=best[..., None])
    return (grown * decay.shrinkage).float().flatten(-2)[..., :tokens].contiguous()
