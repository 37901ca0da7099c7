# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM: Xiao et al., arXiv 2309.17453 (ICLR 2024)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import EvictionPolicy, with_default
from vl_cache_vllm.policy.prompt import Prompt


@dataclass(frozen=True)
class StreamingLLMPolicy(EvictionPolicy):
    """The first tokens, then the most recent ones; uniform layer budgets; attention is ignored."""

    name: ClassVar[str] = "streamingllm"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.0)
    max_observation_tokens: int | None = with_default(EvictionPolicy, "max_observation_tokens", 1)
    sink_tokens: int = with_default(EvictionPolicy, "sink_tokens", 4)

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """Later tokens score higher; of the sink tokens, earlier ones do."""
        position = torch.arange(prompt.tokens, device=attention.sums.device)
        sinks = min(self.sink_tokens, prompt.tokens)
        score = torch.where(position < sinks, prompt.tokens + sinks - position, position)
        return score.to(attention.sums.dtype).expand_as(attention.sums)
