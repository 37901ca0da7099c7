# SPDX-License-Identifier: Apache-2.0
"""The best tokens of every layer and KV head."""

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.rank import rank


@operation
def select(
    scores: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keep the ``kept_tokens[l]`` best tokens of each KV head of layer l.

    The last ``ceil(recent_ratio * kept_tokens[l])`` tokens are always among them; the others
    rank by precedence, then by score, ties to the lower position.

    Args:
        scores: float32 ``[num_layers, num_kv_heads, tokens]``.
        kept_tokens: int64 ``[num_layers]``, on the device, each at most ``max_kept``.
        recent_ratio: 0 to 1.
        max_kept: a bound of ``kept_tokens`` known to the host, at most ``tokens``.
        precedence: int64 ``[tokens]``, higher is kept first; None: all alike.

    Returns:
        Positions in increasing order, int64 ``[num_layers, num_kv_heads, max_kept]``; only the
        first ``kept_tokens[l]`` entries of layer l are meaningful.

    Source: paper section 3.
    """
    num_tokens = scores.shape[-1]
    position = torch.arange(num_tokens, device=scores.device)
    # float64: 0.1 * k must not round up past a whole number of tokens.
    recent = torch.ceil((kept_tokens.double() * recent_ratio).round(decimals=9)).long()
    is_recent = position >= (num_tokens - recent)[:, None, None]  # [L, 1, E]
    if precedence is not None:
        # Places, not scores, can be moved past others without loss.
        scores = (precedence * num_tokens - rank(scores)).double()
    ranked = torch.where(is_recent, torch.inf, scores)
    kept = rank(ranked) < kept_tokens[:, None, None]
    # Kept positions first, each side in increasing order.
    key = torch.where(kept, position, position + num_tokens)
    return key.sort(dim=-1).values[..., :max_kept] % num_tokens
