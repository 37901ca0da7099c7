# SPDX-License-Identifier: Apache-2.0
"""What policies are told about a prompt, besides how it attends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PatchGrid:
    """Visual tokens that lie on a rectangle of an image, a tile of one or a frame of a video.

    The token of row r and column c is at ``first + r * row_stride + c``.
    """

    first: int
    rows: int
    columns: int
    row_stride: int  # more than columns where structural tokens end the rows

    def positions(self, device: torch.device) -> torch.Tensor:
        """int64 ``[rows, columns]``."""
        rows = torch.arange(self.rows, device=device)[:, None] * self.row_stride
        return self.first + rows + torch.arange(self.columns, device=device)


@dataclass(frozen=True)
class Shard:
    """The part of the model that a worker has."""

    layers: tuple[int, ...] | None = None
    """The model's layers that the worker evicts; None: the first ones.

    Those of a pipeline stage, without layers of other attention than the full one.
    """
    first_kv_head: int = 0
    num_layers: int | None = None  # of the whole model; None: this worker has them all

    def layer_numbers(self, count: int) -> tuple[int, ...]:
        """The model's numbers of a worker's ``count`` layers."""
        assert self.layers is None or len(self.layers) == count
        return tuple(range(count)) if self.layers is None else self.layers


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt by kind.

    ``mean_over_ranks`` is for policies that look at all KV heads at once: under tensor parallelism
    each rank has some of them, and the mean of a tensor over the ranks is what makes the ranks
    agree. All of them must ask for it, and equally often.
    """

    tokens: int
    visual: tuple[tuple[int, int], ...] = ()  # (first, end) positions of each image or video
    grids: tuple[PatchGrid, ...] = ()  # of the images whose layout is known
    shard: Shard = Shard()
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
