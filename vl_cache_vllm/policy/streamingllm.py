# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: Xiao et al., arXiv 2309.17453 (ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.base import EvictionPolicy, parameter, with_default


@dataclass(frozen=True)
class StreamingLLMPolicy(EvictionPolicy):
    """Attention sinks first, then the most recent tokens; uniform budgets; no attention needed."""

    name: ClassVar[str] = "streamingllm"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.0)
    max_observation_tokens: int | None = with_default(EvictionPolicy, "max_observation_tokens", 1)
    sink_tokens: int = parameter(4, "so many first tokens of the prompt are kept before all others")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be at least 0, got {self.sink_tokens}")

    def token_scores(self, attention: torch.Tensor) -> torch.Tensor:
        """Later is better, sinks are best."""
        scores = torch.arange(attention.shape[-1], device=attention.device, dtype=attention.dtype)
        scores[: self.sink_tokens] = torch.inf
        return scores.expand_as(attention)
