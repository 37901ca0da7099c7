# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the lower bound that every policy has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import EvictionPolicy, setting, with_default
from vl_cache_vllm.policy.prompt import Prompt


@dataclass(frozen=True)
class RandomPolicy(EvictionPolicy):
    """Random token scores, uniform layer budgets.

    The scores depend only on ``seed``, layer, KV head and position, so that a prompt keeps the same
    tokens however it was scheduled. Attention is ignored. The recent window is kept as by every
    policy.
    """

    name: ClassVar[str] = "random"
    for_text: ClassVar[bool] = True

    max_observation_tokens: int | None = with_default(EvictionPolicy, "max_observation_tokens", 1)
    seed: int = setting(0, f"Seed of the scores, from 0 to {2**31 - 1}.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to {2**31 - 1}, got {self.seed}")

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """A hash of layer, KV head and position, uniform in [0, 1)."""
        layers, heads, tokens = attention.sums.shape
        device = attention.sums.device

        def index(first: int, count: int, odd: int) -> torch.Tensor:
            return torch.arange(first + 1, first + count + 1, device=device) * odd

        layer_numbers = to_device(prompt.shard.layer_numbers(layers), device)
        # 32-bit arithmetic in int64; the constants are those of Murmur3's finaliser.
        x = ((layer_numbers + 1) * 0x9E3779B1)[:, None, None]
        x = x + index(prompt.shard.first_kv_head, heads, 0x85EBCA77)[None, :, None]
        x = (x + index(0, tokens, 0xC2B2AE3D) + self.seed * 0x27D4EB2F) & 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
        return (x.double() / 2**32).to(attention.sums.dtype)
