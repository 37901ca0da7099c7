# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.observe.observe` as two launches, which never store the attention matrix.

1. `statistics_kernel` computes each row's maximum logit and sum of exponentials. The keys are split
   over several programs, since the few queries of an observation window would not fill a GPU.
2. `columns_kernel` combines these statistics and recomputes the logits. Each program owns a tile of
   keys of one KV head, loops over the rows, takes sums and maxima of the columns and counts the
   dense entries.

Example with 2 KV heads, 3 row tiles, 8 key tiles and 4 splits; only the first head is drawn::

              launch 1: 3 x 4 x 2 programs        launch 2: 8 x 2 programs

              key tiles                           key tiles
              0   1 | 2   3 | 4   5 | 6   7       0   1   2   3   4   5   6   7
    rows 0   [ p0  ] [ p3  ] [ p6  ] [ p9  ]      |   |   |   |   |   |   |   |
    rows 1   [ p1  ] [ p4  ] [ p7  ] [ p10 ]      p0  p1  p2  p3  p4  p5  p6  p7
    rows 2   [ p2  ] [ p5  ] [ p8  ] [ p11 ]      v   v   v   v   v   v   v   v

A row is one query of one head of a KV head's group: row r is query ``r // group`` and head
``r % group`` of the group. Its position is ``first_position + r // group``.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.observe import AttentionParams
from vl_cache_vllm.ops.page_pool import PagedKeys

ROWS, KEYS = 64, 64  # rows and keys of a tile
SPLITS = 16  # splits whose statistics are combined in one iteration
PROGRAMS_PER_SM = 2


