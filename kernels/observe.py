# SPDX-License-Identifier: Apache-2.0
"""`observe` and `observe_layers` as two passes, which never store the attention matrix.

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

`observe_layers` runs both passes for several layers and all requests of a step at once. The grids
have a dimension more for the requests, and layers count as heads do. Each program finds its
request's lengths and addresses in a table, then calls the same functions as the kernels of one
layer.

Instructions bound both passes, not memory. So a loop has as few as possible: tiles that every row
sees run without masks in a loop of their own, columns are reduced over the rows once at the end,
and the softmax scale and log2(e) are one factor. `tests/ops/test_kernels.py` has their budgets.
"""

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.ops.observe import AttentionParams, RequestObservation
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool

ROWS, KEYS = 64, 64  # rows and keys of a tile
FEW_ROWS = 16  # rows of a tile if there are no more, the fewest that a matrix product takes
MAX_HEAD_SIZE = 256  # of larger heads, tiles have few rows: they must fit the shared memory
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


@triton.jit
def _float(
    bits,  # any shape, int64
):
    """The float32 whose bits these are."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _statistics(
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
    num_keys,  # int, keys up to the last query
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    cap_exponent,  # float, as in _logits
    to_base_2,  # float, factor of the logits
    kv_head,  # scalar int64
    first_row,  # int, of the row tile
    first_key,  # int, of the split
    end,  # int, position after the last key of the split
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    BLOCK_SIZE: tl.constexpr,  # tokens of a page; 0: all keys are in one page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """Largest logit and sum of exp(logit - maximum) of a row tile over one split of the keys.

    Both are float32 ``[ROWS]``; -inf and 0 for rows that see no key of the split. Online softmax:
    when a later tile of keys has a larger logit, the sum so far is rescaled to the new maximum.
    """
    first_position = num_keys - num_rows // GROUP
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
    end = tl.minimum(end, first_position + (first_row + ROWS - 1) // GROUP + 1)
    end = tl.minimum(end, num_keys)
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
    return maximum, total


@triton.jit
def _columns(
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
    num_keys,  # int, keys up to the last query
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    cap_exponent,  # float, as in _logits
    to_base_2,  # float, factor of the logits
    kv_head,  # scalar int64
    first_key,  # int, of the key tile
    row_maxima,  # [num_rows] float32, largest logit
    row_factors,  # [num_rows] float32, 1 / sum of exp(logit - maximum)
    margin,  # float, 0 or less: an entry that is at least maximum + margin is dense
    weights,  # [num_queries] float32; not read without HAS_WEIGHTS
    first_summed,  # int, queries before it are not summed; not used without IS_LAST
    sums,  # [>= num_keys] float32, added to
    maxima,  # [>= num_keys] float32, raised; not read without HAS_MAXIMA
    maxima_keys,  # int, num_keys, or 0 if there are no maxima; not used without HAS_MAXIMA
    dense_entries,  # [] int64, added to
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    HAS_WEIGHTS: tl.constexpr,  # bool
    IS_LAST: tl.constexpr,  # bool, sum the last queries only
    HAS_MAXIMA: tl.constexpr,  # bool
    BLOCK_SIZE: tl.constexpr,  # tokens of a page; 0: all keys are in one page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """Sums and maxima of all rows' attention for the columns of one key tile; count dense entries.

    A column has one owner, so it needs no atomics and comes out identically in every run; the
    integer count is added atomically.
    """
    first_position = num_keys - num_rows // GROUP
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
            maximum = tl.load(row_maxima + row, mask=row < num_rows, other=float("inf"))
            factor = tl.load(row_factors + row, mask=row < num_rows, other=0.0)[:, None]
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
                of_query = weights + row // GROUP
                factor *= tl.load(of_query, mask=row < num_rows, other=0.0)[:, None]
            if IS_LAST:
                factor = tl.where((row // GROUP >= first_summed)[:, None], factor, 0.0)
            if HAS_WEIGHTS or IS_LAST or not HAS_MAXIMA:
                attention *= factor
            column += attention
    before = tl.load(sums + position, mask=position < num_keys, other=0.0)
    tl.store(sums + position, before + tl.sum(column, 0), mask=position < num_keys)
    if HAS_MAXIMA:
        exists = position < maxima_keys
        before = tl.load(maxima + position, mask=exists, other=0.0)
        tl.store(maxima + position, tl.maximum(before, tl.max(largest, 0)), mask=exists)
    tl.atomic_add(dense_entries, tl.sum(dense.to(tl.int64), 0))


_VARYING = ["num_rows", "num_keys"]


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

    Grid ``(row tiles, num_splits, num_kv_heads)``.
    """
    if HAS_NUM_KEYS:
        num_keys = tl.load(num_keys_given).to(tl.int32)
    first_row = tl.program_id(0) * ROWS
    split, kv_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    maximum, total = _statistics(
        query,
        query_stride,
        query_head_stride,
        key_pages,
        entry_stride,
        head_stride,
        token_stride,
        element_stride,
        table,
        num_rows,
        num_keys,
        softcap,
        cap_exponent,
        to_base_2,
        kv_head,
        first_row,
        split * keys_per_split,
        (split + 1) * keys_per_split,
        GROUP,
        HAS_SOFTCAP,
        WIDENS,
        BLOCK_SIZE,
        HEAD_SIZE,
        E,
        ROWS,
        KEYS,
    )
    if tl.num_programs(1) == 1:
        total = 1 / total
    row = first_row + tl.arange(0, ROWS)
    index = (split * tl.num_programs(2) + kv_head) * num_rows + row
    tl.store(maxima + index, maximum, mask=row < num_rows)
    tl.store(sums + index, total, mask=row < num_rows)


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=["num_rows", "num_splits", "rows_per_layer"],
    do_not_specialize_on_alignment=["maxima", "sums", "layers", "row_maxima", "row_factors"],
)
def combine_kernel(
    maxima,  # [num_splits, num_rows] float32, of statistics_kernel
    sums,  # [num_splits, num_rows] float32, of statistics_kernel
    num_rows,  # int, rows of all KV heads
    num_splits,  # int
    to_base_2,  # float, factor of the logits; not used with OF_LAYERS
    layers,  # [num_layers, 2] int64, bits: to_base_2 and cap_exponent; not read without OF_LAYERS
    rows_per_layer,  # int; not used without OF_LAYERS
    row_maxima,  # [num_rows] float32, output: largest logit
    row_factors,  # [num_rows] float32, output: 1 / sum of exp(logit - maximum)
    OF_LAYERS: tl.constexpr,  # bool, the rows are those of several layers
    SPLITS: tl.constexpr,  # splits of an iteration
    ROWS: tl.constexpr,  # rows of a program
):
    """Combine the statistics of all splits. Grid ``(row tiles,)``, over all KV heads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if OF_LAYERS:
        layer = tl.minimum(row, num_rows - 1) // rows_per_layer
        factor = _float(tl.load(layers + layer * 2))
    else:
        factor = tl.full((ROWS,), to_base_2, tl.float32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first_split in range(0, num_splits, SPLITS):
        split = first_split + tl.arange(0, SPLITS)
        index = split.to(tl.int64)[:, None] * num_rows + row[None, :]
        exists = (split < num_splits)[:, None] & (row < num_rows)[None, :]
        of_splits = tl.load(maxima + index, mask=exists, other=float("-inf"))
        higher = tl.maximum(maximum, tl.max(of_splits, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher) * factor
        parts = tl.load(sums + index, mask=exists, other=0.0)
        parts *= tl.exp2(of_splits * factor[None, :] - base[None, :])
        total = total * tl.exp2(maximum * factor - base) + tl.sum(parts, 0)
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

    Grid ``(key tiles, num_kv_heads)``.
    """
    if HAS_NUM_KEYS:
        num_keys = tl.load(num_keys_given).to(tl.int32)
    kv_head = tl.program_id(1).to(tl.int64)
    _columns(
        query,
        query_stride,
        query_head_stride,
        key_pages,
        entry_stride,
        head_stride,
        token_stride,
        element_stride,
        table,
        num_rows,
        num_keys,
        softcap,
        cap_exponent,
        to_base_2,
        kv_head,
        tl.program_id(0) * KEYS,
        row_maxima + kv_head * num_rows,
        row_factors + kv_head * num_rows,
        margin,
        weights + kv_head * weights_stride,
        0,
        column_sums + kv_head * column_stride,
        column_maxima + kv_head * maxima_stride,
        num_keys,
        dense_entries,
        GROUP,
        HAS_SOFTCAP,
        WIDENS,
        HAS_WEIGHTS,
        False,
        HAS_MAXIMA,
        BLOCK_SIZE,
        HEAD_SIZE,
        E,
        ROWS,
        KEYS,
    )


