# SPDX-License-Identifier: Apache-2.0
"""Per-layer tables against a page-by-page, token-by-token construction."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.helpers.pools import PAGE_ORDERS, strides
from vl_cache_vllm.ops.layer_tables import LayerTables, layer_tables

pytestmark = pytest.mark.usefixtures("implementation")

NUM_BLOCKS = 97
FILLER = -77


@dataclass(frozen=True)
class Row:
    """One request of the step; ``kept_pages`` is empty where it is not evicted."""

    computed: int  # logical tokens before the step
    scheduled: int
    evicted_tokens: int = 0  # E
    kept_pages: tuple[int, ...] = ()
    reserved: int = 0  # M blocks of a row that ends its prefill in this step, not evicted yet

    @property
    def end(self) -> int:
        return self.computed + self.scheduled


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def prompt_and_kept_blocks(row: Row, block_size: int) -> tuple[int, int]:
    """N and M of an evicted row, 0 and 0 of another."""
    if not row.kept_pages:
        return 0, 0
    num_kept, rest = divmod(sum(row.kept_pages), len(row.kept_pages))
    assert rest == 0
    return cdiv(row.evicted_tokens, block_size), num_kept


def row_length(row: Row, block_size: int) -> int:
    if not row.kept_pages:
        return cdiv(row.end, block_size) + row.reserved
    num_prompt, num_kept = prompt_and_kept_blocks(row, block_size)
    return num_prompt + num_kept + cdiv(row.end - row.evicted_tokens, block_size)


def naive_pages(
    row: Row, blocks: list[int], layer: int, num_layers: int, block_size: int, page_order: str
) -> list[int]:
    """The pages of one layer of one request, in the order of its tokens."""
    layer_stride, block_stride = strides(page_order, num_layers, NUM_BLOCKS)
    if not row.kept_pages:
        in_use = blocks[: cdiv(row.end, block_size)]
        return [layer * layer_stride + block * block_stride for block in in_use]
    num_prompt, num_kept = prompt_and_kept_blocks(row, block_size)
    deal = [  # all pages of the kept blocks, block after block
        of_layer * layer_stride + block * block_stride
        for block in blocks[num_prompt : num_prompt + num_kept]
        for of_layer in range(num_layers)
    ]
    first = sum(row.kept_pages[:layer])
    pages = deal[first : first + row.kept_pages[layer]]
    for block in blocks[num_prompt + num_kept :]:
        pages.append(layer * layer_stride + block * block_stride)
    return pages


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
    layer_stride, block_stride = strides(page_order, num_layers, NUM_BLOCKS)
    lengths = [row_length(row, block_size) for row in rows]
    columns = max(lengths) + spare_columns
    # Columns beyond a row hold whatever an earlier request left there.
    block_table = torch.randint(NUM_BLOCKS, (len(rows), columns), generator=generator)
    starts, num_tokens = [0], 0
    for row in rows:
        num_tokens += row.scheduled
        starts.append(num_tokens)
    numbers = [prompt_and_kept_blocks(row, block_size) for row in rows]
    pages = [
        [
            naive_pages(row, blocks[:length], layer, num_layers, block_size, page_order)
            for row, blocks, length in zip(rows, block_table.tolist(), lengths, strict=True)
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
        block_table.int(),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([row.end for row in rows], dtype=torch.int32),
        torch.tensor([row.evicted_tokens for row in rows]),
        torch.tensor([num_prompt for num_prompt, _ in numbers]),
        torch.tensor([num_kept for _, num_kept in numbers]),
        torch.tensor([row.kept_pages or (0,) * num_layers for row in rows]),
        block_size,
        layer_stride,
        block_stride,
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
    Row(computed=52, scheduled=1, evicted_tokens=50, kept_pages=(1, 4, 1)),
    Row(computed=13, scheduled=1),  # decodes, never evicted
    Row(computed=63, scheduled=1, evicted_tokens=63, kept_pages=(2, 1, 6)),  # its first decode
    Row(computed=17, scheduled=21, reserved=2),  # ends its prefill, evicted after this step
    Row(computed=80, scheduled=9, evicted_tokens=72, kept_pages=(3, 3, 3)),
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
        pytest.param(Row(40, 23, reserved=3), id="last-chunk-with-kept-blocks"),
        pytest.param(Row(63, 1), id="decode-not-evicted"),
        pytest.param(Row(63, 1, 63, (1, 5, 3)), id="first-decode-after-eviction"),
        pytest.param(Row(64, 1, 64, (1, 5, 3)), id="first-decode-after-a-whole-prompt"),
        pytest.param(Row(70, 1, 63, (1, 5, 3)), id="last-token-of-a-decode-block"),
        pytest.param(Row(71, 1, 63, (1, 5, 3)), id="first-token-of-a-decode-block"),
        pytest.param(Row(66, 11, 63, (1, 5, 3)), id="several-tokens-across-blocks"),
        pytest.param(Row(90, 1, 63, (1, 1, 1)), id="one-page-a-layer"),
        pytest.param(Row(90, 1, 63, (1, 1, 7)), id="all-to-the-last-layer"),
        pytest.param(Row(90, 1, 63, (7, 1, 1)), id="all-to-the-first-layer"),
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
    """docs/design.md, "The page pool": 8 blocks of 3 layers kept as 2, split 4 + 1 + 1."""
    row = [*range(10, 20), 30]  # 8 prompt blocks, 2 kept, 1 decode block
    out = LayerTables(
        torch.zeros(3, 1, 5, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int32),
        torch.zeros(3, 1, dtype=torch.int64),
    )
    layer_tables(
        torch.tensor([row], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([32], dtype=torch.int32),
        torch.tensor([31]),
        torch.tensor([8]),
        torch.tensor([2]),
        torch.tensor([[4, 1, 1]]),
        4,
        1,
        3,
        out,
    )
    # Block b, layer l is page 3 * b + l.
    assert out.block_table[0, 0].tolist() == [54, 55, 56, 57, 90]
    assert out.block_table[1, 0, :2].tolist() == [58, 91]
    assert out.block_table[2, 0, :2].tolist() == [59, 92]
    assert out.seq_lens[:, 0].tolist() == [17, 5, 5]
    assert out.slot_mapping[:, 0].tolist() == [360, 364, 368]


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
            evicted_tokens = max(pages) * block_size + draw(st.integers(0, 20))
            computed = evicted_tokens + draw(st.integers(0, 20))
            rows.append(Row(computed, scheduled, evicted_tokens, tuple(pages)))
        else:
            rows.append(Row(draw(st.integers(1, 40)), scheduled, reserved=draw(st.integers(0, 3))))
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
