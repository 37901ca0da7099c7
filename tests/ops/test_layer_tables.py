# SPDX-License-Identifier: Apache-2.0
"""Per-layer tables against a page-by-page, token-by-token construction."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from tests.conftest import examples
from tests.helpers.pools import PAGE_ORDERS, make_pool, strides
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables
from vl_cache_vllm.ops.page_pool import PagePool

pytestmark = pytest.mark.usefixtures("implementation")

NUM_BLOCKS = 97
FILLER = -77


@dataclass(frozen=True)
class Row:
    """One request of the step; ``kept_pages`` is empty where it is not evicted.

    `check` takes ``evicted_tokens`` in blocks and ``computed`` of an evicted row from there on.
    """

    computed: int  # logical tokens before the step
    scheduled: int
    evicted_tokens: int = 0  # E, whole blocks
    kept_pages: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        return self.computed + self.scheduled


def pool_of(page_order: str, num_layers: int, block_size: int) -> PagePool:
    """A pool whose pages are as small as they can be: their content does not matter."""
    return make_pool(
        page_order,
        num_layers=num_layers,
        num_blocks=NUM_BLOCKS,
        num_kv_heads=1,
        block_size=block_size,
        head_size=1,
    )


def num_kept_blocks(row: Row) -> int:
    """M of an evicted row, 0 of another."""
    if not row.kept_pages:
        return 0
    num_kept, rest = divmod(sum(row.kept_pages), len(row.kept_pages))
    assert rest == 0
    return num_kept


def naive_pages(
    row: Row,
    blocks: list[int],
    kept_blocks: list[int],
    layer: int,
    num_layers: int,
    block_size: int,
    page_order: str,
) -> list[int]:
    """The pages of one layer of one request, in the order of its tokens."""
    layer_stride, block_stride = strides(page_order, num_layers, NUM_BLOCKS)
    kept = [  # all pages of the kept blocks, block after block
        of_layer * layer_stride + block * block_stride
        for block in kept_blocks
        for of_layer in range(num_layers)
    ]
    first = sum(row.kept_pages[:layer])
    pages = kept[first : first + row.kept_pages[layer]] if row.kept_pages else []
    in_use = blocks[row.evicted_tokens // block_size : cdiv(row.end, block_size)]
    return pages + [layer * layer_stride + block * block_stride for block in in_use]


def check(
    rows: list[Row],
    num_layers: int,
    block_size: int,
    page_order: str,
    *,
    spare_columns: int = 0,
    spare_width: int = 0,
    padding: int = 0,
    seed: int = 0,
) -> LayerTables:
    """Compare a batch with the naive construction; returns the tables for further checks."""
    generator = torch.Generator().manual_seed(seed)
    rows = [replace(row, evicted_tokens=row.evicted_tokens * block_size) for row in rows]
    rows = [
        replace(row, computed=row.evicted_tokens + row.computed) if row.kept_pages else row
        for row in rows
    ]
    columns = max(cdiv(row.end, block_size) for row in rows) + spare_columns
    # Columns beyond a row hold whatever an earlier request left there.
    block_table = torch.randint(NUM_BLOCKS, (len(rows), columns), generator=generator)
    most_kept = max(1, *map(num_kept_blocks, rows))
    kept_blocks = torch.randint(NUM_BLOCKS, (len(rows), most_kept), generator=generator)
    starts, num_tokens = [0], 0
    for row in rows:
        num_tokens += row.scheduled
        starts.append(num_tokens)
    pages = [
        [
            naive_pages(
                row, blocks, kept[: num_kept_blocks(row)], layer, num_layers, block_size, page_order
            )
            for row, blocks, kept in zip(
                rows, block_table.tolist(), kept_blocks.tolist(), strict=True
            )
        ]
        for layer in range(num_layers)
    ]
    width = spare_width + max(len(of_row) for of_layer in pages for of_row in of_layer)
    out = LayerTables(
        torch.full((num_layers, len(rows), width), FILLER, dtype=torch.int32),
        torch.full((num_layers, len(rows)), FILLER, dtype=torch.int32),
        torch.full((num_layers, num_tokens + padding), FILLER, dtype=torch.int64),
    )
    layer_tables(
        pool_of(page_order, num_layers, block_size),
        EvictedRows(
            torch.tensor([row.evicted_tokens for row in rows]),
            kept_blocks,
            torch.tensor([row.kept_pages or (0,) * num_layers for row in rows]),
        ),
        block_table.int(),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([row.end for row in rows], dtype=torch.int32),
        out,
    )
    written = out.block_table[out.block_table != FILLER]
    assert written.min() >= 0
    assert written.max() < num_layers * NUM_BLOCKS
    for layer in range(num_layers):
        slots = []
        for r, row in enumerate(rows):
            kept = row.kept_pages[layer] * block_size if row.kept_pages else 0
            length = kept + row.end - row.evicted_tokens
            expected = pages[layer][r]
            assert out.seq_lens[layer, r] == length, (layer, r)
            assert cdiv(length, block_size) == len(expected)
            assert out.block_table[layer, r, : len(expected)].tolist() == expected, (layer, r)
            for stored in range(length - row.scheduled, length):
                slots.append(expected[stored // block_size] * block_size + stored % block_size)
        assert out.slot_mapping[layer].tolist() == slots + [-1] * padding, layer
    return out


MIXED = [
    Row(computed=0, scheduled=63),  # prefills, never evicted
    Row(computed=2, scheduled=1, evicted_tokens=6, kept_pages=(1, 4, 1)),
    Row(computed=13, scheduled=1),  # decodes, never evicted
    Row(computed=0, scheduled=1, evicted_tokens=7, kept_pages=(2, 1, 6)),  # without a tail
    Row(computed=17, scheduled=21),  # ends its prefill, evicted after this step
    Row(computed=8, scheduled=9, evicted_tokens=9, kept_pages=(3, 3, 3)),
]


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("block_size", [1, 5, 8])
def test_mixed_batch(page_order: str, block_size: int) -> None:
    check(MIXED, num_layers=3, block_size=block_size, page_order=page_order)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("spare_columns", [0, 9])
@pytest.mark.parametrize("padding", [0, 7])
def test_padded_batch(page_order: str, spare_columns: int, padding: int) -> None:
    check(MIXED, 3, 8, page_order, spare_columns=spare_columns, padding=padding)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize(
    "row",
    [
        pytest.param(Row(0, 63), id="prefill"),
        pytest.param(Row(40, 23), id="second-chunk"),
        pytest.param(Row(63, 1), id="decode-not-evicted"),
        pytest.param(Row(7, 1, 7, (1, 5, 3)), id="first-decode-after-eviction"),
        pytest.param(Row(0, 1, 8, (1, 5, 3)), id="first-decode-after-a-whole-prompt"),
        pytest.param(Row(15, 1, 7, (1, 5, 3)), id="last-token-of-a-block"),
        pytest.param(Row(16, 1, 7, (1, 5, 3)), id="first-token-of-a-block"),
        pytest.param(Row(3, 11, 7, (1, 5, 3)), id="several-tokens-across-blocks"),
        pytest.param(Row(27, 1, 7, (1, 1, 1)), id="one-page-a-layer"),
        pytest.param(Row(27, 1, 7, (1, 1, 7)), id="all-to-the-last-layer"),
        pytest.param(Row(27, 1, 7, (7, 1, 1)), id="all-to-the-first-layer"),
    ],
)
def test_single_row(page_order: str, row: Row) -> None:
    check([row], num_layers=3, block_size=8, page_order=page_order)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_rows_without_queries_take_no_slots(page_order: str) -> None:
    """A padded CUDA graph batch repeats the last query start."""
    check([Row(0, 3), Row(7, 0), Row(9, 2)], 3, 8, page_order, padding=2)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_single_layer_keeps_block_numbers(page_order: str) -> None:
    out = check([Row(20, 1)], num_layers=1, block_size=8, page_order=page_order)
    assert out.block_table.shape == (1, 1, 3)


def test_documented_example() -> None:
    """The example of `layer_tables`: 7 replaced blocks, 2 kept blocks, 4 + 1 + 1 pages."""
    row = [*range(10, 18)]
    out = LayerTables(
        torch.zeros(3, 1, 5, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int64),
    )
    layer_tables(
        pool_of("block-outermost", num_layers=3, block_size=4),
        EvictedRows(
            evicted_tokens=torch.tensor([28]),
            kept_blocks=torch.tensor([[18, 19]]),
            kept_pages=torch.tensor([[4, 1, 1]]),
        ),
        torch.tensor([row], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([32], dtype=torch.int32),
        out,
    )
    # Block b, layer l is page 3 * b + l.
    assert out.block_table[0, 0].tolist() == [54, 55, 56, 57, 51]
    assert out.block_table[1, 0, :2].tolist() == [58, 52]
    assert out.block_table[2, 0, :2].tolist() == [59, 53]
    assert out.seq_lens[:, 0].tolist() == [20, 8, 8]
    assert out.slot_mapping[:, 0].tolist() == [207, 211, 215]


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    num_layers = draw(st.sampled_from([1, 2, 3, 5]))
    block_size = draw(st.sampled_from([1, 3, 8]))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        evicted = draw(st.booleans())
        scheduled = draw(st.just(1) | st.integers(0, 20))  # 0: padding of a CUDA graph
        if evicted:
            num_kept = draw(st.integers(1, 3))
            pages = [1] * num_layers
            for _ in range((num_kept - 1) * num_layers):
                pages[draw(st.integers(0, num_layers - 1))] += 1
            evicted_blocks = max(pages) + draw(st.integers(0, 20))
            computed = draw(st.integers(0, 20))
            rows.append(Row(computed, max(scheduled, not computed), evicted_blocks, tuple(pages)))
        else:
            rows.append(Row(draw(st.integers(1, 40)), scheduled))
    return {
        "rows": rows,
        "num_layers": num_layers,
        "block_size": block_size,
        "page_order": draw(st.sampled_from(PAGE_ORDERS)),
        "spare_columns": draw(st.integers(0, 3)),
        "spare_width": draw(st.integers(0, 3)),
        "padding": draw(st.integers(0, 3)),
        "seed": draw(st.integers(0, 99)),
    }


@examples(200)
@given(batches())
def test_random_batches(batch: dict[str, Any]) -> None:
    check(**batch)
