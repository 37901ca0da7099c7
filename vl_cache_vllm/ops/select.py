# SPDX-License-Identifier: Apache-2.0
"""Select the tokens with the highest scores, for every layer and KV head."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.rank import torch_rank


@operation
def select(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select ``kept_tokens[l]`` of the first ``num_tokens[l]`` tokens for each KV head of layer l.

    Of these, the last ``ceil(recent_ratio * kept_tokens[l])`` tokens are always selected and count
    towards the budget. The other tokens are ordered by precedence, then by score; of equal ones the
    lower position comes first.

    Args:
        scores: float32 ``[num_layers, num_kv_heads, tokens]``.
        num_tokens: tokens of each layer that can be selected, int64 ``[num_layers]`` on the device,
            at most ``tokens`` each; what stands behind them is ignored.
        kept_tokens: budget of each layer in tokens, int64 ``[num_layers]`` on the device, at most
            ``max_kept`` and ``num_tokens[l]``.
        recent_ratio: fraction of the budget for the most recent tokens, 0 to 1.
        max_kept: upper bound of ``kept_tokens`` that the host knows, at most ``tokens``.
        precedence: group of each token, int64 ``[tokens]``; tokens of a higher group come first.
            None: all tokens are in one group.

    Returns:
        Positions in increasing order, int32 ``[num_layers, num_kv_heads, max_kept]``. Only the
        first ``kept_tokens[l]`` entries of layer l have a meaning; the others may be any numbers.

    Source: docs/method.md, Token scores.
    """
    tokens = scores.shape[-1]
    position = torch.arange(tokens, dtype=torch.int32, device=scores.device)
    # Rounded in float64, so that 0.14 * 50 is 7 and not a little more, of which ceil makes 8.
    recent = torch.ceil((kept_tokens.double() * recent_ratio).round(decimals=9)).long()
    is_recent = position >= (num_tokens - recent)[:, None, None]  # [L, 1, tokens]
    exists = position < num_tokens[:, None, None]
    if precedence is not None:
        # Adding an offset to a score would round it, so add the offset to the score's rank.
        scores = (precedence * tokens - torch_rank(scores)).double()
    ranked = torch.where(is_recent, torch.inf, scores).where(exists, -torch.inf)
    kept = torch_rank(ranked) < kept_tokens[:, None, None]
    # One sort puts the kept positions first and keeps each side in increasing order.
    key = torch.where(kept, position, position + tokens)
    return key.sort(dim=-1).values[..., :max_kept] % tokens


@dataclass(frozen=True)
class Candidates:
    """Layers of a request whose tokens are to be selected; fields as the arguments of `select`."""

    scores: torch.Tensor
    num_tokens: torch.Tensor
    kept_tokens: torch.Tensor
    recent_ratio: float
    max_kept: int
    precedence: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.scores.device


@operation
def select_all(candidates: Sequence[Candidates]) -> list[torch.Tensor]:
    """`select` for each of the candidates, which may be layers of several requests."""
    return [
        select(
            one.scores,
            one.num_tokens,
            one.kept_tokens,
            one.recent_ratio,
            one.max_kept,
            one.precedence,
        )
        for one in candidates
    ]
