# SPDX-License-Identifier: Apache-2.0
"""SnapKV: Li et al., arXiv 2404.14469 (NeurIPS 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import EvictionPolicy, setting, with_default
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.scoring import POOLING, POOLING_2D, check_pooling, smooth


@dataclass(frozen=True)
class SnapKVPolicy(EvictionPolicy):
    """Pooled attention of the last tokens (the window), which are kept; uniform layer budgets."""

    name: ClassVar[str] = "snapkv"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.0)
    max_observation_tokens: int | None = setting(
        32,
        "Size of the observation window: this number of last tokens of the prompt score the others "
        "and are kept themselves.",
    )
    post_vision_only: bool = with_default(EvictionPolicy, "post_vision_only", False)
    pooling: int = setting(5, POOLING)
    pooling_2d: bool = setting(False, POOLING_2D)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_observation_tokens is None:
            raise ValueError(f"{self.name} needs max_observation_tokens, its window, not null")
        check_pooling(self.pooling, self.pooling_2d)

    @property
    def wants_grids(self) -> bool:
        """Whether the policy reads `Prompt.grids`."""
        return self.pooling_2d

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """Pooled attention of the tokens before the window."""
        before = attention.sums.clone()
        before[..., self._window(prompt) :] = 0
        return smooth(before, self.pooling, prompt.grids if self.pooling_2d else ())

    def precedence(self, prompt: Prompt, device: torch.device) -> torch.Tensor | None:
        """The window is above all other groups; if it does not fit, its last tokens are kept."""
        groups = super().precedence(prompt, device)
        if groups is None:
            groups = torch.zeros(prompt.tokens, dtype=torch.int64, device=device)
        window = groups[self._window(prompt) :]
        window.copy_(torch.arange(3, 3 + len(window), device=device))
        return groups

    def _window(self, prompt: Prompt) -> int:
        """Position of the first token of the window."""
        assert self.max_observation_tokens is not None
        return max(0, prompt.tokens - self.max_observation_tokens)
