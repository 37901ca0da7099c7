# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.compact.compact` in one launch, a program per destination page and KV head."""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.page_pool import PagePool


# One compilation serves all prompts.
@triton.jit(
    do_not_specialize=["max_kept", "layer_stride", "block_stride"],
    do_not_specialize_on_alignment=["prompt_row", "kept_row"],
)
def compact_kernel(
    pages,
    page_stride,
    head_stride,
    prompt_row,
    kept_row,
    kept_pages,
    positions,
    max_kept,
    num_layers,
    layer_stride,
    block_stride,
    block_size,
    head_size,
    key_offset,
    key_token_stride,
    key_element_stride,
    value_offset,
    value_token_stride,
    value_element_stride,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Grid ``(pages of the deal, num_kv_heads)``."""
    deal = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    layers = tl.arange(0, LAYERS)
    exists = layers < num_layers
    pages_of = tl.load(kept_pages + layers, mask=exists, other=0)
    ends = tl.cumsum(pages_of, 0)
    layer = tl.sum((exists & (ends <= deal)).to(tl.int64))
    page = deal - tl.sum(tl.where(layers < layer, pages_of, 0))  # of this layer's

    token = tl.arange(0, TOKENS)
    used = token < block_size
    row = positions + (layer * tl.num_programs(1) + head) * max_kept
    position = tl.load(row + page * block_size + token, mask=used, other=0)
    block = tl.load(prompt_row + position // block_size, mask=used, other=0)
    source = (layer * layer_stride + block * block_stride) * page_stride  # [TOKENS]
    block = tl.load(kept_row + deal // num_layers)
    destination = (deal % num_layers * layer_stride + block * block_stride) * page_stride

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
    prompt_row: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """See the operation.

    Raises:
        ValueError: if tokens do not lie at regular strides in a page, as they do on every GPU.
    """
    num_kv_heads, head_size = pool.num_kv_heads, pool.packing.key_index.shape[1]
    page_stride, head_stride, _ = pool.pages.stride()
    compact_kernel[kept_row.shape[0] * pool.num_layers, num_kv_heads](
        pool.pages,
        page_stride,
        head_stride,
        prompt_row.contiguous(),
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
