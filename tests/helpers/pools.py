# SPDX-License-Identifier: Apache-2.0
"""Small page pools in every page order and packing, and naive access to their cells."""

import torch

from vl_cache_vllm.ops.page_pool import PagePacking, PagePool

PAGE_ORDERS = ("layer-outermost", "block-outermost")
PACKINGS = ("side-by-side", "interleaved", "transposed-k", "random")
CPU_PACKINGS = ("side-by-side", "transposed-k", "random")


def strides(page_order: str, num_layers: int, num_blocks: int) -> tuple[int, int]:
    """(layer_stride, block_stride) in pages, as KVCacheTensor gives them."""
    if page_order == "layer-outermost":
        return num_blocks, 1
    return 1, num_layers


def make_packing(kind: str, block_size: int, head_size: int, num_kv_heads: int) -> PagePacking:
    """Element offsets of K and V from a head's first cell.

    GPU caches have K and V of a token side by side, and behind them those of the head's next token
    ("side-by-side") or of the token's next head ("interleaved"). CPU caches have a head's cells in
    any order.
    """
    if kind in ("side-by-side", "interleaved"):
        token_stride = 2 * head_size * (num_kv_heads if kind == "interleaved" else 1)
        return PagePacking.side_by_side(block_size, head_size, token_stride)
    cells = block_size * head_size
    offsets = torch.arange(2 * cells)
    if kind == "random":
        offsets = offsets[torch.randperm(2 * cells, generator=torch.Generator().manual_seed(7))]
    keys, values = offsets[:cells], offsets[cells:]
    if kind == "transposed-k":
        keys = keys.view(head_size, block_size).T.contiguous()
    return PagePacking(keys.view(block_size, head_size), values.view(block_size, head_size))


def make_pool(
    page_order: str = "layer-outermost",
    packing: str = "side-by-side",
    *,
    num_layers: int = 3,
    num_blocks: int = 11,
    num_kv_heads: int = 2,
    block_size: int = 5,
    head_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagePool:
    """A pool full of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers * num_blocks, num_kv_heads, block_size * 2 * head_size)
    pages = torch.randn(shape, generator=generator).to(dtype)
    if packing == "interleaved":
        last_token = (block_size - 1) * num_kv_heads * 2 * head_size
        pages = pages.as_strided(
            (*shape[:2], last_token + 2 * head_size), (pages.stride(0), 2 * head_size, 1)
        )
    layer_stride, block_stride = strides(page_order, num_layers, num_blocks)
    return PagePool(
        pages,
        make_packing(packing, block_size, head_size, num_kv_heads),
        num_layers,
        layer_stride,
        block_stride,
    )


def pool_of_keys(keys: torch.Tensor, block_size: int) -> tuple[PagePool, torch.Tensor]:
    """A pool with such keys, ``[L, K, tokens, D]``, whole blocks, and the row of their blocks."""
    num_layers, num_kv_heads, tokens, head_size = keys.shape
    num_blocks = tokens // block_size
    pool = make_pool(
        num_layers=num_layers,
        num_blocks=2 * num_blocks,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_size=head_size,
        dtype=keys.dtype,
    )
    row = torch.arange(2 * num_blocks)[1::2].flip(0)
    for layer in range(num_layers):
        blocks = keys[layer].unflatten(1, (num_blocks, block_size)).transpose(0, 1)
        pool.packing.key.pack(pool.pages, pool.page_ids(layer, row), blocks)
    return pool, row


def page_number(pool: PagePool, layer: int, block: int) -> int:
    return layer * pool.layer_stride + block * pool.block_stride


def key_of(pool: PagePool, page: int, head: int, token: int) -> torch.Tensor:
    """One token's key, ``[head_size]``, cell by cell."""
    return torch.stack([pool.pages[page, head, i] for i in pool.packing.key_index[token].tolist()])


def value_of(pool: PagePool, page: int, head: int, token: int) -> torch.Tensor:
    """One token's value, ``[head_size]``, cell by cell."""
    cells = pool.packing.value_index[token].tolist()
    return torch.stack([pool.pages[page, head, i] for i in cells])