@triton.jit
def _num_keys(
    request,  # [16] int64, of _describe
    layer,  # int
):
    """Keys of a layer up to the request's last query, int32."""
    given = tl.load(request + 3)
    return tl.load(
        given.to(tl.pointer_type(tl.int32)) + layer,
        mask=given != 0,
        other=tl.load(request + 2).to(tl.int32),
    )


# Compiled once for all steps.
@triton.jit(
    do_not_specialize=["first_layer", "total_rows", "num_splits"],
    do_not_specialize_on_alignment=["maxima", "sums"],
)
def statistics_of_step_kernel(
    query,  # [num_layers, >= queries, num_heads, HEAD_SIZE], any float type
    layer_stride,  # int, elements from layer to layer of query
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of page 0
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    requests,  # [num_reqs, 16] int64, of _describe
    layers,  # [num_layers, 2] int64, bits: to_base_2 and cap_exponent
    first_layer,  # int, index in the pool of query's first layer
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    maxima,  # [num_splits, num_layers, num_kv_heads, total_rows] float32, output
    sums,  # as maxima, output: sum of exp(logit - maximum); its reciprocal if there is one split
    total_rows,  # int, rows of all requests
    num_splits,  # int
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    BLOCK_SIZE: tl.constexpr,  # tokens of a page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """`statistics_kernel` for some layers of all requests of a step.

    Grid ``(most row tiles * num_splits, num_layers * num_kv_heads, num_reqs)``.
    """
    first_row = tl.program_id(0) // num_splits * ROWS
    split = tl.program_id(0) % num_splits
    layer = tl.program_id(1) // NUM_KV_HEADS
    kv_head = (tl.program_id(1) % NUM_KV_HEADS).to(tl.int64)
    request = requests + tl.program_id(2) * 16
    num_rows = tl.load(request + 1).to(tl.int32)
    if first_row >= num_rows:
        return
    num_keys = _num_keys(request, layer)
    keys_per_split = tl.load(request + 8).to(tl.int32)
    maximum, total = _statistics(
        query + tl.cast(layer, tl.int64) * layer_stride + tl.load(request) * query_stride,
        query_stride,
        query_head_stride,
        key_pages + tl.load(request + 6) * (first_layer + layer) * page_stride,
        tl.load(request + 7) * page_stride,
        head_stride,
        token_stride,
        element_stride,
        tl.load(request + 4).to(tl.pointer_type(tl.int32)) + tl.load(request + 5) * layer,
        num_rows,
        num_keys,
        softcap,
        _float(tl.load(layers + layer * 2 + 1)),
        _float(tl.load(layers + layer * 2)),
        kv_head,
        first_row,
        split * keys_per_split,
        (split + 1) * keys_per_split,
        GROUP,
        HAS_SOFTCAP,
        WIDENS,
        BLOCK_SIZE,
        HEAD_SIZE,
        E,
        ROWS,
        KEYS,
    )
    if num_splits == 1:
        total = 1 / total
    row = first_row + tl.arange(0, ROWS)
    index = tl.cast(split, tl.int64) * tl.num_programs(1) + tl.program_id(1)
    index = index * total_rows + tl.load(request + 9) + row
    tl.store(maxima + index, maximum, mask=row < num_rows)
    tl.store(sums + index, total, mask=row < num_rows)


# Compiled once for all steps.
@triton.jit(
    do_not_specialize=["first_layer", "total_rows"],
    do_not_specialize_on_alignment=["row_maxima", "row_factors"],
)
def columns_of_step_kernel(
    query,  # [num_layers, >= queries, num_heads, HEAD_SIZE], any float type
    layer_stride,  # int, elements from layer to layer of query
    query_stride,  # int, elements from query to query
    query_head_stride,  # int, elements from query head to query head
    key_pages,  # any element type, begins with the first key of page 0
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    token_stride,  # int, elements from token to token of a page
    element_stride,  # int, elements from one element of a key to the next
    requests,  # [num_reqs, 16] int64, of _describe
    layers,  # [num_layers, 2] int64, bits: to_base_2 and cap_exponent
    first_layer,  # int, index in the pool of query's first layer
    softcap,  # float, bound of the logits; not used without HAS_SOFTCAP
    row_maxima,  # [num_layers, num_kv_heads, total_rows] float32, largest logit
    row_factors,  # as row_maxima, 1 / sum of exp(logit - maximum)
    total_rows,  # int, rows of all requests
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    HAS_SOFTCAP: tl.constexpr,  # bool
    WIDENS: tl.constexpr,  # bool, convert to float32 before the product
    IS_LAST: tl.constexpr,  # bool, some request sums its last queries only
    HAS_MAXIMA: tl.constexpr,  # bool, some request has maxima
    BLOCK_SIZE: tl.constexpr,  # tokens of a page
    HEAD_SIZE: tl.constexpr,  # elements of a query or key
    E: tl.constexpr,  # HEAD_SIZE rounded up to a power of 2, at least 16
    ROWS: tl.constexpr,  # rows of a tile
    KEYS: tl.constexpr,  # keys of a tile
):
    """`columns_kernel` for some layers of all requests of a step.

    Grid ``(most key tiles, num_layers * num_kv_heads, num_reqs)``.
    """
    first_key = tl.program_id(0) * KEYS
    layer = tl.program_id(1) // NUM_KV_HEADS
    kv_head = (tl.program_id(1) % NUM_KV_HEADS).to(tl.int64)
    request = requests + tl.program_id(2) * 16
    num_rows = tl.load(request + 1).to(tl.int32)
    num_keys = _num_keys(request, layer)
    if first_key >= num_keys:
        return
    of_rows = tl.program_id(1).to(tl.int64) * total_rows + tl.load(request + 9)
    of_columns = tl.program_id(1) * tl.load(request + 10)
    maxima = tl.load(request + 12)
    _columns(
        query + tl.cast(layer, tl.int64) * layer_stride + tl.load(request) * query_stride,
        query_stride,
        query_head_stride,
        key_pages + tl.load(request + 6) * (first_layer + layer) * page_stride,
        tl.load(request + 7) * page_stride,
        head_stride,
        token_stride,
        element_stride,
        tl.load(request + 4).to(tl.pointer_type(tl.int32)) + tl.load(request + 5) * layer,
        num_rows,
        num_keys,
        softcap,
        _float(tl.load(layers + layer * 2 + 1)),
        _float(tl.load(layers + layer * 2)),
        kv_head,
        first_key,
        row_maxima + of_rows,
        row_factors + of_rows,
        _float(tl.load(request + 14)) / _float(tl.load(layers + layer * 2)),
        row_maxima,
        tl.load(request + 15).to(tl.int32),
        tl.load(request + 11).to(tl.pointer_type(tl.float32)) + of_columns,
        maxima.to(tl.pointer_type(tl.float32)) + of_columns,
        tl.where(maxima != 0, num_keys, 0),
        tl.load(request + 13).to(tl.pointer_type(tl.int64)) + layer,
        GROUP,
        HAS_SOFTCAP,
        WIDENS,
        False,
        IS_LAST,
        HAS_MAXIMA,
        BLOCK_SIZE,
        HEAD_SIZE,
        E,
        ROWS,
        KEYS,
    )


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Number of programs that keep a device busy."""
    if device.type != "cuda":
        return 16  # interpreter: more than one, so that tests combine splits
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


def _constants(
    group: int, softcap: float, block_size: int, head_size: int, rows: int
) -> dict[str, Any]:
    """Constants of the kernels of both passes, which a server has few of."""
    return {
        "GROUP": group,
        "HAS_SOFTCAP": softcap > 0,
        # The interpreter multiplies the bit patterns of bfloat16 as integers.
        "WIDENS": triton.knobs.runtime.interpret,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "E": max(16, triton.next_power_of_2(head_size)),
        "ROWS": rows,
        "KEYS": KEYS,
    }


def _tile_rows(num_rows: int, head_size: int) -> int:
    """Rows of a tile."""
    return FEW_ROWS if num_rows <= FEW_ROWS or head_size > MAX_HEAD_SIZE else ROWS


def _exponents(scale: float, softcap: float) -> tuple[float, float]:
    """``to_base_2`` and ``cap_exponent`` of a layer with a softmax scale and a soft cap.

    The kernels' logits are capped and in their own unit, or not yet scaled.
    """
    if softcap > 0:
        return math.log2(math.e), 2 * scale * math.log2(math.e) / softcap
    return scale * math.log2(math.e), 0.0


def _column_options(constants: dict[str, Any], has_maxima: bool) -> dict[str, Any]:
    """How the second pass is compiled, so that three programs fit on an SM where they can."""
    # Others would spill, or their tiles take so much shared memory that no third program fits.
    is_small = constants["E"] <= 128 and not constants["HAS_SOFTCAP"] and not has_maxima
    return {"num_stages": 2, "maxnreg": MAX_REGISTERS if is_small else None}


def _combine(
    of_splits: torch.Tensor,
    to_base_2: float,
    layers: torch.Tensor | None = None,
    rows_per_layer: int = 1,
) -> torch.Tensor:
    """Maxima and factors of all rows, float32 ``[2, ...]``, from those of the splits.

    Args:
        of_splits: maxima and sums, float32 ``[2, num_splits, ...]``.
        to_base_2: factor of the logits.
        layers: of `observe_layers`, if the rows are those of several layers, int64.
        rows_per_layer: rows of a layer; not used without ``layers``.
    """
    of_rows = torch.empty_like(of_splits[:, 0])
    num_rows = of_rows[0].numel()
    combine_kernel[(triton.cdiv(num_rows, ROWS),)](
        of_splits[0],
        of_splits[1],
        num_rows,
        of_splits.shape[1],
        to_base_2,
        of_splits if layers is None else layers,
        rows_per_layer,
        of_rows[0],
        of_rows[1],
        OF_LAYERS=layers is not None,
        SPLITS=SPLITS,
        ROWS=ROWS,
    )
    return of_rows


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
    rows = _tile_rows(num_rows, head_size)
    row_tiles = triton.cdiv(num_rows, rows)
    key_tiles = triton.cdiv(most_keys, KEYS)
    num_splits = triton.cdiv(_num_programs(query.device), row_tiles * num_kv_heads)
    tiles_per_split = triton.cdiv(key_tiles, min(num_splits, key_tiles))
    num_splits = triton.cdiv(key_tiles, tiles_per_split)
    assert query.stride(2) == 1 and column_sums.stride(1) == 1
    to_base_2, cap_exponent = _exponents(params.scale, params.softcap)
    margin = math.log2(params.threshold) / to_base_2
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
        params.softcap,
        cap_exponent,
        to_base_2,
    )
    constants = {
        "HAS_NUM_KEYS": num_keys is not None,
        **_constants(group, params.softcap, keys.block_size, head_size, rows),
    }
    of_splits = torch.empty(2, num_splits, num_kv_heads, num_rows, device=query.device)
    statistics_kernel[row_tiles, num_splits, num_kv_heads](
        *inputs, of_splits[0], of_splits[1], tiles_per_split * KEYS, **constants
    )
    of_rows = of_splits[:, 0]
    if num_splits > 1:
        of_rows = _combine(of_splits, to_base_2)
    # Without weights or maxima any tensor will do, since the kernel does not read it.
    maxima_of_columns = column_sums if column_maxima is None else column_maxima
    assert maxima_of_columns.stride(1) == 1
    weights = dense_entries if query_weights is None else query_weights.float().contiguous()
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
        **_column_options(constants, column_maxima is not None),
        **constants,
    )


