# SPDX-License-Identifier: Apache-2.0
"""The KV cache of all layers as one pool of interchangeable pages.

A page holds ``block_size`` tokens of one layer, with all its KV heads. A block of the scheduler is
one page for every layer. Each KV head has a contiguous or interleaved part of the page, in which
the elements ("cells") of its keys and values can have any order.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class CellOrder:
    """Offsets of the elements of a page's keys (or values) in one head's part of the page."""

    index: torch.Tensor  # int64 [block_size, head_size], offsets in elements

    @cached_property
    def _strides(self) -> tuple[int, int, int] | None:
        """As `regular_strides`; None if the order is not regular."""
        offset = int(self.index[0, 0])
        token = int(self.index[1, 0]) - offset if self.index.shape[0] > 1 else 0
        element = int(self.index[0, 1]) - offset if self.index.shape[1] > 1 else 0
        tokens, elements = (torch.arange(n, device=self.index.device) for n in self.index.shape)
        regular = offset + tokens[:, None] * token + elements * element
        return (offset, token, element) if torch.equal(regular, self.index) else None

    def regular_strides(self) -> tuple[int, int, int]:
        """Offset of the first token, token stride, element stride; all in elements.

        Raises:
            ValueError: if the order has no such strides, as for some CPU kernels.
        """
        if self._strides is None:
            raise ValueError("the tokens of a page do not lie at regular strides")
        return self._strides

    def unpack(self, pages: torch.Tensor) -> torch.Tensor:
        """The tokens of pages, ``[n, num_kv_heads, block_size, head_size]``.

        A view of ``pages``, ``[n, num_kv_heads, cells of one head]``, if the order is regular.
        """
        if self._strides is None:
            return pages.index_select(-1, self.index.flatten()).unflatten(-1, self.index.shape)
        offset, token, element = self._strides
        return pages.as_strided(
            (*pages.shape[:2], *self.index.shape),
            (*pages.stride()[:2], token, element),
            pages.storage_offset() + offset,
        )

    def gather(
        self, pages: torch.Tensor, page: torch.Tensor, head: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Single tokens of pages, ``[*index, head_size]``.

        Args:
            pages: ``[n, num_kv_heads, cells of one head]``.
            page, head, token: indices of the tokens, broadcast to the shape ``index``.
        """
        if self._strides is None:
            return pages[page[..., None], head[..., None], self.index[token]]
        return self.unpack(pages)[page, head, token]

    def pack(self, pages: torch.Tensor, page: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write whole pages.

        Args:
            pages: ``[n, num_kv_heads, cells of one head]``.
            page: indices of the pages to write, int64 ``[F]``.
            tokens: their content, ``[F, num_kv_heads, block_size, head_size]``.
        """
        if self._strides is None:
            head = torch.arange(pages.shape[1], device=pages.device)[:, None]
            pages[page[:, None, None], head, self.index.flatten()] = tokens.flatten(-2)
        else:
            self.unpack(pages)[page] = tokens


@dataclass(frozen=True)
class PagePacking:
    """The orders of keys and values in a page.

    The attention kernel defines them; the CPU's "vec" kernel, for example, transposes the keys and
    its AMX kernel packs them into tiles. The rest of the code uses these indices only.
    """

    key_index: torch.Tensor  # int64 [block_size, head_size], offsets in elements
    value_index: torch.Tensor  # int64 [block_size, head_size], offsets in elements

    @classmethod
    def side_by_side(cls, block_size: int, head_size: int, token_stride: int) -> "PagePacking":
        """The value of a token and head follows its key, as in vLLM's GPU caches.

        The indices stay on the CPU. A regular order is used through its strides only, so a GPU
        does not need the indices.

        Args:
            block_size: tokens of a page.
            head_size: elements of a key.
            token_stride: elements from a token to the next one of the same head.
        """
        key = torch.arange(block_size)[:, None] * token_stride + torch.arange(head_size)
        return cls(key, key + head_size)

    @cached_property
    def key(self) -> CellOrder:
        return CellOrder(self.key_index)

    @cached_property
    def value(self) -> CellOrder:
        return CellOrder(self.value_index)


@dataclass(frozen=True)
class PagePool:
    """A view of the KV cache as ``num_blocks * num_layers`` pages.

    The page of (layer, block) has the id ``layer * layer_stride + block * block_stride``. With 3
    layers and 4 blocks, vLLM allocates one of two orders::

        layer outermost: strides 4, 1      block outermost: strides 1, 3

                 block  0   1   2   3               block  0   1   2   3
        layer 0         0   1   2   3      layer 0         0   3   6   9
        layer 1         4   5   6   7      layer 1         1   4   7  10
        layer 2         8   9  10  11      layer 2         2   5   8  11
    """

    pages: torch.Tensor  # [num_pages, num_kv_heads, cells of one head]; heads may interleave
    packing: PagePacking
    num_layers: int
    layer_stride: int  # pages from a layer's page to the next layer's page of the same block
    block_stride: int  # pages from a block's page to the next block's page of the same layer
    number_type: torch.dtype | None = None  # element type of an fp8 cache, whose pages are bytes

    @property
    def device(self) -> torch.device:
        return self.pages.device

    @property
    def block_size(self) -> int:
        return self.packing.key_index.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.pages.shape[1]

    def page_ids(self, layer: torch.Tensor | int, block: torch.Tensor) -> torch.Tensor:
        """Page ids of (layer, block), broadcast."""
        return layer * self.layer_stride + block * self.block_stride

    def block_pages(self, block_row: torch.Tensor) -> torch.Tensor:
        """Page ids of all layers of a row of blocks, int32 ``[num_layers, n]``."""
        layer = torch.arange(self.num_layers, device=self.device)[:, None]
        return self.page_ids(layer, block_row.long()).int()

    def read_keys(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Copy keys out of pages.

        Keys of an fp8 cache are returned as stored, without the layer's scale.

        Args:
            page_ids: in the order of the tokens, ``[n]``.

        Returns:
            ``[num_kv_heads, n * block_size, head_size]``.
        """
        return self._read(page_ids, self.packing.key)

    def read_values(self, page_ids: torch.Tensor) -> torch.Tensor:
        """As `read_keys`, for the values."""
        return self._read(page_ids, self.packing.value)

    def _read(self, page_ids: torch.Tensor, order: CellOrder) -> torch.Tensor:
        # [n, num_kv_heads, cells of one head]
        pages = self.pages[page_ids.long()]
        tokens = order.unpack(pages).transpose(0, 1).flatten(1, 2)
        return tokens if self.number_type is None else tokens.view(self.number_type)

    def copy_tokens(
        self, source_page: torch.Tensor, source_offset: torch.Tensor, destination: torch.Tensor
    ) -> None:
        """Fill whole pages with the keys and values of tokens from other pages.

        Args:
            source_page: page id of each token, int64 ``[F, num_kv_heads, block_size]``.
            source_offset: index of the token in that page, same shape.
            destination: ids of the pages to fill, int64 ``[F]``; none of them is a source.
        """
        head = torch.arange(self.num_kv_heads, device=self.pages.device)[:, None]
        for order in (self.packing.key, self.packing.value):
            tokens = order.gather(self.pages, source_page, head, source_offset)
            order.pack(self.pages, destination, tokens)


@dataclass(frozen=True)
class PagedKeys:
    """The keys of one layer of a sequence, in place in the pool.

    Entry i of the table stands for the page ``first_page + table[i] * stride``.
    """

    pool: PagePool
    table: torch.Tensor  # [n], int32 or int64, in the order of the tokens
    first_page: int = 0
    stride: int = 1

    @classmethod
    def of_blocks(cls, pool: PagePool, layer: int, block_row: torch.Tensor) -> "PagedKeys":
        """The pages of a layer in blocks of the scheduler, ``[n]``."""
        return cls(pool, block_row, layer * pool.layer_stride, pool.block_stride)

    def read(self) -> torch.Tensor:
        """A copy, as from `PagePool.read_keys`."""
        return self.pool.read_keys(self.first_page + self.table.long() * self.stride)
