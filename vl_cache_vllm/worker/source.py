# SPDX-License-Identifier: Apache-2.0
"""What an eviction chooses from: the pages of each layer that it replaces."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.worker.step import PendingEviction


@dataclass(frozen=True)
class EvictionSource:
    """A request's cache by layer. Tokens are counted by their place in it, the cache index.

    With block size 32, 2 layers, a prompt of 70 tokens, and 100 tokens in all at an eviction that
    follows one which left layer 0 three pages and layer 1 one::

                       pages replaced    tail
        first          2, 2              6 tokens: positions 64 to 69
        later          3 + 1, 1 + 1      4 tokens: positions 96 to 99

    Layers have different lengths after the first eviction. What counts tokens of all layers is as
    long as the longest can be.
    """

    page_ids: torch.Tensor  # int32 [num_layers, >= max_pages], in the order of the tokens
    pages: torch.Tensor  # int64 [num_layers], whole pages of each layer that are replaced
    max_pages: int  # bound of `pages` that the host knows
    total_pages: int  # sum of `pages`
    tail: int  # tokens after them, up to the last observed query, that stay where they are
    block_size: int
    is_first: bool  # eviction of the request, so that cache indices are positions

    @classmethod
    def of(
        cls,
        eviction: PendingEviction,
        pool: PagePool,
        page_ids: torch.Tensor,
        kept_pages: torch.Tensor,
    ) -> EvictionSource:
        """Describe what a pending eviction replaces.

        Args:
            eviction: of the step.
            pool: the KV cache of all layers.
            page_ids: of each layer in the order of its tokens, ``[num_layers, >= max_pages]``.
            kept_pages: what the eviction before left to each layer, int64 ``[num_layers]``; zeros
                if there was none.
        """
        block_size = pool.block_size
        replaced = eviction.order.evicted_tokens - eviction.evicted_before
        columns = replaced // block_size
        assert replaced > 0 and replaced % block_size == 0
        return cls(
            page_ids,
            kept_pages + columns,
            eviction.max_pages,
            (eviction.kept_before + columns) * pool.num_layers,
            eviction.tail,
            block_size,
            eviction.evicted_before == 0,
        )

    @classmethod
    def of_prompt(cls, tokens: int, num_layers: int, block_size: int) -> EvictionSource:
        """A prompt outside of a pool, whose page ids have no meaning."""
        pages, tail = divmod(tokens, block_size)
        return cls(
            torch.zeros(num_layers, pages, dtype=torch.int32),
            torch.full((num_layers,), pages),
            pages,
            num_layers * pages,
            tail,
            block_size,
            is_first=True,
        )

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens of each layer that can be kept or lost, int64 ``[num_layers]``."""
        return self.pages * self.block_size

    @property
    def cached_tokens(self) -> torch.Tensor:
        """Tokens of each layer up to the last observed query, int64 ``[num_layers]``."""
        return self.num_tokens + self.tail

    @property
    def max_tokens(self) -> int:
        """Bound of `cached_tokens` that the host knows."""
        return self.max_pages * self.block_size + self.tail