def _bits(value: float) -> int:
    """The bits of a float32, which `_float` turns back."""
    return int(struct.unpack("i", struct.pack("f", value))[0])


def _describe(
    request: RequestObservation, pool: PagePool, group: int, keys_per_split: int, first_row: int
) -> list[int]:
    """A request as the kernels of a step read it, 16 integers.

    Args:
        request: of the step.
        pool: of its keys.
        group: query heads per KV head.
        keys_per_split: keys of each split of the statistics.
        first_row: index of its first row among the rows of all requests.
    """
    sums, maxima, table = request.column_sums, request.column_maxima, request.table
    by_layer = table.dim() == 2  # page ids; otherwise ids of blocks
    assert table.dtype == torch.int32 and table.stride(-1) == 1
    assert sums.is_contiguous() and (maxima is None or maxima.is_contiguous())
    if request.num_keys is not None:
        assert request.num_keys.dtype == torch.int32 and request.num_keys.is_contiguous()
    return [
        request.first_query,
        request.num_queries * group,  # 1: rows
        request.most_keys,
        0 if request.num_keys is None else request.num_keys.data_ptr(),  # 3
        table.data_ptr(),
        table.stride(0) if by_layer else 0,  # 5: entries from layer to layer
        0 if by_layer else pool.layer_stride,  # 6: pages from layer to layer
        1 if by_layer else pool.block_stride,  # 7: pages from entry 0 to entry 1
        keys_per_split,
        first_row,  # 9
        sums.stride(1),
        sums.data_ptr(),  # 11
        0 if maxima is None else maxima.data_ptr(),
        request.dense_entries.data_ptr(),  # 13
        _bits(math.log2(request.threshold)),
        request.first_summed or 0,  # 15
    ]


