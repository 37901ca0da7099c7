# SPDX-License-Identifier: Apache-2.0
"""What a policy knows of a prompt besides its attention."""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PatchGrid:
    """Visual tokens on a rectangular grid: an image, a tile of an image, or a frame of a video.

    The token in row r and column c is at position ``first + r * row_stride + c``.
    """

    first: int
    rows: int
    columns: int
    row_stride: int  # more than columns if structural tokens end the rows

    def positions(self, device: torch.device) -> torch.Tensor:
        """Positions of the tokens in the prompt, int64 ``[rows, columns]``."""
        rows = torch.arange(self.rows, device=device)[:, None] * self.row_stride
        return self.first + rows + torch.arange(self.columns, device=device)


@dataclass(frozen=True)
class Shard:
    """The part of the model on one worker."""

    layers: tuple[int, ...] | None = None
    """Indices in the model of the layers that this worker evicts; None: 0, 1, 2, ...

    A pipeline stage has some of the model's layers. Only those with full attention are evicted.
    """
    first_kv_head: int = 0
    num_layers: int | None = None  # of the whole model; None: this worker has all layers

    def layer_numbers(self, count: int) -> tuple[int, ...]:
        """Indices in the model of this worker's ``count`` evicted layers."""
        assert self.layers is None or len(self.layers) == count
        return tuple(range(count)) if self.layers is None else self.layers


@dataclass(frozen=True)
class Prompt:
    """Kinds and positions of a prompt's tokens.

    After an eviction every KV head of every layer holds other tokens, which are counted by their
    place among them. ``lengths`` then has the tokens of each layer, int64 ``[num_layers]``, and
    ``tokens`` is a bound of them.
    """

    tokens: int
    visual: tuple[tuple[int, int], ...] = ()  # (first, end) positions of each image or video
    grids: tuple[PatchGrid, ...] = ()  # of images with a known layout
    shard: Shard = Shard()
    lengths: torch.Tensor | None = None

    def of_layers(self, layers: slice, num_layers: int) -> "Prompt":
        """The same for some of ``num_layers`` layers."""
        numbers = self.shard.layer_numbers(num_layers)[layers]
        shard = dataclasses.replace(self.shard, layers=numbers)
        lengths = None if self.lengths is None else self.lengths[layers]
        return dataclasses.replace(self, shard=shard, lengths=lengths)

    def within(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of tokens, ``[num_layers, num_kv_heads, tokens]``, 0 beyond a layer's length."""
        if self.lengths is None:
            return scores
        places = torch.arange(scores.shape[-1], device=scores.device)
        return scores * (places < self.lengths[:, None, None])
