# SPDX-License-Identifier: Apache-2.0
"""The KV cache of all layers as one pool of interchangeable pages."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagePacking:
    """Where a token's K and V lie inside one head's share of a page.

    Attention kernels choose the order (CPU "vec": K transposed, AMX: tiles); these indices are
    all that the rest of the code knows about it.
    """

    key_index: torch.Tensor  # int64 [block_size, head_size], element offsets
    value_index: torch.Tensor  # int64 [block_size, head_size]


@dataclass(frozen=True)
class PagePool:
    """View of the cache as ``num_blocks x num_layers`` pages.

    Page (layer, block) is number ``layer * layer_stride + block * block_stride``.
    """

    pages: torch.Tensor  # [num_pages, num_kv_heads, block_size * 2 * head_size]
    packing: PagePacking
    num_layers: int
    layer_stride: int  # in pages
    block_stride: int  # in pages

    @property
    def block_size(self) -> int:
        return self.packing.key_index.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    def page_ids(
        self, layer: torch.Tensor | int, block: torch.Tensor
    ) -> torch.Tensor:
        """Numbers of the pages of ``block`` at ``layer`` (broadcast)."""
        return layer * self.layer_stride + block * self.block_stride

    def read_keys(self, layer: int, block_row: torch.Tensor) -> torch.Tensor:
        """The keys stored in a row of blocks, ``[num_kv_heads, len(row) * block_size, head_size]``."""
        return self._read(layer, block_row, self.packing.key_index)

    def read_values(self, layer: int, block_row: torch.Tensor) -> torch.Tensor:
        """The values stored in a row of blocks, shaped as `read_keys`."""
        return self._read(layer, block_row, self.packing.value_index)

    def _read(self, layer: int, block_row: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        pages = self.pages[self.page_ids(layer, block_row.long())]  # [n, K, page]
        tokens = pages.index_select(-1, index.flatten())
        tokens = tokens.view(*pages.shape[:2], *index.shape)  # [n, K, N, D]
        return tokens.transpose(0, 1).flatten(1, 2)

    def copy_tokens(
        self, source_page: torch.Tensor, source_offset: torch.Tensor, destination: torch.Tensor
    ) -> None:
        """Fill whole pages with tokens gathered from other pages.

        Args:
            source_page: page of each token, int64 ``[F, num_kv_heads, block_size]``.
            source_offset: token within that page, same shape.
            destination: pages to fill, int64 ``[F]``; none is a source.
        """
        head = torch.arange(self.num_kv_heads, device=self.pages.device)[:, None, None]
        filled = self.pages.new_empty((destination.shape[0], *self.pages.shape[1:]))
        for index in (self.packing.key_index, self.packing.value_index):
            tokens = self.pages[source_page[..., None], head, index[source_offset]]  # [F, K, N, D]
            filled[..., index.flatten()] = tokens.flatten(-2)
        self.pages[destination] = filled
