# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.observe.observe` as two passes, which never store the attention matrix.

1. `statistics_kernel` computes each row's maximum logit and sum of exponentials. The keys are split
   over several programs, since the few queries of an observation window would not fill a GPU.
   `combine_kernel` then combines the splits, if there are several.
2. `columns_kernel` recomputes the logits. Each program owns a tile of keys of one KV head, loops
   over the rows, takes sums and maxima of the columns and counts the dense entries.

Example with 2 KV heads, 3 row tiles, 8 key tiles and 4 splits; only the first head is drawn::

              pass 1: 3 x 4 x 2 programs          pass 2: 8 x 2 programs

              key tiles                           key tiles
              0   1 | 2   3 | 4   5 | 6   7       0   1   2   3   4   5   6   7
    rows 0   [ p0  ] [ p3  ] [ p6  ] [ p9  ]      |   |   |   |   |   |   |   |
    rows 1   [ p1  ] [ p4  ] [ p7  ] [ p10 ]      p0  p1  p2  p3  p4  p5  p6  p7
    rows 2   [ p2  ] [ p5  ] [ p8  ] [ p11 ]      v   v   v   v   v   v   v   v

A row is one query of one head of a KV head's group: row r is query ``r // group`` and head
``r % group`` of the group. Its position is ``first_position + r // group``.

Instructions bound both passes, not memory. So a loop has as few as possible: tiles that every row
sees run without masks in a loop of their own, columns are reduced over the rows once at the end,
and the softmax scale and log2(e) are one factor. `tests/ops/test_kernels.py` has their budgets.
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
FEW_ROWS = 16  # rows of a tile if there are no more, the fewest that a matrix product takes
SPLITS = 16  # splits that are combined in one iteration
PROGRAMS_PER_SM = 3
MAX_REGISTERS = 168  # of a thread, so that as many programs of 128 threads fit


