# SPDX-License-Identifier: Apache-2.0
"""Compute each layer's block table, sequence lengths and slot mapping for one step.

L layers, R requests, T tokens of the step, C columns of vLLM's block table, W columns of a layer's
table.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.page_pool import PagePool


@dataclass(frozen=True)
class EvictedRows:
    """What eviction left of each request of a batch; all zero for a request not evicted."""

    evicted_tokens: torch.Tensor  # int64 [R], E: tokens that the kept pages replace, whole blocks
    kept_blocks: torch.Tensor  # int64 [R, >= M], ids of the blocks that hold the kept pages
    kept_pages: torch.Tensor  # int64 [R, L], pages of each layer; a row sums to M * L


@dataclass
class LayerTables:
    """Attention inputs of each layer, in pages of the pool."""

    block_table: torch.Tensor  # int32 [L, R, W], page ids
    seq_lens: torch.Tensor  # int32 [L, R], stored tokens including those of this step
    slot_mapping: torch.Tensor  # int64 [L, T], page id * block_size + offset in the page

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Views for each layer: lengths ``[R]``, block table ``[R, W]``, slots ``[T]``."""
        return list(
            zip(
                self.seq_lens.unbind(),
                self.block_table.unbind(),
                self.slot_mapping.unbind(),
                strict=True,
            )
        )


@operation
def layer_tables(
    pool: PagePool,
    evicted: EvictedRows,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: LayerTables,
) -> None:
    """Map every (layer, request) to pages of the pool.

    For a request that is not evicted, layer l uses page l of each block: logical position t is at
    offset ``t % block_size`` of page l of the block in column ``t // block_size``.

    An eviction replaces the first E tokens, E a multiple of the block size, by M kept blocks, which
    are not in the row. The columns before ``E // block_size`` are freed; the others go on as they
    are. The kept blocks have M * L pages. Count these pages block after block: page index f is page
    ``f % L`` of kept block ``f // L``. The layers own consecutive ranges of f, in layer order, each
    as long as the layer's ``kept_pages``.

    Example: 3 layers and 4 tokens per block. A prompt of 31 tokens in 8 blocks keeps M = 2 blocks
    of its first E = 28 tokens, of which the layers get 4, 1 and 1 pages. One more token follows::

        row of block_table   10 11 12 13 14 15 16 | 17
                             replaced (freed)     | tail
        kept_blocks          18 19

        page index f         0     1     2     3     4     5
        block.page           18.0  18.1  18.2  19.0  19.1  19.2
        used by layer        0     0     0     0     1     2

                             kept pages               tail      length with 32 tokens in all
        table of layer 0     18.0  18.1  18.2  19.0 | 17.0      4 * 4 + 4 = 20
        table of layer 1     19.1                   | 17.1      1 * 4 + 4 = 8
        table of layer 2     19.2                   | 17.2      1 * 4 + 4 = 8

    So logical position ``t >= E`` has the same column and offset as without eviction. Above,
    position 31 is at offset 3 of the pages 17.0, 17.1 and 17.2.

    Args:
        pool: block size, and the strides that turn (layer, block) into a page id.
        evicted: what eviction left of the requests.
        block_table: block ids of the scheduler, int32 ``[R, C]``, without kept blocks.
        query_start_loc: index of each request's first token in the step, int32 ``[R + 1]``.
        seq_lens: logical lengths including the tokens of this step, int32 ``[R]``.
        out: written in place. Slots after the last query are -1. Table entries beyond a row's
            length are valid page ids or keep their old value.
    """
    num_layers, num_reqs, width = out.block_table.shape
    device, block_size = block_table.device, pool.block_size
    layer = torch.arange(num_layers, device=device)
    last_column = block_table.shape[1] - 1
    kept = evicted.kept_pages.T  # [L, R]
    first = (evicted.kept_pages.cumsum(1) - evicted.kept_pages).T  # [L, R], a layer's first f

    def block_at(table: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Entries of the rows of a table, ``[L, R, W]``; columns beyond its end have no meaning."""
        column = column.clamp(0, table.shape[1] - 1)
        return table.long().expand(num_layers, -1, -1).gather(2, column)

    entry = torch.arange(width, device=device)  # [W]
    page_index = first[..., None] + entry  # [L, R, W]
    is_kept = entry < kept[..., None]
    column = (evicted.evicted_tokens // block_size)[:, None] + entry - kept[..., None]
    blocks = torch.where(
        is_kept,
        block_at(evicted.kept_blocks, page_index // num_layers),
        block_at(block_table, column),
    )
    page_layer = torch.where(is_kept, page_index % num_layers, layer[:, None, None])
    out.block_table.copy_(pool.page_ids(page_layer, blocks))
    out.seq_lens.copy_(kept * block_size + (seq_lens - evicted.evicted_tokens))

    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    num_tokens = int(out.slot_mapping.shape[1])
    token = torch.arange(num_tokens, device=device)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
    row = row.clamp_(max=num_reqs - 1)
    position = (seq_lens - query_lens - query_start_loc[:-1])[row] + token  # logical
    column = (position // block_size).clamp_(0, last_column)
    blocks = block_table[row, column].long()
    slots = pool.page_ids(layer[:, None], blocks) * block_size
    out.slot_mapping.copy_(
        torch.where(token < query_start_loc[num_reqs], slots + position % block_size, -1)
    )
