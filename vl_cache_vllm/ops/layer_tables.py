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

    evicted_tokens: torch.Tensor  # int64 [R], E: logical tokens that the kept pages replace
    prompt_blocks: torch.Tensor  # int64 [R], N: blocks that the prompt had
    kept_blocks: torch.Tensor  # int64 [R], M: blocks that hold the kept pages
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

    An evicted request still has N columns of prompt blocks, whose blocks are freed. M kept blocks
    follow, then decode blocks. The kept blocks have M * L pages. Count these pages block after
    block: page index f is page ``f % L`` of kept block ``f // L``. The layers own consecutive
    ranges of f, in layer order, each as long as the layer's ``kept_pages``.

    Example: 3 layers and 4 tokens per block. A prompt of E = 31 tokens in N = 8 blocks keeps
    M = 2 blocks, of which the layers get 4, 1 and 1 pages. It has one decode block::

        row of block_table   10 11 12 13 14 15 16 17 | 18 19 | 30
                             N prompt blocks (freed) | kept  | decode

        page index f         0     1     2     3     4     5
        block.page           18.0  18.1  18.2  19.0  19.1  19.2
        used by layer        0     0     0     0     1     2

                             kept pages               decode    length with 1 decode token
        table of layer 0     18.0  18.1  18.2  19.0 | 30.0      4 * 4 + 1 = 17
        table of layer 1     19.1                   | 30.1      1 * 4 + 1 = 5
        table of layer 2     19.2                   | 30.2      1 * 4 + 1 = 5

    A token at logical position ``t >= E`` is number ``t - E`` since the eviction. Layer l stores it
    in page l of decode block ``(t - E) // block_size``, at offset ``(t - E) % block_size``. Above,
    position 31 goes to offset 0 of the pages 30.0, 30.1 and 30.2.

    Args:
        pool: block size, and the strides that turn (layer, block) into a page id.
        evicted: what eviction left of the requests.
        block_table: block ids of the scheduler, int32 ``[R, C]``; a row is [prompt][kept][decode].
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
    decode_start = evicted.prompt_blocks + evicted.kept_blocks  # [R], column

    entry = torch.arange(width, device=device)  # [W]
    page_index = first[..., None] + entry  # [L, R, W]
    is_kept = entry < kept[..., None]
    column = torch.where(
        is_kept,
        evicted.prompt_blocks[:, None] + page_index // num_layers,
        decode_start[:, None] + entry - kept[..., None],
    ).clamp_(0, last_column)
    page_layer = torch.where(is_kept, page_index % num_layers, layer[:, None, None])
    blocks = block_table.long().expand(num_layers, -1, -1).gather(2, column)
    out.block_table.copy_(pool.page_ids(page_layer, blocks))
    out.seq_lens.copy_(kept * block_size + (seq_lens - evicted.evicted_tokens))

    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    num_tokens = int(out.slot_mapping.shape[1])
    token = torch.arange(num_tokens, device=device)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
    row = row.clamp_(max=num_reqs - 1)
    position = (seq_lens - query_lens - query_start_loc[:-1])[row] + token  # logical
    offset = position - evicted.evicted_tokens[row]  # tokens since the eviction
    column = (decode_start[row] + offset // block_size).clamp_(0, last_column)
    blocks = block_table[row, column].long()
    slots = pool.page_ids(layer[:, None], blocks) * block_size
    out.slot_mapping.copy_(
        torch.where(token < query_start_loc[num_reqs], slots + offset % block_size, -1)
    )