@triton.jit
def _load_queries(
    query,  # [num_queries, num_heads, HEAD_SIZE], any float type
    query_stride,  # int, elements from query to query
    head_stride,  # int, elements from query head to query head
    kv_head,  # scalar int64
    first_row,  # int, of the tile; a multiple of ROWS
    num_rows,  # int, num_queries * GROUP
    GROUP: tl.constexpr,  # query heads per KV head
    HEAD_SIZE: tl.constexpr,  # elements of a query
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
):
    """Queries of a row tile, ``[ROWS, E]``; 0 outside the tensor."""
    row, element = tl.arange(0, ROWS), tl.arange(0, E)
    exists = (first_row + row < num_rows)[:, None] & (element < HEAD_SIZE)[None, :]
    # The first query's address is in 64 bits; the others are at most ROWS queries behind it.
    first_query = tl.cast(first_row // GROUP, tl.int64)
    start = query + first_query * query_stride + kv_head * GROUP * head_stride
    if ROWS % GROUP != 0:
        row += first_row % GROUP
    offset = row // GROUP * query_stride + row % GROUP * head_stride
    return tl.load(start + (offset[:, None] + element[None, :]), mask=exists, other=0.0)


@triton.jit
def _load_keys(
    key_pages,  # any element type, begins with the first key of entry 0
    entry_stride,  # int, elements from the page of entry 0 to that of entry 1
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens; not read without BLOCK_SIZE
    kv_head,  # scalar int64
    position,  # [KEYS] int32, positions in the sequence
    num_keys,  # int
    MASKED: tl.constexpr,  # bool; False: all positions are below num_keys
    BLOCK_SIZE: tl.constexpr,  # tokens of a page; 0: all keys are in one page
    HEAD_SIZE: tl.constexpr,  # elements of a key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
):
    """Keys of a tile, transposed, ``[E, KEYS]``; 0 outside the sequence."""
    element = tl.arange(0, E)
    exists = (position < num_keys) | (not MASKED)
    start = key_pages + kv_head * head_stride
    if BLOCK_SIZE > 0:
        entry = tl.load(table + position // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        start = start + entry * entry_stride + position % BLOCK_SIZE * token_stride
    else:
        start = start + position.to(tl.int64) * token_stride
    exists = exists[None, :] & (element < HEAD_SIZE)[:, None]
    return tl.load(start[None, :] + element[:, None] * element_stride, mask=exists, other=0.0)


@triton.jit
def _logits(
    query,  # [ROWS, E], any float type
    key,  # [E, KEYS], any float type
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    cap_exponent,  # float, tanh(x) is 1 - 2 / (1 + 2 ** y) for y = product * cap_exponent
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
):
    """Logits of a tile before masking, float32 ``[ROWS, KEYS]``; not scaled without a soft cap.

    Both passes call this with tiles of one size and one order of the operands. So they compute the
    same bits, and at a threshold of 1 exactly the entries that equal the row's maximum are dense.
    """
    if WIDENS:
        query, key = query.to(tl.float32), key.to(tl.float32)
    logits = tl.dot(query, key, input_precision="ieee")
    if HAS_SOFTCAP:
        logits = softcap * (1 - 2 / (1 + tl.exp2(logits * cap_exponent)))
    return logits


@triton.jit
def _power(
    logits,  # [ROWS, KEYS] float32, -inf where masked
    base,  # [ROWS] float32
    to_base_2,  # float, factor of the logits
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """``2 ** (logits * to_base_2 - base)``, ``[ROWS, KEYS]``."""
    factor = tl.full((ROWS, KEYS), to_base_2, tl.float32)
    return tl.exp2(tl.fma(logits, factor, tl.broadcast_to(-base[:, None], (ROWS, KEYS))))


_VARYING = ["num_rows", "num_keys", "first_position"]


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=[*_VARYING, "keys_per_split"],
    do_not_specialize_on_alignment=["table", "num_keys_given", "maxima", "sums"],
)
def statistics_kernel(
    query,  # [num_queries, num_heads, HEAD_SIZE], any float type
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of entry 0
    entry_stride,  # int, elements from the page of entry 0 to that of entry 1
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens; not read without BLOCK_SIZE
    num_rows,  # int, num_queries * GROUP
    num_keys,  # int, keys up to the last query; an upper bound with HAS_NUM_KEYS
    num_keys_given,  # [] int32 or int64, keys up to the last query; not read without HAS_NUM_KEYS
    first_position,  # int, position of the first query
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    cap_exponent,  # float, tanh(x) is 1 - 2 / (1 + 2 ** y) for y = product * cap_exponent
    to_base_2,  # float, factor of the logits
    maxima,  # [num_splits, num_kv_heads, num_rows] float32, output: largest logit; -inf: no key
    sums,  # [num_splits, num_kv_heads, num_rows] float32, output: sum of exp(logit - maximum); its
    # reciprocal if there is one split
    keys_per_split,  # int, a multiple of KEYS
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_NUM_KEYS: tl.constexpr,  # bool
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    BLOCK_SIZE: tl.constexpr,  # tokens of a page; 0: all keys are in one page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
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
        query,
        query_stride,
        query_head_stride,
        kv_head,
        first_row,
        num_rows,
        GROUP,
        HEAD_SIZE,
        E,
        ROWS,
    )
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first_key = split * keys_per_split
    end = tl.minimum(num_keys, first_position + (first_row + ROWS - 1) // GROUP + 1)
    end = tl.minimum(end, first_key + keys_per_split)
    # Every row sees the keys before the first row's own.
    seen = tl.minimum(end, first_position + first_row // GROUP + 1)
    seen = first_key + tl.maximum(0, seen - first_key) // KEYS * KEYS
    for MASKED in tl.static_range(2):
        begin, stop = (seen, end) if MASKED else (first_key, seen)
        for start in range(begin, stop, KEYS):
            position = start + tl.arange(0, KEYS)
            keys = _load_keys(
                key_pages,
                entry_stride,
                head_stride,
                token_stride,
                element_stride,
                table,
                kv_head,
                position,
                num_keys,
                MASKED,
                BLOCK_SIZE,
                HEAD_SIZE,
                E,
            )
            logits = _logits(queries, keys, softcap, cap_exponent, HAS_SOFTCAP, WIDENS)
            if MASKED:
                logits = tl.where(position[None, :] <= last_key[:, None], logits, float("-inf"))
            higher = tl.maximum(maximum, tl.max(logits, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher) * to_base_2
            total *= tl.exp2(maximum * to_base_2 - base)
            total += tl.sum(_power(logits, base, to_base_2, ROWS, KEYS), 1)
            maximum = higher
    if tl.num_programs(1) == 1:
        total = 1 / total
    index = (split * tl.num_programs(2) + kv_head) * num_rows + row
    tl.store(maxima + index, maximum, mask=row < num_rows)
    tl.store(sums + index, total, mask=row < num_rows)


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=["num_rows", "num_splits"],
    do_not_specialize_on_alignment=["maxima", "sums", "row_maxima", "row_factors"],
)
def combine_kernel(
    maxima,  # [num_splits, num_rows] float32, of statistics_kernel
    sums,  # [num_splits, num_rows] float32, of statistics_kernel
    num_rows,  # int, rows of all KV heads
    num_splits,  # int
    to_base_2,  # float, factor of the logits
    row_maxima,  # [num_rows] float32, output: largest logit
    row_factors,  # [num_rows] float32, output: 1 / sum of exp(logit - maximum)
    SPLITS: tl.constexpr,  # splits of an iteration
    ROWS: tl.constexpr,  # rows of a program
):
    """Combine the statistics of all splits. Grid ``(row tiles,)``, over all KV heads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first_split in range(0, num_splits, SPLITS):
        split = first_split + tl.arange(0, SPLITS)
        index = split.to(tl.int64)[:, None] * num_rows + row[None, :]
        exists = (split < num_splits)[:, None] & (row < num_rows)[None, :]
        of_splits = tl.load(maxima + index, mask=exists, other=float("-inf"))
        higher = tl.maximum(maximum, tl.max(of_splits, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher) * to_base_2
        parts = tl.load(sums + index, mask=exists, other=0.0)
        parts *= tl.exp2(of_splits * to_base_2 - base[None, :])
        total = total * tl.exp2(maximum * to_base_2 - base) + tl.sum(parts, 0)
        maximum = higher
    tl.store(row_maxima + row, maximum, mask=row < num_rows)
    total = tl.where(row < num_rows, total, 1.0)
    tl.store(row_factors + row, 1 / total, mask=row < num_rows)


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=[*_VARYING, "weights_stride", "column_stride", "maxima_stride"],
    do_not_specialize_on_alignment=[
        "table",
        "num_keys_given",
        "row_maxima",
        "row_factors",
        "weights",
        "column_sums",
        "column_maxima",
        "dense_entries",
    ],
)
def columns_kernel(
    query,  # [num_queries, num_heads, HEAD_SIZE], any float type
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of entry 0
    entry_stride,  # int, elements from the page of entry 0 to that of entry 1
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    table,  # [n] int32 or int64, entries in the order of the tokens; not read without BLOCK_SIZE
    num_rows,  # int, num_queries * GROUP
    num_keys,  # int, keys up to the last query; an upper bound with HAS_NUM_KEYS
    num_keys_given,  # [] int32 or int64, keys up to the last query; not read without HAS_NUM_KEYS
    first_position,  # int, position of the first query
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    cap_exponent,  # float, tanh(x) is 1 - 2 / (1 + 2 ** y) for y = product * cap_exponent
    to_base_2,  # float, factor of the logits
    row_maxima,  # [num_kv_heads, num_rows] float32, largest logit
    row_factors,  # [num_kv_heads, num_rows] float32, 1 / sum of exp(logit - maximum)
    margin,  # float, 0 or less: an entry that is at least maximum + margin is dense
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
    BLOCK_SIZE: tl.constexpr,  # tokens of a page; 0: all keys are in one page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
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
        entry_stride,
        head_stride,
        token_stride,
        element_stride,
        table,
        kv_head,
        position,
        num_keys,
        True,
        BLOCK_SIZE,
        HEAD_SIZE,
        E,
    )
    # Each thread adds up the entries that it holds; threads add up theirs after the last row.
    column = tl.zeros((ROWS, KEYS), tl.float32)
    largest = tl.zeros((ROWS, KEYS), tl.float32)
    dense = tl.zeros((ROWS,), tl.int32)
    # Rows before the tile's first key cannot attend to it: skip whole row tiles. The queries at or
    # after its last key see all of it.
    first_row = tl.maximum(0, first_key - first_position) * GROUP // ROWS * ROWS
    unmasked = tl.maximum(0, first_key + KEYS - 1 - first_position) * GROUP
    unmasked = tl.minimum(tl.cdiv(unmasked, ROWS), tl.cdiv(num_rows, ROWS)) * ROWS
    for MASKED in tl.static_range(1, -1, -1):
        begin, end = (first_row, unmasked) if MASKED else (unmasked, num_rows)
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            queries = _load_queries(
                query,
                query_stride,
                query_head_stride,
                kv_head,
                start,
                num_rows,
                GROUP,
                HEAD_SIZE,
                E,
                ROWS,
            )
            # Rows behind the last one have no weight and no dense entry.
            of_row = kv_head * num_rows + row
            maximum = tl.load(row_maxima + of_row, mask=row < num_rows, other=float("inf"))
            factor = tl.load(row_factors + of_row, mask=row < num_rows, other=0.0)[:, None]
            logits = _logits(queries, keys, softcap, cap_exponent, HAS_SOFTCAP, WIDENS)
            if MASKED:
                own = first_position + row // GROUP
                logits = tl.where(position[None, :] <= own[:, None], logits, float("-inf"))
            is_dense = tl.where(logits >= (maximum + margin)[:, None], 1.0, 0.0)
            dense += tl.sum(is_dense, 1).to(tl.int32)
            attention = _power(logits, maximum * to_base_2, to_base_2, ROWS, KEYS)
            if HAS_MAXIMA:
                attention *= factor
                largest = tl.maximum(largest, attention)
                factor = tl.full((ROWS, 1), 1.0, tl.float32)
            if HAS_WEIGHTS:
                of_query = weights + kv_head * weights_stride + row // GROUP
                factor *= tl.load(of_query, mask=row < num_rows, other=0.0)[:, None]
            if HAS_WEIGHTS or not HAS_MAXIMA:
                attention *= factor
            column += attention
    address = column_sums + kv_head * column_stride + position
    before = tl.load(address, mask=position < num_keys, other=0.0)
    tl.store(address, before + tl.sum(column, 0), mask=position < num_keys)
    if HAS_MAXIMA:
        address = column_maxima + kv_head * maxima_stride + position
        before = tl.load(address, mask=position < num_keys, other=0.0)
        tl.store(address, tl.maximum(before, tl.max(largest, 0)), mask=position < num_keys)
    tl.atomic_add(dense_entries, tl.sum(dense.to(tl.int64), 0))


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Number of programs that keep a device busy."""
    if device.type != "cuda":
        return 12  # interpreter: more than one, so that tests combine splits
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class _KeyTable:
    """Keys of a sequence in pages, as the kernels address them."""

    key_pages: torch.Tensor  # begins with the first key of entry 0
    entry_stride: int  # elements from the page of entry 0 to that of entry 1
    head_stride: int  # elements from KV head to KV head
    token_stride: int  # elements from token to token of a page
    element_stride: int  # elements from one element of a key to the next
    table: torch.Tensor  # [n] int32 or int64, entries in the order of the tokens
    block_size: int  # tokens of a page; 0: all keys are in one page, and there is no table

    @classmethod
    def of(cls, key: torch.Tensor | PagedKeys) -> "_KeyTable":
        """Keys in a pool, or a plain tensor ``[num_kv_heads, num_keys, head_size]``.

        Raises:
            ValueError: if the tokens of a page have no regular strides. Every GPU cache has them.
        """
        if isinstance(key, torch.Tensor):
            head_stride, token_stride, element_stride = key.stride()
            strides = 0, head_stride, token_stride, element_stride
            return cls(key, *strides, key, 0)
        pool = key.pool
        offset, token_stride, element_stride = pool.packing.key.regular_strides()
        page_stride, head_stride, _ = pool.pages.stride()
        # A view that begins with the first key, since a kernel gets the address of a tensor.
        offset += int(pool.pages.storage_offset()) + key.first_page * page_stride
        key_pages = pool.pages.as_strided((1,), (1,), offset)
        strides = key.stride * page_stride, head_stride, token_stride, element_stride
        return cls(key_pages, *strides, key.table, pool.block_size)


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

    Grid of the statistics: ``(row tiles, num_splits, num_kv_heads)``, with as many splits as are
    needed to keep the device busy. Grid of the columns: ``(key tiles, num_kv_heads)``.

    Raises:
        ValueError: if the tokens of a page have no regular strides, which every GPU cache has, or
            if the softmax scale is not positive.
    """
    if params.scale <= 0:
        raise ValueError(f"the softmax scale must be positive, not {params.scale}")
    keys = _KeyTable.of(key)
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = column_sums.shape[0]
    group = num_heads // num_kv_heads
    num_rows, most_keys = num_queries * group, first_position + num_queries
    rows = FEW_ROWS if num_rows <= FEW_ROWS else ROWS
    row_tiles = triton.cdiv(num_rows, rows)
    key_tiles = triton.cdiv(most_keys, KEYS)
    num_splits = triton.cdiv(_num_programs(query.device), row_tiles * num_kv_heads)
    tiles_per_split = triton.cdiv(key_tiles, min(num_splits, key_tiles))
    num_splits = triton.cdiv(key_tiles, tiles_per_split)
    assert query.stride(2) == 1 and column_sums.stride(1) == 1
    # The kernels' logits are capped and in their own unit, or not yet scaled.
    unit = 1.0 if params.softcap > 0 else params.scale
    to_base_2, margin = unit * math.log2(math.e), math.log(params.threshold) / unit
    cap_exponent = 2 * params.scale * math.log2(math.e) / params.softcap if params.softcap else 0.0
    inputs = (
        query,
        query.stride(0),
        query.stride(1),
        keys.key_pages,
        keys.entry_stride,
        keys.head_stride,
        keys.token_stride,
        keys.element_stride,
        keys.table,
        num_rows,
        most_keys,
        keys.table if num_keys is None else num_keys,
        first_position,
        params.softcap,
        cap_exponent,
        to_base_2,
    )
    constants = {
        "GROUP": group,
        "HAS_NUM_KEYS": num_keys is not None,
        "HAS_SOFTCAP": params.softcap > 0,
        # The interpreter multiplies the bit patterns of bfloat16 as integers.
        "WIDENS": triton.knobs.runtime.interpret,
        "BLOCK_SIZE": keys.block_size,
        "HEAD_SIZE": head_size,
        "E": max(16, triton.next_power_of_2(head_size)),
        "ROWS": rows,
        "KEYS": KEYS,
    }
    of_splits = torch.empty(2, num_splits, num_kv_heads, num_rows, device=query.device)
    statistics_kernel[row_tiles, num_splits, num_kv_heads](
        *inputs, of_splits[0], of_splits[1], tiles_per_split * KEYS, **constants
    )
    of_rows = of_splits[:, 0]
    if num_splits > 1:
        of_rows = torch.empty(2, num_kv_heads, num_rows, device=query.device)
        combine_kernel[(triton.cdiv(of_rows[0].numel(), ROWS),)](
            of_splits[0],
            of_splits[1],
            of_rows[0].numel(),
            num_splits,
            to_base_2,
            of_rows[0],
            of_rows[1],
            SPLITS=SPLITS,
            ROWS=ROWS,
        )
    # Without weights or maxima any tensor will do, since the kernel does not read it.
    maxima_of_columns = column_sums if column_maxima is None else column_maxima
    assert maxima_of_columns.stride(1) == 1
    weights = dense_entries if query_weights is None else query_weights.float().contiguous()
    # Others would spill, or their tiles take so much shared memory that no third program fits.
    is_small = constants["E"] <= 128 and params.softcap == 0 and column_maxima is None
    columns_kernel[key_tiles, num_kv_heads](
        *inputs,
        of_rows[0],
        of_rows[1],
        margin,
        weights,
        num_queries,
        column_sums,
        column_sums.stride(0),
        maxima_of_columns,
        maxima_of_columns.stride(0),
        dense_entries,
        HAS_MAXIMA=column_maxima is not None,
        HAS_WEIGHTS=query_weights is not None,
        num_stages=2,
        maxnreg=MAX_REGISTERS if is_small else None,
        **constants,
    )
