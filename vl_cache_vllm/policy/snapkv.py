# SPDX-License-Identifier: Apache-2.0
"""SnapKV: Li et al., arXiv 2404.14469 (NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.base import EvictionPolicy, parameter, with_default
from vl_cache_vllm.policy.pooling import average, check_width


@dataclass(frozen=True)
class SnapKVPolicy(EvictionPolicy):
    """Attention of the prompt's last tokens, smoothed; these tokens are kept; uniform budgets."""

    name: ClassVar[str] = "snapkv"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.0)
    max_observation_tokens: int | None = parameter(
        32, "the window: so many last tokens of the prompt observe, and are kept"
    )
    post_vision_only: bool = with_default(EvictionPolicy, "post_vision_only", False)
    pooling: int = parameter(
        5, "odd width of an average over neighbouring positions, applied to the scores"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_observation_tokens is None:
            raise ValueError(f"{self.name} needs max_observation_tokens, its window, not null")
        check_width(self.pooling)

    def token_scores(self, attention: torch.Tensor) -> torch.Tensor:
        """Smoothed attention of the tokens before the window; the window above them, last first."""
        assert self.max_observation_tokens is not None
        tokens = attention.shape[-1]
        before = max(0, tokens - self.max_observation_tokens)
        # An empty part needs no smoothing, and pooling does not accept one.
        scores = average(attention[..., :before], self.pooling) if before else attention[..., :0]
        # Above any sum of attention: at most one for each query and head.
        window = 1e30 * torch.arange(1, tokens - before + 1, device=attention.device)
        return torch.cat((scores, window.to(scores.dtype).expand(*scores.shape[:2], -1)), dim=-1)
