# SPDX-License-Identifier: Apache-2.0
"""H2O: Zhang et al., arXiv 2306.14048 (NeurIPS 2023)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import EvictionPolicy, with_default
from vl_cache_vllm.policy.prompt import Prompt


@dataclass(frozen=True)
class H2OPolicy(EvictionPolicy):
    """Attention accumulated over all queries of the prompt; uniform layer budgets.

    As in H2O, half of the budget holds the heavy hitters and half the most recent tokens. Unlike
    H2O, this policy evicts once, at the end of the prefill, and not with every generated token.
    """

    name: ClassVar[str] = "h2o"
    for_text: ClassVar[bool] = True

    recent_ratio: float = with_default(EvictionPolicy, "recent_ratio", 0.5)
    post_vision_only: bool = with_default(EvictionPolicy, "post_vision_only", False)

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """The accumulated attention itself."""
        return attention.sums
