# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.layer_tables.layer_tables` as one launch, a program per layer and request.

L layers, R requests, T tokens of the step, C columns of vLLM's block table, W columns of a layer's
table. The operation's docstring has an example of how positions become pages.
"""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables
from vl_cache_vllm.ops.page_pool import PagePool

BLOCK = 1024  # table entries, or tokens, per iteration


# Compiled once for all batches.
@triton.jit(
    do_not_specialize=[
        *("row_stride", "num_columns", "kept_stride", "width", "num_tokens"),
        *("layer_stride", "block_stride"),
    ],
    do_not_specialize_on_alignment=["evicted_tokens", "kept_blocks", "kept_pages"],
)
def layer_tables_kernel(
    block_table,  # [R, C] int32, block ids, without kept blocks
    row_stride,  # int, elements from row to row of block_table
    num_columns,  # int, C
    query_start_loc,  # [R + 1] int32, index of each request's first token in the step
    seq_lens,  # [R] int32, logical tokens including this step's
    evicted_tokens,  # [R] int64, E: tokens that the kept pages replace, whole blocks
    kept_blocks,  # [R, >= M] int64, ids of the kept blocks
    kept_stride,  # int, elements from row to row of kept_blocks
    kept_pages,  # [R, L] int64, pages of each layer; 0: not evicted
    out_table,  # [L, R, W] int32, output: page ids
    out_lens,  # [L, R] int32, output: stored tokens
    out_slots,  # [L, T] int64, output: page id * block_size + offset
    num_layers,  # int, L
    width,  # int, W
    num_tokens,  # int, T
    block_size,  # int, tokens of a page
    layer_stride,  # int, pages from layer to layer
    block_stride,  # int, pages from block to block
    LAYERS: tl.constexpr,  # L rounded up to a power of 2
    BLOCK: tl.constexpr,  # table entries, or tokens, per iteration
):
    """Write the tables of one layer for one request. Grid ``(L, R + 1)``.

    Program ``(layer, row)`` with ``row < R`` writes the request's table entries, length and slots.
    Program ``(layer, R)`` writes -1 to the slots after the last token.
    """
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    num_reqs = tl.num_programs(1) - 1
    steps = tl.arange(0, BLOCK)
    slots = out_slots + layer * num_tokens
    if row == num_reqs:
        for start in range(tl.load(query_start_loc + row), num_tokens, BLOCK):
            token = start + steps
            unused = tl.full((BLOCK,), -1, tl.int64)
            tl.store(slots + token, unused, mask=token < num_tokens)
    else:
        evicted = tl.load(evicted_tokens + row)
        kept_row = kept_blocks + row.to(tl.int64) * kept_stride
        layers = tl.arange(0, LAYERS)
        of_row = kept_pages + row.to(tl.int64) * num_layers
        # Index of this layer's first page among the request's kept pages.
        first_page = tl.sum(tl.load(of_row + layers, mask=layers < layer, other=0))
        kept = tl.load(of_row + layer)
        blocks = block_table + row.to(tl.int64) * row_stride
        table = out_table + (layer * num_reqs + row) * width

        length = tl.load(seq_lens + row).to(tl.int64)
        stored = kept * block_size + length - evicted
        tl.store(out_lens + layer * num_reqs + row, stored.to(tl.int32))

        num_pages = tl.minimum((stored + block_size - 1) // block_size, width)
        for start in range(0, num_pages, BLOCK):
            entry = (start + steps).to(tl.int64)
            is_kept = entry < kept
            page_index = first_page + entry  # among the request's kept pages
            column = evicted // block_size + entry - kept
            column = tl.minimum(tl.maximum(column, 0), num_columns - 1)
            in_row = (entry < num_pages) & ~is_kept
            block = tl.load(blocks + column, mask=in_row, other=0).to(tl.int64)
            of_kept = tl.load(kept_row + page_index // num_layers, mask=is_kept, other=0)
            block = tl.where(is_kept, of_kept, block)
            page_layer = tl.where(is_kept, page_index % num_layers, layer)
            page_id = page_layer * layer_stride + block * block_stride
            tl.store(table + entry, page_id.to(tl.int32), mask=entry < num_pages)

        first = tl.load(query_start_loc + row)
        end = tl.load(query_start_loc + row + 1)
        first_position = length - (end - first)  # logical
        for start in range(first, tl.minimum(end, num_tokens), BLOCK):
            token = start + steps
            used = (token < end) & (token < num_tokens)
            position = first_position + (token - first)
            column = tl.minimum(tl.maximum(position // block_size, 0), num_columns - 1)
            block = tl.load(blocks + column, mask=used, other=0).to(tl.int64)
            page_id = layer * layer_stride + block * block_stride
            tl.store(slots + token, page_id * block_size + position % block_size, mask=used)


def layer_tables(
    pool: PagePool,
    evicted: EvictedRows,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: LayerTables,
) -> None:
    """Compute the layers' tables, lengths and slots; arguments as for the operation.

    Grid ``(L, R + 1)``: a program per layer and request, and one per layer for the unused slots.
    The grid depends on shapes alone, so a CUDA graph can contain the launch.
    """
    num_layers, num_reqs, width = out.block_table.shape
    layer_tables_kernel[num_layers, num_reqs + 1](
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        query_start_loc,
        seq_lens,
        evicted.evicted_tokens.contiguous(),
        evicted.kept_blocks,
        evicted.kept_blocks.stride(0),
        evicted.kept_pages.contiguous(),
        out.block_table,
        out.seq_lens,
        out.slot_mapping,
        num_layers,
        width,
        out.slot_mapping.shape[1],
        pool.block_size,
        pool.layer_stride,
        pool.block_stride,
        LAYERS=triton.next_power_of_2(num_layers),
        BLOCK=BLOCK,
    )
