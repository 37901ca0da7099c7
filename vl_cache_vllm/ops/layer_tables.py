# SPDX-License-Identifier: Apache-2.0
"""Each layer's block table, lengths and slots of one step."""

from dataclasses import dataclass
from functools import cached_property

import torch

from vl_cache_vllm.ops.dispatch import operation


@dataclass
class LayerTables:
    """Per-layer attention inputs, in pages of the pool. L layers, R requests, T tokens."""

    block_table: torch.Tensor  # int32 [L, R, W]
    seq_lens: torch.Tensor  # int32 [L, R]
    slot_mapping: torch.Tensor  # int64 [L, T]

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Views of each layer's lengths, block table and slots."""
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
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    evicted_tokens: torch.Tensor,
    prompt_blocks: torch.Tensor,
    kept_blocks: torch.Tensor,
    kept_pages: torch.Tensor,
    block_size: int,
    layer_stride: int,
    block_stride: int,
    out: LayerTables,
) -> None:
    """Resolve every (layer, request) to pages of the pool.

    A request that was never evicted uses page l of each of its blocks. An evicted one holds
    ``kept_blocks`` blocks whose pages are dealt out layer after layer: page f of the deal (the
    f-th of ``kept_blocks * L``) is page ``f % L`` of block ``f // L``. After the kept pages of a
    layer come page l of each decode block.

    Args:
        block_table: block ids, int32 ``[R, C]``; rows are [prompt][kept][decode] blocks.
        query_start_loc: int32 ``[R + 1]``.
        seq_lens: logical lengths including this step's tokens, int32 ``[R]``.
        evicted_tokens: E, logical tokens replaced by the kept pages, int64 ``[R]``; 0: not evicted.
        prompt_blocks: N, int64 ``[R]``; 0 where not evicted.
        kept_blocks: M, int64 ``[R]``; 0 where not evicted.
        kept_pages: pages of each layer, int64 ``[R, L]``; 0 where not evicted.
        block_size: tokens per block.
        layer_stride: pages from one layer's page to the next layer's, of the same block.
        block_stride: pages from one block's page to the next block's, of the same layer.
        out: written in place; ``slot_mapping`` beyond the last query is -1, table entries beyond
            a row's length are valid pages or what they were.
    """
    num_layers, num_reqs, width = out.block_table.shape
    device = block_table.device
    layer = torch.arange(num_layers, device=device)
    last_column = block_table.shape[1] - 1
    kept = kept_pages.T  # [L, R]
    first = (kept_pages.cumsum(1) - kept_pages).T  # [L, R]: pages dealt to the layers before
    decode_start = prompt_blocks + kept_blocks  # [R]

    entry = torch.arange(width, device=device)  # [W]
    deal = first[..., None] + entry  # [L, R, W]
    is_kept = entry < kept[..., None]
    column = torch.where(
        is_kept,
        prompt_blocks[:, None] + deal // num_layers,
        decode_start[:, None] + entry - kept[..., None],
    ).clamp_(0, last_column)
    page_layer = torch.where(is_kept, deal % num_layers, layer[:, None, None])
    blocks = block_table.long().expand(num_layers, -1, -1).gather(2, column)
    out.block_table.copy_(page_layer * layer_stride + blocks * block_stride)
    out.seq_lens.copy_(kept * block_size + (seq_lens - evicted_tokens))

    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    num_tokens = int(out.slot_mapping.shape[1])
    token = torch.arange(num_tokens, device=device)
    row = torch.searchsorted(query_start_loc[1:].contiguous(), token, right=True)
    row = row.clamp_(max=num_reqs - 1)
    position = (seq_lens - query_lens - query_start_loc[:-1])[row] + token
    offset = position - evicted_tokens[row]  # tokens since the eviction
    column = (decode_start[row] + offset // block_size).clamp_(0, last_column)
    blocks = block_table[row, column].long()
    slots = (layer[:, None] * layer_stride + blocks * block_stride) * block_size
    out.slot_mapping.copy_(
        torch.where(token < query_start_loc[num_reqs], slots + offset % block_size, -1)
    )
