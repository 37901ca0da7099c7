# SPDX-License-Identifier: Apache-2.0
"""SnapKV: Li et al., arXiv 2404.14469 (NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.base import EvictionPolicy, setting, with_default
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.scoring import POOLING_2D, check_pooling, smooth


@dataclass(frozen=True)
class SnapKVPolicy(EvictionPolicy):
    """Attention of the prompt's last tokens, smoothed; these tokens are kept; uniform budgets."""

    name: ClassVar[str] = "snapkv"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.0)
    max_observation_tokens: int | None = setting(
        32, "the window: so many last tokens of the prompt observe, and are kept"
    )
    post_vision_only: bool = with_default(EvictionPolicy, "post_vision_only", False)
    pooling: int = setting(
        5, "odd width of an average over neighbouring positions, applied to the scores"
    )
    pooling_2d: bool = setting(False, POOLING_2D)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_observation_tokens is None:
            raise ValueError(f"{self.name} needs max_observation_tokens, its window, not null")
        check_pooling(self.pooling, self.pooling_2d)

    @property
    def wants_grids(self) -> bool:
        """Whether `Prompt.grids` should be filled."""
        return self.pooling_2d

    def token_scores(self, attention: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Smoothed attention of the tokens before the window."""
        before = attention.clone()
        before[..., self._window(prompt) :] = 0
        return smooth(before, self.pooling, prompt.grids if self.pooling_2d else ())

    def precedence(self, prompt: Prompt, device: torch.device) -> torch.Tensor | None:
        """The window above all other groups; of its tokens, if not all fit, the last."""
        groups = super().precedence(prompt, device)
        if groups is None:
            groups = torch.zeros(prompt.tokens, dtype=torch.int64, device=device)
        window = groups[self._window(prompt) :]
        window.copy_(torch.arange(3, 3 + len(window), device=device))
        return groups

    def _window(self, prompt: Prompt) -> int:
        """Position of the window's first token."""
        assert self.max_observation_tokens is not None
        return max(0, prompt.tokens - self.max_observation_tokens)
