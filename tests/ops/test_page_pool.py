# SPDX-License-Identifier: Apache-2.0
"""The page pool against cell-by-cell access."""

from dataclasses import replace

import pytest
import torch

from tests.helpers.pools import (
    CPU_PACKINGS,
    PACKINGS,
    PAGE_ORDERS,
    key_of,
    make_pool,
    page_number,
    value_of,
)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_page_ids_number_every_page_once(page_order: str) -> None:
    pool = make_pool(page_order, num_layers=3, num_blocks=7)
    blocks = torch.arange(7)
    ids = [pool.page_ids(layer, blocks) for layer in range(3)]
    assert sorted(torch.cat(ids).tolist()) == list(range(21))
    layers = torch.arange(3)[:, None]
    assert torch.equal(pool.page_ids(layers, blocks), torch.stack(ids))


def test_page_ids_of_the_documented_orders() -> None:
    layer_outermost = make_pool("layer-outermost", num_layers=3, num_blocks=7)
    block_outermost = make_pool("block-outermost", num_layers=3, num_blocks=7)
    block = torch.tensor(4)
    assert layer_outermost.page_ids(2, block) == 2 * 7 + 4
    assert block_outermost.page_ids(2, block) == 4 * 3 + 2


def test_sizes_come_from_packing_and_pages() -> None:
    pool = make_pool(num_kv_heads=3, block_size=7, head_size=80)
    assert (pool.block_size, pool.num_kv_heads) == (7, 3)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_read_equals_cell_by_cell(page_order: str, packing: str, dtype: torch.dtype) -> None:
    pool = make_pool(page_order, packing, num_kv_heads=3, dtype=dtype)
    row = [9, 0, 4, 4]  # any order; a shared block may even come twice
    for layer in range(pool.num_layers):
        page_ids = pool.block_pages(torch.tensor(row))[layer]
        keys, values = pool.read_keys(page_ids), pool.read_values(page_ids)
        assert keys.shape == values.shape == (3, len(row) * pool.block_size, 8)
        assert keys.dtype == values.dtype == dtype
        for head in range(3):
            for position in range(len(row) * pool.block_size):
                page = page_number(pool, layer, row[position // pool.block_size])
                token = position % pool.block_size
                assert torch.equal(keys[head, position], key_of(pool, page, head, token))
                assert torch.equal(values[head, position], value_of(pool, page, head, token))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_copy_tokens_fills_destinations_and_nothing_else(packing: str, dtype: torch.dtype) -> None:
    pool = make_pool(packing=packing, num_kv_heads=2, block_size=3, num_blocks=10, dtype=dtype)
    before = make_pool(packing=packing, num_kv_heads=2, block_size=3, num_blocks=10, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    destination = torch.tensor([29, 3, 17])
    sources = torch.tensor([p for p in range(30) if p not in destination.tolist()])
    shape = (3, 2, 3)
    source_page = sources[torch.randint(len(sources), shape, generator=generator)]
    source_offset = torch.randint(3, shape, generator=generator)

    pool.copy_tokens(source_page, source_offset, destination)

    for f, page in enumerate(destination.tolist()):
        for head in range(2):
            for token in range(3):
                source = int(source_page[f, head, token]), head, int(source_offset[f, head, token])
                assert torch.equal(key_of(pool, page, head, token), key_of(before, *source))
                assert torch.equal(value_of(pool, page, head, token), value_of(before, *source))
    assert torch.equal(pool.pages[sources], before.pages[sources])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("block_size", "head_size"), [(1, 8), (5, 1), (1, 1), (2, 2)], ids=lambda n: str(n)
)
def test_degenerate_sizes(packing: str, block_size: int, head_size: int) -> None:
    sizes = {"block_size": block_size, "head_size": head_size}
    pool, before = (make_pool(packing=packing, **sizes) for _ in range(2))
    page_ids = pool.block_pages(torch.tensor([3, 1]))[2]
    tokens = [
        (page_number(pool, 2, block), token) for block in (3, 1) for token in range(block_size)
    ]
    keys, values = pool.read_keys(page_ids), pool.read_values(page_ids)
    for head in range(2):
        for position, (page, token) in enumerate(tokens):
            assert torch.equal(keys[head, position], key_of(pool, page, head, token))
            assert torch.equal(values[head, position], value_of(pool, page, head, token))
    last = torch.full((1, 2, block_size), block_size - 1)
    pool.copy_tokens(torch.full_like(last, 7), last, torch.tensor([9]))
    for head in range(2):
        for token in range(block_size):
            source = 7, head, block_size - 1
            assert torch.equal(key_of(pool, 9, head, token), key_of(before, *source))
            assert torch.equal(value_of(pool, 9, head, token), value_of(before, *source))


@pytest.mark.parametrize("packing", CPU_PACKINGS)
def test_pages_may_lie_inside_a_larger_buffer(packing: str) -> None:
    """vLLM's allocation may hold something else before and behind our pages."""
    alone = make_pool(packing=packing)
    buffer = torch.full((alone.pages.numel() + 30,), 99.0)
    inside = buffer[13 : 13 + alone.pages.numel()].view(alone.pages.shape)
    inside.copy_(alone.pages)
    pool = replace(alone, pages=inside)
    page_ids = pool.block_pages(torch.tensor([9, 0, 4]))[1]
    assert torch.equal(pool.read_keys(page_ids), alone.read_keys(page_ids))
    assert torch.equal(pool.read_values(page_ids), alone.read_values(page_ids))
    source_page = torch.tensor([[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]])
    source_offset = torch.tensor([[[4, 3, 2, 1, 0], [0, 0, 2, 2, 1]]])
    for each in (pool, alone):
        each.copy_tokens(source_page, source_offset, torch.tensor([20]))
    assert torch.equal(pool.pages, alone.pages)
    assert (buffer[:13] == 99).all()
    assert (buffer[13 + alone.pages.numel() :] == 99).all()


def test_copy_tokens_writes_through_a_view_of_the_cache() -> None:
    pool = make_pool(num_layers=2, num_blocks=3, num_kv_heads=1, block_size=2, head_size=4)
    cache = pool.pages
    source = torch.zeros(1, 1, 2, dtype=torch.int64)
    pool.copy_tokens(source, torch.tensor([[[0, 1]]]), torch.tensor([5]))
    assert cache.data_ptr() == pool.pages.data_ptr()
    assert torch.equal(cache[5], cache[0])
