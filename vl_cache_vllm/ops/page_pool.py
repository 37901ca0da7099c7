# SPDX-License-Identifier: Apache-2.0
"""The KV cache of all layers as one pool of interchangeable pages."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class CellOrder:
    """Where the elements of a page's tokens lie inside one head's share of the page."""

    index: torch.Tensor  # int64 [block_size, head_size], element offsets

    @cached_property
    def _strides(self) -> tuple[int, int, int] | None:
        """Offset, token stride and element stride, if the order is that regular."""
        offset = int(self.index[0, 0])
        token = int(self.index[1, 0]) - offset if self.index.shape[0] > 1 else 0
        element = int(self.index[0, 1]) - offset if self.index.shape[1] > 1 else 0
        tokens, elements = (torch.arange(n, device=self.index.device) for n in self.index.shape)
        regular = offset + tokens[:, None] * token + elements * element
        return (offset, token, element) if torch.equal(regular, self.index) else None

    def regular_strides(self) -> tuple[int, int, int]:
        """Offset of the first token, stride of tokens, stride of a token's elements.

        Raises:
            ValueError: if the order is not that regular, as some of CPU kernels are not.
        """
        if self._strides is None:
            raise ValueError("the tokens of a page do not lie at regular strides")
        return self._strides

    def unpack(self, pages: torch.Tensor) -> torch.Tensor:
        """``[n, K, page]`` as ``[n, K, block_size, head_size]``; a view if regular."""
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
        """Tokens picked from ``[n, K, page]`` by broadcast indices, ``[*index, head_size]``."""
        if self._strides is None:
            return pages[page[..., None], head[..., None], self.index[token]]
        return self.unpack(pages)[page, head, token]

    def pack(self, pages: torch.Tensor, page: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write ``[F, K, block_size, head_size]`` into the pages ``page``, ``[F]``."""
        if self._strides is None:
            head = torch.arange(pages.shape[1], device=pages.device)[:, None]
            pages[page[:, None, None], head, self.index.flatten()] = tokens.flatten(-2)
        else:
            self.unpack(pages)[page] = tokens


@dataclass(frozen=True)
class PagePacking:
    """The orders of K and V in a page.

    Attention kernels choose them (CPU "vec": K transposed, AMX: tiles); nothing else in the
    code knows more about it than these indices.
    """

    key_index: torch.Tensor  # int64 [block_size, head_size], element offsets
    value_index: torch.Tensor  # int64 [block_size, head_size]

    @classmethod
    def side_by_side(cls, block_size: int, head_size: int, token_stride: int) -> "PagePacking":
        """K and V of a token and head lie together, as in vLLM's GPU caches.

        The indices stay on the CPU: of regular orders only strides are used, and no device is asked
        for them.
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
    """View of the cache as ``num_blocks x num_layers`` pages.

    Page (layer, block) is number ``layer * layer_stride + block * block_stride``.
    """

    pages: torch.Tensor  # [num_pages, num_kv_heads, cells of one head]; heads may interleave
    packing: PagePacking
    num_layers: int
    layer_stride: int  # in pages
    block_stride: int  # in pages
    number_type: torch.dtype | None = None  # of an fp8 cache, whose pages are bytes

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
        """Numbers of the pages of ``block`` at ``layer`` (broadcast)."""
        return layer * self.layer_stride + block * self.block_stride

    def read_keys(self, layer: int, block_row: torch.Tensor) -> torch.Tensor:
        """The keys in a row of blocks, ``[num_kv_heads, len(row) * block_size, head_size]``.

        Of an fp8 cache as they are stored, without the layer's scale.
        """
        return self._read(layer, block_row, self.packing.key)

    def read_values(self, layer: int, block_row: torch.Tensor) -> torch.Tensor:
        """The values stored in a row of blocks, shaped as `read_keys`."""
        return self._read(layer, block_row, self.packing.value)

    def _read(self, layer: int, block_row: torch.Tensor, order: CellOrder) -> torch.Tensor:
        pages = self.pages[self.page_ids(layer, block_row.long())]  # [n, K, page]
        tokens = order.unpack(pages).transpose(0, 1).flatten(1, 2)
        return tokens if self.number_type is None else tokens.view(self.number_type)

    def copy_tokens(
        self, source_page: torch.Tensor, source_offset: torch.Tensor, destination: torch.Tensor
    ) -> None:
        """Fill whole pages with tokens gathered from other pages.

        Args:
            source_page: page of each token, int64 ``[F, num_kv_heads, block_size]``.
            source_offset: token within that page, same shape.
            destination: pages to fill, int64 ``[F]``; none is a source.
        """
        head = torch.arange(self.num_kv_heads, device=self.pages.device)[:, None]
        for order in (self.packing.key, self.packing.value):
            tokens = order.gather(self.pages, source_page, head, source_offset)
            order.pack(self.pages, destination, tokens)


@dataclass(frozen=True)
class PagedKeys:
    """The keys of a layer in a row of blocks, where they lie."""

    pool: PagePool
    layer: int
    block_row: torch.Tensor  # [N]

    def read(self) -> torch.Tensor:
        """As `PagePool.read_keys` gives them."""
        return self.pool.read_keys(self.layer, self.block_row)
