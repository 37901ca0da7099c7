# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: Cai et al., arXiv 2406.02069."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.policy.base import setting
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.snapkv import SnapKVPolicy


@dataclass(frozen=True)
class PyramidKVPolicy(SnapKVPolicy):
    """SnapKV's scores; layer budgets that fall linearly with depth."""

    name: ClassVar[str] = "pyramidkv"

    beta: float = setting(
        20.0,
        "Steepness of the layer budgets, at least 1. Of the budget beyond the window, the last "
        "layer gets 1 / beta times the mean and the first layer 2 - 1 / beta times the mean.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1.0:
            raise ValueError(f"beta must be at least 1, got {self.beta}")

    def layer_weights(self, density: torch.Tensor, budget: float, prompt: Prompt) -> torch.Tensor:
        """``w`` plus a line from ``2B - B / beta`` (first layer) to ``B / beta`` (last layer).

        w is the window and B the mean layer budget minus w, both in tokens. If the budget does not
        exceed the window, the layer budgets are uniform.
        """
        assert self.max_observation_tokens is not None
        window = float(self.max_observation_tokens)
        mean = max(0.0, budget * prompt.tokens - window)
        least = mean / self.beta
        shard = prompt.shard
        own = to_device(shard.layer_numbers(len(density)), density.device)
        depth = own.double() / max(1, (shard.num_layers or len(density)) - 1)
        return window + 2 * mean - least - 2 * (mean - least) * depth
