# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel group; each rank holds some KV heads of every layer.

All ranks run the same batches in the same order, so they reach these sums together. They must keep
the same number of tokens of each layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.distributed import get_tp_group


@dataclass(frozen=True)
class TPGroup:
    """Rank and size, and ``sum``, which adds the ranks' tensors in place and returns the result."""

    rank: int = 0
    size: int = 1
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda values: values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the ranks of float tensors, in place."""
        return self.sum(values) / self.size


def tensor_parallel_group(size: int) -> TPGroup:
    """The group of this worker process; a single rank needs no process group."""
    if size == 1:
        return TPGroup()
    group = get_tp_group()

    def add(values: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(values, group=group.device_group)
        return values

    return TPGroup(group.rank_in_group, size, add)
