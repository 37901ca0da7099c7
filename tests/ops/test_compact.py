# SPDX-License-Identifier: Apache-2.0
"""Compaction against a token-by-token copy, and against the tables that read the result."""

import pytest
import torch

from tests.helpers.pools import PAGE_ORDERS, key_of, make_pool, page_number, value_of
from vl_cache_vllm.ops.compact import Move, compact, compact_all
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
# Pages per layer, summing to a multiple of the number of layers; M is that multiple.
DISTRIBUTIONS = pytest.mark.parametrize(
    "kept_pages",
    [(1, 1, 1), (4, 1, 1), (1, 1, 4), (1, 5, 3), (3, 3, 3), (6,), (1, 2, 3, 4, 5)],
    ids=lambda pages: "-".join(map(str, pages)),
)


def random_positions(
    kept_pages: tuple[int, ...], num_kv_heads: int, block_size: int, prompt_tokens: int
) -> torch.Tensor:
    """Kept positions as `select` returns them; meaningless beyond a layer's budget."""
    generator = torch.Generator().manual_seed(3)
    max_kept = max(kept_pages) * block_size
    positions = torch.zeros(len(kept_pages), num_kv_heads, max_kept, dtype=torch.int32)
    for layer, pages in enumerate(kept_pages):
        for head in range(num_kv_heads):
            chosen = torch.randperm(prompt_tokens, generator=generator)
            kept = pages * block_size
            positions[layer, head] = chosen[:max_kept]
            positions[layer, head, :kept] = chosen[:kept].sort().values
    return positions


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@DISTRIBUTIONS
@DTYPES
def test_equals_copying_token_by_token(
    page_order: str, packing: str, kept_pages: tuple[int, ...], dtype: torch.dtype
) -> None:
    num_layers, num_kv_heads, block_size = len(kept_pages), 3, 3
    num_kept = sum(kept_pages) // num_layers
    layout = {
        "num_layers": num_layers,
        "num_blocks": 23,
        "num_kv_heads": num_kv_heads,
        "block_size": block_size,
        "head_size": 4,
        "dtype": dtype,
    }
    pool, before = (make_pool(page_order, packing, **layout) for _ in range(2))  # type: ignore[arg-type]
    blocks = torch.randperm(23, generator=torch.Generator().manual_seed(5))
    prompt_row, kept_row = blocks[:7], blocks[7 : 7 + num_kept]
    positions = random_positions(kept_pages, num_kv_heads, block_size, prompt_tokens=20)

    compact(pool, pool.block_pages(prompt_row), kept_row, torch.tensor(kept_pages), positions)

    page_index = 0  # page f of the kept pages is page f % L of block f // L
    written = set()
    for layer, pages in enumerate(kept_pages):
        for page_in_layer in range(pages):
            block = int(kept_row[page_index // num_layers])
            destination = page_number(pool, page_index % num_layers, block)
            written.add(destination)
            page_index += 1
            for head in range(num_kv_heads):
                for token in range(block_size):
                    position = int(positions[layer, head, page_in_layer * block_size + token])
                    source = page_number(pool, layer, int(prompt_row[position // block_size]))
                    cell = source, head, position % block_size
                    assert torch.equal(
                        key_of(pool, destination, head, token), key_of(before, *cell)
                    )
                    assert torch.equal(
                        value_of(pool, destination, head, token), value_of(before, *cell)
                    )
    others = [page for page in range(len(pool.pages)) if page not in written]
    assert torch.equal(pool.pages[others], before.pages[others])


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@DISTRIBUTIONS
def test_layer_tables_find_the_survivors(
    page_order: str, packing: str, kept_pages: tuple[int, ...]
) -> None:
    """What compaction writes is what attention reads through the tables of the next step."""
    num_layers, num_kv_heads, block_size, evicted_tokens = len(kept_pages), 2, 4, 28
    num_kept, prompt_blocks = sum(kept_pages) // num_layers, 7
    pool = make_pool(
        page_order, packing, num_layers=num_layers, num_blocks=20, block_size=block_size
    )
    blocks = torch.randperm(20, generator=torch.Generator().manual_seed(6))
    row, kept_row = blocks[: prompt_blocks + 1], blocks[prompt_blocks + 1 :][:num_kept]
    positions = random_positions(kept_pages, num_kv_heads, block_size, evicted_tokens)
    source = pool.block_pages(row[:prompt_blocks])
    keys, values = (
        torch.stack([read(source[layer]) for layer in range(num_layers)])
        for read in (pool.read_keys, pool.read_values)
    )

    compact(pool, source, kept_row, torch.tensor(kept_pages), positions)

    width = max(kept_pages) + 1
    out = LayerTables(
        torch.zeros(num_layers, 1, width, dtype=torch.int32),
        torch.zeros(num_layers, 1, dtype=torch.int32),
        torch.zeros(num_layers, 1, dtype=torch.int64),
    )
    layer_tables(
        pool,
        EvictedRows(torch.tensor([evicted_tokens]), kept_row[None], torch.tensor([kept_pages])),
        row[None].int(),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([evicted_tokens + 1], dtype=torch.int32),
        out,
    )
    for layer, pages in enumerate(kept_pages):
        assert out.seq_lens[layer, 0] == pages * block_size + 1
        for head in range(num_kv_heads):
            for kept, position in enumerate(positions[layer, head, : pages * block_size].tolist()):
                page = int(out.block_table[layer, 0, kept // block_size])
                token = kept % block_size
                assert torch.equal(key_of(pool, page, head, token), keys[layer, head, position])
                assert torch.equal(value_of(pool, page, head, token), values[layer, head, position])


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_layers_may_have_other_pages(page_order: str, packing: str) -> None:
    """Where a request was evicted before, the pages of its layers belong to different blocks."""
    pool, before = (
        make_pool(page_order, packing, num_layers=3, num_blocks=12, block_size=4) for _ in range(2)
    )
    table = torch.randperm(27, generator=torch.Generator().manual_seed(4)).view(3, 9).int()
    free = pool.block_pages(torch.arange(9, 11)).flatten()
    if page_order == "block-outermost":  # pages 27 to 32 are those of the blocks 9 and 10
        assert free.min() == 27
    else:  # let no source be a destination
        table = torch.where(torch.isin(table, free), torch.tensor(11, dtype=torch.int32), table)
    wide = torch.zeros(3, 2, 9, dtype=torch.int32)
    wide[:, 1] = table  # rows of a step's tables are not contiguous
    kept_pages = (2, 1, 3)
    positions = random_positions(kept_pages, 2, 4, prompt_tokens=36)

    compact(pool, wide[:, 1], torch.tensor([9, 10]), torch.tensor(kept_pages), positions)

    page_index = 0
    for layer, pages in enumerate(kept_pages):
        for token in range(pages * 4):
            f = page_index + token // 4
            page = page_number(pool, f % 3, 9 + f // 3)
            for head in range(2):
                position = int(positions[layer, head, token])
                source = int(table[layer, position // 4])
                for read in (key_of, value_of):
                    expected = read(before, source, head, position % 4)
                    assert torch.equal(read(pool, page, head, token % 4), expected)
        page_index += pages


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_layers_of_several_requests_move_together(page_order: str, packing: str, cut: int) -> None:
    """Two requests, of which one is moved a few layers at a time."""
    layout = {
        "num_layers": 5,
        "num_blocks": 31,
        "num_kv_heads": 2,
        "block_size": 4,
        "head_size": 8,
        "dtype": torch.float32,
    }
    pool, expected = (make_pool(page_order, packing, **layout) for _ in range(2))  # type: ignore[arg-type]
    blocks = torch.randperm(31, generator=torch.Generator().manual_seed(5))
    requests = [
        (blocks[:6], blocks[6:9], (1, 2, 3, 4, 5)),
        (blocks[9:17], blocks[17:19], (6, 1, 1, 1, 1)),
    ]
    moves = []
    for prompt_row, kept_row, kept_pages in requests:
        positions = random_positions(kept_pages, 2, 4, prompt_tokens=4 * len(prompt_row))
        pages = pool.block_pages(prompt_row), kept_row, torch.tensor(kept_pages)
        compact(expected, *pages, positions)
        moves.append((pages, positions))
    (first, of_first), (second, of_second) = moves
    compact_all(pool, [Move(*first, of_first), Move(*second, of_second[:cut])])
    compact_all(pool, [Move(*second, of_second[cut:], cut)])
    assert torch.equal(pool.pages, expected.pages)
