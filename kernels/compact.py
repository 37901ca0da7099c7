# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.compact.compact` as one launch, a program per destination page and KV head.

L layers, C source pages of each, M kept blocks.
"""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.page_pool import PagePool


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=["source_stride", "max_kept", "layer_stride", "block_stride"],
    do_not_specialize_on_alignment=["source_pages", "kept_row"],
)
def compact_kernel(
    pages,  # [num_pages, num_kv_heads, cells of one head], the pool, any element type
    page_stride,  # int, elements from page to page
    head_stride,  # int, elements from KV head to KV head
    source_pages,  # [L, C] int32, page ids of each layer in the order of its tokens
    source_stride,  # int, elements from layer to layer of source_pages
    kept_row,  # [M] int64, block ids of the destination
    kept_pages,  # [L] int64, pages of each layer
    positions,  # [L, num_kv_heads, max_kept] int32, indices in the layer's source pages
    max_kept,  # int, tokens
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
    """Fill one KV head of one destination page. Grid ``(M * L, num_kv_heads)``.

    Program ``(f, head)`` fills the page with index f among the request's kept pages, which is page
    ``f % L`` of kept block ``f // L``. The page belongs to the layer whose range contains f. For
    example, with 3 layers and kept pages 4, 1 and 1::

        f        0  1  2  3  4  5
        layer    0  0  0  0  1  2     number of layers whose range ends at or before f
        page     0  1  2  3  0  0     f minus the pages of the layers before
    """
    page_index = tl.program_id(0).to(tl.int64)  # f
    head = tl.program_id(1).to(tl.int64)
    layers = tl.arange(0, LAYERS)
    exists = layers < num_layers
    pages_of = tl.load(kept_pages + layers, mask=exists, other=0)
    ends = tl.cumsum(pages_of, 0)
    layer = tl.sum((exists & (ends <= page_index)).to(tl.int64))
    page = page_index - tl.sum(tl.where(layers < layer, pages_of, 0))

    token = tl.arange(0, TOKENS)
    used = token < block_size
    row = positions + (layer * tl.num_programs(1) + head) * max_kept
    position = tl.load(row + page * block_size + token, mask=used, other=0)  # [TOKENS]
    of_layer = source_pages + layer * source_stride
    page_id = tl.load(of_layer + position // block_size, mask=used, other=0).to(tl.int64)
    source = page_id * page_stride  # [TOKENS]
    block = tl.load(kept_row + page_index // num_layers)
    destination = (page_index % num_layers * layer_stride + block * block_stride) * page_stride

    element = tl.arange(0, ELEMENTS)
    moved = used[:, None] & (element < head_size)[None, :]
    from_page = pages + head * head_stride + source[:, None]
    to_page = pages + head * head_stride + destination
    from_token, to_token = (position % block_size)[:, None], token[:, None]
    cell = key_offset + element[None, :] * key_element_stride
    key = tl.load(from_page + cell + from_token * key_token_stride, mask=moved)
    tl.store(to_page + cell + to_token * key_token_stride, key, mask=moved)
    cell = value_offset + element[None, :] * value_element_stride
    value = tl.load(from_page + cell + from_token * value_token_stride, mask=moved)
    tl.store(to_page + cell + to_token * value_token_stride, value, mask=moved)


def compact(
    pool: PagePool,
    source_pages: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Copy the kept tokens into the kept blocks; arguments as for the operation.

    Grid ``(M * L, num_kv_heads)``: a program fills one KV head of one destination page. Its size
    depends on shapes alone; each program finds its layer from ``kept_pages`` on the device.

    Raises:
        ValueError: if the tokens of a page have no regular strides. Every GPU cache has them.
    """
    num_kv_heads, head_size = pool.num_kv_heads, pool.packing.key_index.shape[1]
    assert source_pages.stride(1) == 1
    page_stride, head_stride, _ = pool.pages.stride()
    compact_kernel[kept_row.shape[0] * pool.num_layers, num_kv_heads](
        pool.pages,
        page_stride,
        head_stride,
        source_pages,
        source_pages.stride(0),
        kept_row.contiguous(),
        kept_pages.contiguous(),
        positions.contiguous(),
        positions.shape[2],
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