def observe_layers(
    query: torch.Tensor,
    pool: PagePool,
    scales: Sequence[float],
    softcap: float,
    requests: Sequence[RequestObservation],
    first_layer: int = 0,
) -> None:
    """Observe some layers of all requests; arguments as for the operation.

    Two launches, or three if few rows leave room for splits. Integers and addresses of the
    requests go to the device in one copy.

    Raises:
        ValueError: if the tokens of a page have no regular strides, which every GPU cache has, or
            if a softmax scale is not positive.
    """
    if min(scales) <= 0:
        raise ValueError(f"softmax scales must be positive, not {min(scales)}")
    num_layers, _, num_heads, head_size = query.shape
    num_kv_heads = pool.num_kv_heads
    group = num_heads // num_kv_heads
    num_rows = [request.num_queries * group for request in requests]
    rows = _tile_rows(max(num_rows), head_size)
    row_tiles = [triton.cdiv(number, rows) for number in num_rows]
    key_tiles = [triton.cdiv(request.most_keys, KEYS) for request in requests]
    num_splits = triton.cdiv(
        _num_programs(query.device), sum(row_tiles) * num_layers * num_kv_heads
    )
    num_splits = min(num_splits, max(key_tiles))
    table: list[int] = []
    first_row = 0
    for request, tiles, number in zip(requests, key_tiles, num_rows, strict=True):
        keys_per_split = triton.cdiv(tiles, num_splits) * KEYS
        table += _describe(request, pool, group, keys_per_split, first_row)
        first_row += number
    total_rows, end = first_row, len(table)
    for scale in scales:
        table += map(_bits, _exponents(scale, softcap))
    numbers = to_device(table, query.device)
    keys = _KeyTable.of(PagedKeys(pool, requests[0].table))
    assert query.stride(3) == 1
    inputs = (
        query,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        keys.key_pages,
        keys.entry_stride,
        keys.head_stride,
        keys.token_stride,
        keys.element_stride,
        numbers[:end],
        numbers[end:],
        first_layer,
        softcap,
    )
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        **_constants(group, softcap, keys.block_size, head_size, rows),
    }
    heads = num_layers * num_kv_heads
    of_splits = torch.empty(2, num_splits, heads, total_rows, device=query.device)
    statistics_of_step_kernel[max(row_tiles) * num_splits, heads, len(requests)](
        *inputs, of_splits[0], of_splits[1], total_rows, num_splits, **constants
    )
    of_rows = of_splits[:, 0]
    if num_splits > 1:
        of_rows = _combine(of_splits, 0.0, numbers[end:], num_kv_heads * total_rows)
    has_maxima = any(request.column_maxima is not None for request in requests)
    columns_of_step_kernel[max(key_tiles), heads, len(requests)](
        *inputs,
        of_rows[0],
        of_rows[1],
        total_rows,
        IS_LAST=any(request.first_summed is not None for request in requests),
        HAS_MAXIMA=has_maxima,
        **_column_options(constants, has_maxima),
        **constants,
    )
