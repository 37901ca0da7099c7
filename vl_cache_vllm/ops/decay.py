# SPDX-License-Identifier: Apache-2.0
"""The factors by which `look_ahead` decays scores, the same on all devices."""

import functools
import math
from dataclasses import dataclass

import torch

from vl_cache_vllm.ops.device import pinned

MAX_FRAME = 512  # tokens
MAX_GROWTH = 600.0  # exp of it times the largest float32 is a float64
NO_DECAY_LEFT = 104.0  # exp(-104) times 1 is less than the smallest float32


def inherits_nothing(length: float) -> bool:
    """Whether even the next token inherits less than a float32 can hold."""
    return length * NO_DECAY_LEFT < 1.0


@dataclass(frozen=True)
class DecayFrame:
    """The factors of `look_ahead` for one decay length."""

    growth: torch.Tensor  # float64 [size], exp(i / length)
    shrinkage: torch.Tensor  # float64 [size], exp(-i / length)
    of_frame: float  # exp(-size / length)

    @property
    def size(self) -> int:
        """Tokens of a frame, a power of 2."""
        return self.growth.shape[0]


@functools.lru_cache(maxsize=64)
def decay_frame(length: float, device: torch.device) -> DecayFrame:
    """The frame is as long as float64 allows, and at most `MAX_FRAME` tokens.

    The factors are computed on the host, once for each length, so that all devices have the same.
    """
    size = 1 << min(MAX_FRAME, math.floor(MAX_GROWTH * length)).bit_length() - 1
    growth, shrinkage = (
        torch.tensor([math.exp(sign * i / length) for i in range(size)], dtype=torch.float64)
        for sign in (1, -1)
    )
    if device.type == "cuda":  # without waiting for the device
        growth, shrinkage = (
            pinned(each).to(device, non_blocking=True) for each in (growth, shrinkage)
        )
    return DecayFrame(growth, shrinkage, math.exp(-size / length))