@triton.jit
def _load_queries(
    query,  # [num_queries, num_heads, head_size], any float type
    query_stride,  # int, elements from query to query
    head_stride,  # int, elements from query head to query head
    kv_head,  # scalar int64
    row,  # [ROWS] int32, row indices
    num_rows,  # int, num_queries * GROUP
    head_size,  # int, elements of a query
    GROUP,  # constant, query heads per KV head
    E,  # constant, head_size rounded up to a power of 2
):
    """Queries of a row tile, ``[ROWS, E]``; 0 outside the tensor."""
    element = tl.arange(0, E)
    head = kv_head * GROUP + row % GROUP
    start = query + (row // GROUP).to(tl.int64) * query_stride + head * head_stride
    exists = (row < num_rows)[:, None] & (element < head_size)[None, :]
    return tl.load(start[:, None] + element[None, :], mask=exists, other=0.0)


@triton.jit
def _load_keys(
    key_pages,  # any element type, begins with the first key of entry 0
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens
    table_stride,  # int, pages from entry 0 to entry 1
    block_size,  # int, tokens of a page
    kv_head,  # scalar int64
    position,  # [KEYS] int32, positions in the sequence
    num_keys,  # int
    head_size,  # int, elements of a key
    E,  # constant, head_size rounded up to a power of 2
):
    """Keys of a tile, transposed, ``[E, KEYS]``; 0 outside the sequence."""
    element = tl.arange(0, E)
    exists = position < num_keys
    entry = tl.load(table + position // block_size, mask=exists, other=0).to(tl.int64)
    start = key_pages + entry * table_stride * page_stride + kv_head * head_stride
    start += position % block_size * token_stride
    exists = (element < head_size)[:, None] & exists[None, :]
    return tl.load(start[None, :] + element[:, None] * element_stride, mask=exists, other=0.0)


@triton.jit
def _logits(
    query,  # [ROWS, E], any float type
    key,  # [E, KEYS], any float type
    scale,  # float, softmax scale
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
):
    """Logits of a tile before masking, float32 ``[ROWS, KEYS]``."""
    if WIDENS:
        query, key = query.to(tl.float32), key.to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if HAS_SOFTCAP:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return logits


_VARYING = ["num_rows", "num_keys", "first_position", "table_stride"]


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=[*_VARYING, "keys_per_split"],
    do_not_specialize_on_alignment=["table", "num_keys_given"],
)
def statistics_kernel(
    query,  # [num_queries, num_heads, head_size], any float type
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of entry 0
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens
    table_stride,  # int, pages from entry 0 to entry 1
    block_size,  # int, tokens of a page
    maxima,  # [num_splits, num_kv_heads, num_rows] float32, output: largest logit; -inf: no key
    sums,  # [num_splits, num_kv_heads, num_rows] float32, output: sum of exp(logit - maximum)
    num_rows,  # int, num_queries * GROUP
    num_keys,  # int, keys up to the last query; an upper bound with HAS_NUM_KEYS
    num_keys_given,  # [] int32 or int64, keys up to the last query; not read without HAS_NUM_KEYS
    keys_per_split,  # int, a multiple of KEYS
    first_position,  # int, position of the first query
    head_size,  # int, elements of a query or key
    scale,  # float, softmax scale
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_NUM_KEYS: tl.constexpr,  # bool
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    E: tl.constexpr,  # head_size rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """Compute the softmax statistics of a row tile over one split of the keys.

    Grid ``(row tiles, num_splits, num_kv_heads)``. Online softmax: when a later tile of keys has a
    larger logit, the sum so far is rescaled to the new maximum.
    """
    if HAS_NUM_KEYS:
        num_keys = tl.load(num_keys_given).to(tl.int32)
        first_position = num_keys - num_rows // GROUP
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
            key_pages,
            page_stride,
            head_stride,
            token_stride,
            element_stride,
            table,
            table_stride,
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
    index = (split * tl.num_programs(2) + kv_head) * num_rows + row
    tl.store(maxima + index, maximum, mask=row < num_rows)
    tl.store(sums + index, total, mask=row < num_rows)


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=[*_VARYING, "num_splits", "weights_stride", "column_stride", "maxima_stride"],
    do_not_specialize_on_alignment=[
        "table",
        "num_keys_given",
        "weights",
        "column_sums",
        "column_maxima",
        "dense_entries",
    ],
)
def columns_kernel(
    query,  # [num_queries, num_heads, head_size], any float type
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of entry 0
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens
    table_stride,  # int, pages from entry 0 to entry 1
    block_size,  # int, tokens of a page
    maxima,  # [num_splits, num_kv_heads, num_rows] float32, of statistics_kernel
    sums,  # [num_splits, num_kv_heads, num_rows] float32, of statistics_kernel
    num_rows,  # int, num_queries * GROUP
    num_keys,  # int, keys up to the last query; an upper bound with HAS_NUM_KEYS
    num_keys_given,  # [] int32 or int64, keys up to the last query; not read without HAS_NUM_KEYS
    num_splits,  # int
    first_position,  # int, position of the first query
    head_size,  # int, elements of a query or key
    scale,  # float, softmax scale
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    log_threshold,  # float, ln p, 0 or less
    weights,  # [num_kv_heads, num_queries] float32; not read without HAS_WEIGHTS
    weights_stride,  # int, elements from KV head to KV head of weights
    column_sums,  # [num_kv_heads, >= num_keys] float32, added to
    column_stride,  # int, elements from KV head to KV head of column_sums
    column_maxima,  # [num_kv_heads, >= num_keys] float32, raised; not read without HAS_MAXIMA
    maxima_stride,  # int, elements from KV head to KV head of column_maxima
    dense_entries,  # [] int64, added to
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_NUM_KEYS: tl.constexpr,  # bool
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    HAS_WEIGHTS: tl.constexpr,  # bool
    HAS_MAXIMA: tl.constexpr,  # bool
    SPLITS: tl.constexpr,  # splits combined in one iteration
    E: tl.constexpr,  # head_size rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """Sums and maxima of all rows' attention for the columns of one key tile; count dense entries.

    Grid ``(key tiles, num_kv_heads)``. A column has one owner, so it needs no atomics and comes out
    identically in every run; the integer count is added atomically.
    """
    if HAS_NUM_KEYS:
        num_keys = tl.load(num_keys_given).to(tl.int32)
        first_position = num_keys - num_rows // GROUP
    first_key, kv_head = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    position = first_key + tl.arange(0, KEYS)
    keys = _load_keys(
        key_pages,
        page_stride,
        head_stride,
        token_stride,
        element_stride,
        table,
        table_stride,
        block_size,
        kv_head,
        position,
        num_keys,
        head_size,
        E,
    )
    column = tl.zeros((KEYS,), tl.float32)
    largest = tl.zeros((KEYS,), tl.float32)
    dense = tl.zeros((KEYS,), tl.int32)
    # Rows before the tile's first key cannot attend to it: skip whole row tiles.
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
            index = (split[:, None] * tl.num_programs(1) + kv_head) * num_rows + row[None, :]
            exists = (split < num_splits)[:, None] & (row < num_rows)[None, :]
            of_splits = tl.load(maxima + index, mask=exists, other=float("-inf"))
            before, maximum = maximum, tl.maximum(maximum, tl.max(of_splits, 0))
            base = tl.where(row < num_rows, maximum, 0.0)
            parts = tl.load(sums + index, mask=exists, other=0.0)
            parts *= tl.exp(of_splits - base[None, :])
            total = total * tl.exp(before - base) + tl.sum(parts, 0)
        base = tl.where(row < num_rows, maximum, 0.0)
        total = tl.where(row < num_rows, total, 1.0)

        logits = _logits(queries, keys, scale, softcap, HAS_SOFTCAP, WIDENS)
        is_seen = position[None, :] <= (first_position + row // GROUP)[:, None]
        is_seen &= (row < num_rows)[:, None] & (position < num_keys)[None, :]
        dense += tl.sum((is_seen & (logits >= base[:, None] + log_threshold)).to(tl.int32), 0)
        attention = tl.exp(tl.where(is_seen, logits - base[:, None], float("-inf")))
        attention /= total[:, None]
        if HAS_MAXIMA:
            largest = tl.maximum(largest, tl.max(attention, 0))
        if HAS_WEIGHTS:
            of_query = weights + kv_head * weights_stride + row // GROUP
            weight = tl.load(of_query, mask=row < num_rows, other=0.0)
            attention *= weight[:, None].to(tl.float32)
        column += tl.sum(attention, 0)
    address = column_sums + kv_head * column_stride + position
    before = tl.load(address, mask=position < num_keys, other=0.0)
    tl.store(address, before + column, mask=position < num_keys)
    if HAS_MAXIMA:
        address = column_maxima + kv_head * maxima_stride + position
        before = tl.load(address, mask=position < num_keys, other=0.0)
        tl.store(address, tl.maximum(before, largest), mask=position < num_keys)
    tl.atomic_add(dense_entries, tl.sum(dense.to(tl.int64), 0))


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Number of programs that keep a device busy."""
    if device.type != "cuda":
        return 8  # interpreter: more than one, so that tests combine splits
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _KeyTable:
    """Keys of a sequence in pages, as the kernels address them."""

    key_pages: torch.Tensor  # begins with the first key of entry 0
    page_stride: int  # elements from page to page
    head_stride: int  # elements from KV head to KV head
    token_stride: int  # elements from token to token of a page
    element_stride: int  # elements from one element of a key to the next
    table: torch.Tensor  # [n] int32 or int64, entries in the order of the tokens
    table_stride: int  # pages from entry 0 to entry 1
    block_size: int  # tokens of a page

    @classmethod
    def of(cls, key: torch.Tensor | PagedKeys) -> "_KeyTable":
        """Keys in a pool, or a plain tensor ``[num_kv_heads, num_keys, head_size]`` as one block.

        Raises:
            ValueError: if the tokens of a page have no regular strides. Every GPU cache has them.
        """
        if isinstance(key, torch.Tensor):
            row = torch.zeros(1, dtype=torch.int32, device=key.device)
            head_stride, token_stride, element_stride = key.stride()
            strides = 0, head_stride, token_stride, element_stride
            return cls(key, *strides, row, 0, key.shape[1])
        pool = key.pool
        offset, token_stride, element_stride = pool.packing.key.regular_strides()
        page_stride, head_stride, _ = pool.pages.stride()
        # A view that begins with the first key, since a kernel gets the address of a tensor.
        offset += int(pool.pages.storage_offset()) + key.first_page * page_stride
        key_pages = pool.pages.as_strided((1,), (1,), offset)
        strides = page_stride, head_stride, token_stride, element_stride
        return cls(key_pages, *strides, key.table, key.stride, pool.block_size)


def observe(
    query: torch.Tensor,
    key: torch.Tensor | PagedKeys,
    first_position: int,
    params: AttentionParams,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
    column_maxima: torch.Tensor | None = None,
    num_keys: torch.Tensor | None = None,
) -> None:
    """Accumulate attention and count dense entries; arguments as for the operation.

    Grid of the first launch: ``(row tiles, num_splits, num_kv_heads)``, with as many splits as are
    needed to keep the device busy. Grid of the second: ``(key tiles, num_kv_heads)``.

    Raises:
        ValueError: if the tokens of a page have no regular strides. Every GPU cache has them.
    """
    keys = _KeyTable.of(key)
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = column_sums.shape[0]
    group = num_heads // num_kv_heads
    num_rows, most_keys = num_queries * group, first_position + num_queries
    row_tiles = triton.cdiv(num_rows, ROWS)
    key_tiles = triton.cdiv(most_keys, KEYS)
    num_splits = triton.cdiv(_num_programs(query.device), row_tiles * num_kv_heads)
    tiles_per_split = triton.cdiv(key_tiles, min(num_splits, key_tiles))
    num_splits = triton.cdiv(key_tiles, tiles_per_split)
    assert query.stride(2) == 1 and column_sums.stride(1) == 1
    maxima = torch.empty(num_splits, num_kv_heads, num_rows, device=query.device)
    sums = torch.empty_like(maxima)
    inputs = (
        query,
        query.stride(0),
        query.stride(1),
        keys.key_pages,
        keys.page_stride,
        keys.head_stride,
        keys.token_stride,
        keys.element_stride,
        keys.table,
        keys.table_stride,
        keys.block_size,
        maxima,
        sums,
        num_rows,
        most_keys,
        keys.table if num_keys is None else num_keys,
    )
    constants = {
        "GROUP": group,
        "HAS_NUM_KEYS": num_keys is not None,
        "HAS_SOFTCAP": params.softcap > 0,
        # The interpreter multiplies the bit patterns of bfloat16 as integers.
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
        params.scale,
        params.softcap,
        **constants,
    )
    # Without weights or maxima any tensor will do, since the kernel does not read it.
    maxima_of_columns = column_sums if column_maxima is None else column_maxima
    assert maxima_of_columns.stride(1) == 1
    weights = dense_entries if query_weights is None else query_weights.float().contiguous()
    columns_kernel[key_tiles, num_kv_heads](
        *inputs,
        num_splits,
        first_position,
        head_size,
        params.scale,
        params.softcap,
        math.log(params.threshold),
        weights,
        num_queries,
        column_sums,
        column_sums.stride(0),
        maxima_of_columns,
        maxima_of_columns.stride(0),
        dense_entries,
        HAS_MAXIMA=column_maxima is not None,
        HAS_WEIGHTS=query_weights is not None,
        SPLITS=SPLITS,
        **constants,
    )
