# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.layer_tables.layer_tables` in one launch, a program per layer and request."""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.layer_tables import LayerTables

BLOCK = 128


# One compilation serves all batches.
@triton.jit(
    do_not_specialize=[
        *("row_stride", "num_columns", "width", "num_tokens", "layer_stride", "block_stride")
    ],
    do_not_specialize_on_alignment=["evicted_tokens", "prompt_blocks", "kept_blocks"],
)
def layer_tables_kernel(
    block_table,
    row_stride,
    num_columns,
    query_start_loc,
    seq_lens,
    evicted_tokens,
    prompt_blocks,
    kept_blocks,
    kept_pages,
    out_table,
    out_lens,
    out_slots,
    num_layers,
    width,
    num_tokens,
    block_size,
    layer_stride,
    block_stride,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(num_layers, num_reqs + 1)``; the last row of programs fills the unused slots."""
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
        prompt = tl.load(prompt_blocks + row)
        decode_start = prompt + tl.load(kept_blocks + row)
        layers = tl.arange(0, LAYERS)
        of_row = kept_pages + row.to(tl.int64) * num_layers
        deal = tl.sum(tl.load(of_row + layers, mask=layers < layer, other=0))
        kept = tl.load(of_row + layer)
        blocks = block_table + row.to(tl.int64) * row_stride
        table = out_table + (layer * num_reqs + row) * width

        length = tl.load(seq_lens + row).to(tl.int64)
        since = kept * block_size + length - evicted
        tl.store(out_lens + layer * num_reqs + row, since.to(tl.int32))

        num_pages = tl.minimum((since + block_size - 1) // block_size, width)
        for start in range(0, num_pages, BLOCK):
            entry = (start + steps).to(tl.int64)
            is_kept = entry < kept
            page = deal + entry  # of the deal
            column = tl.where(is_kept, prompt + page // num_layers, decode_start + entry - kept)
            column = tl.minimum(tl.maximum(column, 0), num_columns - 1)
            block = tl.load(blocks + column, mask=entry < num_pages, other=0).to(tl.int64)
            page_layer = tl.where(is_kept, page % num_layers, layer)
            number = page_layer * layer_stride + block * block_stride
            tl.store(table + entry, number.to(tl.int32), mask=entry < num_pages)

        first = tl.load(query_start_loc + row)
        end = tl.load(query_start_loc + row + 1)
        first_position = length - (end - first)
        for start in range(first, tl.minimum(end, num_tokens), BLOCK):
            token = start + steps
            used = (token < end) & (token < num_tokens)
            offset = first_position + (token - first) - evicted  # tokens since the eviction
            column = tl.minimum(tl.maximum(decode_start + offset // block_size, 0), num_columns - 1)
            block = tl.load(blocks + column, mask=used, other=0).to(tl.int64)
            number = layer * layer_stride + block * block_stride
            tl.store(slots + token, number * block_size + offset % block_size, mask=used)


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
    """See the operation; the grid depends on shapes alone, so a CUDA graph may hold the launch."""
    num_layers, num_reqs, width = out.block_table.shape
    layer_tables_kernel[num_layers, num_reqs + 1](
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        query_start_loc,
        seq_lens,
        evicted_tokens.contiguous(),
        prompt_blocks.contiguous(),
        kept_blocks.contiguous(),
        kept_pages.contiguous(),
        out.block_table,
        out.seq_lens,
        out.slot_mapping,
        num_layers,
        width,
        out.slot_mapping.shape[1],
        block_size,
        layer_stride,
        block_stride,
        LAYERS=triton.next_power_of_2(num_layers),
        BLOCK=BLOCK,
    )
