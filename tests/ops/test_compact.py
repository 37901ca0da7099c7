# SPDX-License-Identifier: Apache-2.0
"""Compaction against a token-by-token copy, and against the tables that read the result."""

import pytest
import torch

from tests.helpers.pools import PAGE_ORDERS, key_of, make_pool, page_number, value_of
from vl_cache_vllm.ops.compact import compact
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
    positions = torch.zeros(len(kept_pages), num_kv_heads, max_kept, dtype=torch.int64)
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

    compact(pool, prompt_row, kept_row, torch.tensor(kept_pages), positions)

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
    num_layers, num_kv_heads, block_size, prompt_tokens = len(kept_pages), 2, 4, 26
    num_kept, prompt_blocks = sum(kept_pages) // num_layers, 7
    pool = make_pool(
        page_order, packing, num_layers=num_layers, num_blocks=20, block_size=block_size
    )
    blocks = torch.randperm(20, generator=torch.Generator().manual_seed(6))
    row = blocks[: prompt_blocks + num_kept + 1]
    positions = random_positions(kept_pages, num_kv_heads, block_size, prompt_tokens)
    keys, values = (
        torch.stack([read(layer, row[:prompt_blocks]) for layer in range(num_layers)])
        for read in (pool.read_keys, pool.read_values)
    )

    compact(pool, row[:prompt_blocks], row[prompt_blocks:-1], torch.tensor(kept_pages), positions)

    width = max(kept_pages) + 1
    out = LayerTables(
        torch.zeros(num_layers, 1, width, dtype=torch.int32),
        torch.zeros(num_layers, 1, dtype=torch.int32),
        torch.zeros(num_layers, 1, dtype=torch.int64),
    )
    layer_tables(
        pool,
        EvictedRows(
            torch.tensor([prompt_tokens]),
            torch.tensor([prompt_blocks]),
            torch.tensor([num_kept]),
            torch.tensor([kept_pages]),
        ),
        row[None].int(),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([prompt_tokens + 1], dtype=torch.int32),
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
