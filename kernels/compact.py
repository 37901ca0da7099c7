# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.compact.compact_all` as one launch.

A program fills one KV head of one destination page.

L layers, C source pages of each, M kept blocks.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.compact import Move
from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.ops.page_pool import PagePool


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=["layer_stride", "block_stride"],
    do_not_specialize_on_alignment=["moves"],
)
def compact_kernel(
    pages,  # [num_pages, num_kv_heads, cells of one head], the pool, any element type
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    moves,  # [requests, 8] int64, of _describe
    num_layers,  # int, L
    layer_stride,  # int, pages from layer to layer
    block_stride,  # int, pages from block to block
    block_size,  # int, tokens of a page
    head_size,  # int, elements of a key
    key_offset,  # int, elements from the start of a head's cells to its first key
    key_token_stride,  # int, elements from token to token
    key_element_stride,  # int, elements from one element of a key to the next
    value_offset,  # int, as key_offset
    value_token_stride,  # int, as key_token_stride
    value_element_stride,  # int, as key_element_stride
    LAYERS: tl.constexpr,  # L rounded up to a power of 2
    TOKENS: tl.constexpr,  # block_size rounded up to a power of 2
    ELEMENTS: tl.constexpr,  # head_size rounded up to a power of 2
):
    """Fill one KV head of one destination page. Grid ``(most pages, num_kv_heads, requests)``.

    Of each request there are page ids of its source, int32 ``[L, C]``, block ids of its kept
    blocks, int64 ``[M]``, the pages of each layer, int64 ``[L]``, and positions in the source of
    some layers, int32 ``[n, num_kv_heads, max_kept]``.

    A program fills the page with index f among the request's kept pages, which is page ``f % L`` of
    kept block ``f // L``. The first program has the first page of the first moved layer. A page
    belongs to the layer whose range contains f. For example, with 3 layers and kept pages 4, 1
    and 1::

        f        0  1  2  3  4  5
        layer    0  0  0  0  1  2     number of layers whose range ends at or before f
        page     0  1  2  3  0  0     f minus the pages of the layers before
    """
    move = moves + tl.program_id(2) * 8
    head = tl.program_id(1).to(tl.int64)
    first_layer = tl.load(move)
    kept_pages = tl.load(move + 6).to(tl.pointer_type(tl.int64))
    layers = tl.arange(0, LAYERS)
    exists = layers < num_layers
    pages_of = tl.load(kept_pages + layers, mask=exists, other=0)
    page_index = tl.sum(tl.where(layers < first_layer, pages_of, 0)) + tl.program_id(0)  # f
    ends = tl.cumsum(pages_of, 0)
    layer = tl.sum((exists & (ends <= page_index)).to(tl.int64))
    moved = layer - first_layer  # index of the layer in the positions
    if moved >= tl.load(move + 1):
        return
    page = page_index - tl.sum(tl.where(layers < layer, pages_of, 0))

    token = tl.arange(0, TOKENS)
    used = token < block_size
    row = tl.load(move + 7).to(tl.pointer_type(tl.int32))
    row += (moved * tl.num_programs(1) + head) * tl.load(move + 2)
    position = tl.load(row + page * block_size + token, mask=used, other=0)  # [TOKENS]
    of_layer = tl.load(move + 4).to(tl.pointer_type(tl.int32)) + layer * tl.load(move + 3)
    page_id = tl.load(of_layer + position // block_size, mask=used, other=0).to(tl.int64)
    source = page_id * page_stride  # [TOKENS]
    kept_row = tl.load(move + 5).to(tl.pointer_type(tl.int64))
    block = tl.load(kept_row + page_index // num_layers)
    destination = (page_index % num_layers * layer_stride + block * block_stride) * page_stride

    element = tl.arange(0, ELEMENTS)
    wanted = used[:, None] & (element < head_size)[None, :]
    from_page = pages + head * head_stride + source[:, None]
    to_page = pages + head * head_stride + destination
    from_token, to_token = (position % block_size)[:, None], token[:, None]
    cell = key_offset + element[None, :] * key_element_stride
    key = tl.load(from_page + cell + from_token * key_token_stride, mask=wanted)
    tl.store(to_page + cell + to_token * key_token_stride, key, mask=wanted)
    cell = value_offset + element[None, :] * value_element_stride
    value = tl.load(from_page + cell + from_token * value_token_stride, mask=wanted)
    tl.store(to_page + cell + to_token * value_token_stride, value, mask=wanted)


def _describe(move: Move) -> tuple[list[int], list[torch.Tensor]]:
    """A move as the kernel reads it, 8 integers, and the tensors that these point to."""
    assert move.source_pages.stride(1) == 1 and move.source_pages.dtype == torch.int32
    tensors = [
        move.source_pages,
        move.kept_row.long().contiguous(),
        move.kept_pages.long().contiguous(),
        move.positions.int().contiguous(),
    ]
    assert all(tensor.device == move.positions.device for tensor in tensors)
    numbers = [
        move.first_layer,
        len(move.positions),  # 1
        move.positions.shape[2],
        move.source_pages.stride(0),  # 3
    ]
    return numbers + [tensor.data_ptr() for tensor in tensors], tensors  # from 4 on


def compact_all(pool: PagePool, moves: Sequence[Move]) -> None:
    """Copy the kept tokens into the kept blocks; arguments as for the operation.

    Grid ``(most pages, num_kv_heads, requests)``: a program fills one KV head of one destination
    page. Its size depends on shapes alone; each program finds its layer from ``kept_pages`` on the
    device, and ends if that is no layer of the move. Integers and addresses go to the device in
    one copy.

    Raises:
        ValueError: if the tokens of a page have no regular strides. Every GPU cache has them.
    """
    num_kv_heads, head_size = pool.num_kv_heads, pool.packing.key_index.shape[1]
    page_stride, head_stride, _ = pool.pages.stride()
    described = [_describe(move) for move in moves]
    num_pages = max(
        min(
            len(move.kept_row) * pool.num_layers,
            len(move.positions) * (move.positions.shape[2] // pool.block_size),
        )
        for move in moves
    )
    compact_kernel[num_pages, num_kv_heads, len(moves)](
        pool.pages,
        page_stride,
        head_stride,
        to_device([number for numbers, _ in described for number in numbers], pool.device),
        pool.num_layers,
        pool.layer_stride,
        pool.block_stride,
        pool.block_size,
        head_size,
        *pool.packing.key.regular_strides(),
        *pool.packing.value.regular_strides(),
        LAYERS=triton.next_power_of_2(pool.num_layers),
        TOKENS=triton.next_power_of_2(pool.block_size),
        ELEMENTS=triton.next_power_of_2(head_size),
    )


def compact(
    pool: PagePool,
    source_pages: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
    first_layer: int = 0,
) -> None:
    """`compact_all` for one request; arguments as for the operation."""
    compact_all(pool, [Move(source_pages, kept_row, kept_pages, positions, first_layer)])
