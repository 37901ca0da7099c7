# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.observe` in two passes over the keys, which never materialise attention.

The first pass finds each row's maximum logit and sum of exponentials, with the keys split over
programs, because few queries alone would not fill a GPU. In the second one each program owns some
keys of a KV head: it goes over the queries, adds up its columns and counts the dense entries.

A row is a query of one head of the KV head's group: row r is query ``r // group``.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.page_pool import PagedKeys

ROWS, KEYS = 64, 64  # of a program
SPLITS = 16  # whose statistics are combined at once
PROGRAMS_PER_SM = 2


@triton.jit
def _load_queries(query, query_stride, head_stride, kv_head, row, num_rows, head_size, GROUP, E):
    """``[rows, elements]``"""
    element = tl.arange(0, E)
    head = kv_head * GROUP + row % GROUP
    start = query + (row // GROUP).to(tl.int64) * query_stride + head * head_stride
    exists = (row < num_rows)[:, None] & (element < head_size)[None, :]
    return tl.load(start[:, None] + element[None, :], mask=exists, other=0.0)


@triton.jit
def _load_keys(
    pages,
    page_stride,
    head_stride,
    token_stride,
    element_stride,
    block_row,
    block_stride,
    block_size,
    kv_head,
    position,
    num_keys,
    head_size,
    E,
):
    """``[elements, keys]``"""
    element = tl.arange(0, E)
    exists = position < num_keys
    block = tl.load(block_row + position // block_size, mask=exists, other=0).to(tl.int64)
    start = pages + block * block_stride * page_stride + kv_head * head_stride
    start += position % block_size * token_stride
    exists = (element < head_size)[:, None] & exists[None, :]
    return tl.load(start[None, :] + element[:, None] * element_stride, mask=exists, other=0.0)


@triton.jit
def _logits(query, key, scale, softcap, HAS_SOFTCAP: tl.constexpr, WIDENS: tl.constexpr):
    if WIDENS:
        query, key = query.to(tl.float32), key.to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return logits


_VARYING = ["num_rows", "num_keys", "first_position", "block_stride"]


# One compilation serves all prompts: numbers that vary are not specialised on.
@triton.jit(
    do_not_specialize=[*_VARYING, "keys_per_split"],
    do_not_specialize_on_alignment=["block_row"],
)
def statistics_kernel(
    query,
    query_stride,
    query_head_stride,
    pages,
    page_stride,
    head_stride,
    token_stride,
    element_stride,
    block_row,
    block_stride,
    block_size,
    maxima,
    sums,
    num_rows,
    num_keys,
    keys_per_split,
    first_position,
    head_size,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDENS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Each row's maximum and sum over a split of the keys, float32 ``[splits, kv_heads, rows]``.

    Grid ``(row tiles, splits, kv_heads)``.
    """
    first_row = tl.program_id(0) * ROWS
    split, kv_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = first_row + tl.arange(0, ROWS)
    last_key = first_position + row // GROUP
    queries = _load_queries(
        query, query_stride, query_head_stride, kv_head, row, num_rows, head_size, GROUP, E
    )
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first_key = split * keys_per_split
    seen = tl.minimum(num_keys, first_position + (first_row + ROWS - 1) // GROUP + 1)
    for start in range(first_key, tl.minimum(first_key + keys_per_split, seen), KEYS):
        position = start + tl.arange(0, KEYS)
        keys = _load_keys(
            pages,
            page_stride,
            head_stride,
            token_stride,
            element_stride,
            block_row,
            block_stride,
            block_size,
            kv_head,
            position,
            num_keys,
            head_size,
            E,
        )
        logits = _logits(queries, keys, scale, softcap, HAS_SOFTCAP, WIDENS)
        is_seen = (position[None, :] <= last_key[:, None]) & (position < num_keys)[None, :]
        logits = tl.where(is_seen, logits, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - base) + tl.sum(tl.exp(logits - base[:, None]), 1)
        maximum = higher
    place = (split * tl.num_programs(2) + kv_head) * num_rows + row
    tl.store(maxima + place, maximum, mask=row < num_rows)
    tl.store(sums + place, total, mask=row < num_rows)


@triton.jit(
    do_not_specialize=[*_VARYING, "num_splits", "weights_stride", "column_stride"],
    do_not_specialize_on_alignment=["block_row", "weights", "column_sums", "dense_entries"],
)
def columns_kernel(
    query,
    query_stride,
    query_head_stride,
    pages,
    page_stride,
    head_stride,
    token_stride,
    element_stride,
    block_row,
    block_stride,
    block_size,
    maxima,
    sums,
    num_rows,
    num_keys,
    num_splits,
    first_position,
    head_size,
    scale,
    softcap,
    log_threshold,
    weights,
    weights_stride,
    column_sums,
    column_stride,
    dense_entries,
    GROUP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDENS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SPLITS: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add a tile of keys' columns, and its dense entries. Grid ``(key tiles, kv_heads)``."""
    first_key, kv_head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    position = first_key + tl.arange(0, KEYS)
    keys = _load_keys(
        pages,
        page_stride,
        head_stride,
        token_stride,
        element_stride,
        block_row,
        block_stride,
        block_size,
        kv_head,
        position,
        num_keys,
        head_size,
        E,
    )
    column = tl.zeros((KEYS,), tl.float32)
    dense = tl.zeros((KEYS,), tl.int32)
    # Queries before the tile's first key do not see it.
    first_row = tl.maximum(0, first_key - first_position) * GROUP // ROWS * ROWS
    for start in range(first_row, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        queries = _load_queries(
            query, query_stride, query_head_stride, kv_head, row, num_rows, head_size, GROUP, E
        )
        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for first_split in range(0, num_splits, SPLITS):
            split = first_split + tl.arange(0, SPLITS)
            place = (split[:, None] * tl.num_programs(1) + kv_head) * num_rows + row[None, :]
            exists = (split < num_splits)[:, None] & (row < num_rows)[None, :]
            of_splits = tl.load(maxima + place, mask=exists, other=float("-inf"))
            before, maximum = maximum, tl.maximum(maximum, tl.max(of_splits, 0))
            base = tl.where(row < num_rows, maximum, 0.0)
            shares = tl.load(sums + place, mask=exists, other=0.0)
            shares *= tl.exp(of_splits - base[None, :])
            total = total * tl.exp(before - base) + tl.sum(shares, 0)
        base = tl.where(row < num_rows, maximum, 0.0)
        total = tl.where(row < num_rows, total, 1.0)

        logits = _logits(queries, keys, scale, softcap, HAS_SOFTCAP, WIDENS)
        is_seen = position[None, :] <= (first_position + row // GROUP)[:, None]
        is_seen &= (row < num_rows)[:, None] & (position < num_keys)[None, :]
        dense += tl.sum((is_seen & (logits >= base[:, None] + log_threshold)).to(tl.int32), 0)
        attention = tl.exp(tl.where(is_seen, logits - base[:, None], float("-inf")))
        attention /= total[:, None]
        if HAS_WEIGHTS:
            of_query = weights + kv_head * weights_stride + row // GROUP
            weight = tl.load(of_query, mask=row < num_rows, other=0.0)
            attention *= weight[:, None].to(tl.float32)
        column += tl.sum(attention, 0)
    address = column_sums + kv_head * column_stride + position
    before = tl.load(address, mask=position < num_keys, other=0.0)
    tl.store(address, before + column, mask=position < num_keys)
    tl.atomic_add(dense_entries, tl.sum(dense.to(tl.int64), 0))


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Programs that keep a device busy."""
    if device.type != "cuda":
        return 8  # of the interpreter: some
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def observe_blocks(
    query: torch.Tensor,
    pages: torch.Tensor,
    keys: tuple[int, int, int, int],
    block_row: torch.Tensor,
    block_stride: int,
    block_size: int,
    first_position: int,
    scale: float,
    threshold: float,
    softcap: float,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
) -> None:
    """`observe` with keys in blocks.

    Args:
        pages: begins with the first element of block 0's first key.
        keys: strides of pages, KV heads, tokens and elements.
        block_stride: from one block's page to the next one's, in pages.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = column_sums.shape[0]
    group = num_heads // num_kv_heads
    num_rows, num_keys = num_queries * group, first_position + num_queries
    row_tiles = triton.cdiv(num_rows, ROWS)
    key_tiles = triton.cdiv(num_keys, KEYS)
    num_splits = triton.cdiv(_num_programs(query.device), row_tiles * num_kv_heads)
    tiles_per_split = triton.cdiv(key_tiles, min(num_splits, key_tiles))
    num_splits = triton.cdiv(key_tiles, tiles_per_split)
    assert query.stride(2) == 1 and column_sums.stride(1) == 1
    maxima = torch.empty(num_splits, num_kv_heads, num_rows, device=query.device)
    sums = torch.empty_like(maxima)
    inputs = (
        *(query, query.stride(0), query.stride(1)),
        *(pages, *keys, block_row, block_stride, block_size),
        *(maxima, sums, num_rows, num_keys),
    )
    shape = {
        "GROUP": group,
        "HAS_SOFTCAP": softcap > 0,
        # The interpreter would multiply the bits of bfloat16 as integers.
        "WIDENS": triton.knobs.runtime.interpret,
        "E": max(16, triton.next_power_of_2(head_size)),
        "ROWS": ROWS,
        "KEYS": KEYS,
    }
    statistics_kernel[row_tiles, num_splits, num_kv_heads](
        *inputs,
        tiles_per_split * KEYS,
        first_position,
        head_size,
        scale,
        softcap,
        **shape,
    )
    weights = dense_entries if query_weights is None else query_weights.float().contiguous()
    columns_kernel[key_tiles, num_kv_heads](
        *inputs,
        num_splits,
        first_position,
        head_size,
        scale,
        softcap,
        math.log(threshold),
        weights,
        num_queries,
        column_sums,
        column_sums.stride(0),
        dense_entries,
        HAS_WEIGHTS=query_weights is not None,
        SPLITS=SPLITS,
        **shape,
    )


def observe(query: torch.Tensor, key: torch.Tensor | PagedKeys, *how: Any, **named: Any) -> None:
    """See the operation; keys that are not in pages are one block.

    Raises:
        ValueError: if tokens do not lie at regular strides in a page, as they do on every GPU.
    """
    if isinstance(key, torch.Tensor):
        row = torch.zeros(1, dtype=torch.int32, device=key.device)
        observe_blocks(query, key, (0, *key.stride()), row, 0, key.shape[1], *how, **named)
        return
    pool = key.pool
    offset, token_stride, element_stride = pool.packing.key.regular_strides()
    page_stride, head_stride, _ = pool.pages.stride()
    offset += pool.pages.storage_offset() + key.layer * pool.layer_stride * page_stride
    first_key = pool.pages.as_strided((1,), (1,), offset)
    strides = page_stride, head_stride, token_stride, element_stride
    blocks = key.block_row, pool.block_stride, pool.block_size
    observe_blocks(query, first_key, strides, *blocks, *how, **named)
