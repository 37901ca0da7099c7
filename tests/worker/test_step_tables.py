# SPDX-License-Identifier: Apache-2.0
"""Where the tables of a step are stored: at fixed addresses for graphs, else where they fit."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.pools import make_pool
from vl_cache_vllm.ops.layer_tables import LayerTables
from vl_cache_vllm.worker import step_tables
from vl_cache_vllm.worker.step_tables import GraphShape, StepTables, TableSizes

NUM_LAYERS, BLOCK_SIZE, WIDTH = 3, 4, 32
MAX_REQS, GRAPH_REQS, MAX_TOKENS = 6, 2, 50


def tables_for(max_graph_reqs: int = GRAPH_REQS) -> StepTables:
    """With a request in slot 1, of whose first 16 tokens one block is kept."""
    pool = make_pool(num_layers=NUM_LAYERS, num_blocks=40, block_size=BLOCK_SIZE)
    tables = StepTables(pool, TableSizes(NUM_LAYERS, MAX_REQS, MAX_TOKENS, WIDTH, max_graph_reqs))
    tables.set_kept(1, torch.tensor([1, 1, 1]), torch.tensor([39]), ())
    return tables


def fill(
    tables: StepTables, num_reqs: int, pages: int, graph: GraphShape | None = None
) -> LayerTables:
    """A decode step: the first request is evicted, and all have ``pages`` pages of tokens."""
    rows = graph.num_reqs if graph is not None else num_reqs
    evicted = np.zeros((3, num_reqs), np.int64)
    evicted[:, 0] = 16, 1, 1
    lengths = torch.full((rows,), pages * BLOCK_SIZE, dtype=torch.int32)
    lengths[num_reqs:] = 0
    return tables.fill(
        evicted,
        num_reqs,
        pages,
        torch.arange(rows * WIDTH, dtype=torch.int32).view(rows, WIDTH) % 39,
        torch.arange(rows + 1, dtype=torch.int32).clamp(max=num_reqs),
        lengths,
        graph,
    )


@pytest.mark.parametrize("num_reqs", [1, GRAPH_REQS, MAX_REQS])
@pytest.mark.parametrize("pages", [10, WIDTH])
def test_steps_with_more_requests_than_graphs(num_reqs: int, pages: int) -> None:
    """They are as if there were room for all requests."""
    tables = tables_for()
    found, expected = fill(tables, num_reqs, pages), fill(tables_for(MAX_REQS), num_reqs, pages)
    lengths = expected.seq_lens
    assert torch.equal(found.seq_lens, lengths)
    assert torch.equal(found.slot_mapping, expected.slot_mapping)
    assert found.block_table.shape == expected.block_table.shape
    for layer, row in np.ndindex(NUM_LAYERS, num_reqs):
        used = -(-int(lengths[layer, row]) // BLOCK_SIZE)
        assert torch.equal(
            found.block_table[layer, row, :used], expected.block_table[layer, row, :used]
        )
    fits = num_reqs * -(-pages // 16) * 16 <= GRAPH_REQS * WIDTH
    is_shared = found.block_table.data_ptr() == tables._block_table.data_ptr()
    assert is_shared == fits


def test_graphs_find_their_tables_after_steps_without_a_graph() -> None:
    tables, graph = tables_for(), GraphShape(GRAPH_REQS, GRAPH_REQS)
    captured = fill(tables, 1, 5, graph)
    places = [
        t.data_ptr() for t in (captured.block_table, captured.seq_lens, captured.slot_mapping)
    ]
    expected = captured.block_table[:, 0, :5].clone()
    fill(tables, MAX_REQS, WIDTH)
    replayed = fill(tables, 1, 5, graph)
    found = [t.data_ptr() for t in (replayed.block_table, replayed.seq_lens, replayed.slot_mapping)]
    assert found == places
    assert replayed.block_table.shape == (NUM_LAYERS, GRAPH_REQS, WIDTH)
    assert torch.equal(replayed.block_table[:, 0, :5], expected)


def test_a_table_of_its_own_lasts_while_the_shape_does() -> None:
    tables = tables_for()
    own = weakref.ref(fill(tables, MAX_REQS, WIDTH).block_table)
    assert fill(tables, MAX_REQS, WIDTH).block_table is own()
    fill(tables, MAX_REQS, 10)
    assert own() is None


def test_a_graph_for_more_requests_than_were_promised_is_refused() -> None:
    with pytest.raises(AssertionError, match="a graph of 3 requests, but tables for 2"):
        fill(tables_for(), 1, 5, GraphShape(3, 3))


def test_a_request_longer_than_the_graph_is_wide_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_tables, "MAX_TABLE_BYTES", 4 * NUM_LAYERS * WIDTH)
    tables, graph = tables_for(), GraphShape(GRAPH_REQS, GRAPH_REQS)
    assert fill(tables, 1, 16, graph).block_table.shape[2] == 16
    assert fill(tables, 1, WIDTH, GraphShape(1, 1)).block_table.shape[2] == WIDTH
    with pytest.raises(AssertionError, match="a graph of 16 pages, but a request of 17"):
        fill(tables, 1, 17, graph)


SIZES = {
    "LLaVA-1.5-7B, 4K": TableSizes(32, 1024, 16384, 4096 // 16 + 1, 512),
    "Qwen3-VL-8B, 32K": TableSizes(36, 1024, 16384, 32768 // 16 + 1, 512),
    "Qwen3-VL-8B, 256K": TableSizes(36, 1024, 16384, 262144 // 16 + 1, 512),
    "no graphs": TableSizes(36, 1024, 16384, 262144 // 16 + 1, 0),
    "more layers than fit": TableSizes(4000, 16, 64, 262144 // 16 + 1, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_bytes_are_those_of_the_buffers(name: str) -> None:
    """Counted in the buffers themselves; zeros of this size cost no memory until they are used."""
    sizes = SIZES[name]
    pool = make_pool(num_layers=1, num_blocks=1, block_size=16)
    tables = StepTables(replace(pool, num_layers=sizes.num_layers), sizes)
    buffers = [b for b in vars(tables).values() if isinstance(b, torch.Tensor)]
    assert sum(b.numel() * b.element_size() for b in buffers) == sizes.num_bytes()
    if sizes.max_graph_reqs:
        assert sizes.graph_width(1) == sizes.width
        for num_reqs in range(1, sizes.max_graph_reqs + 1):
            assert num_reqs * sizes.graph_width(num_reqs) <= sizes.graph_entries
            assert sizes.graph_width(num_reqs) >= 16
    if name in ("LLaVA-1.5-7B, 4K", "Qwen3-VL-8B, 32K", "Qwen3-VL-8B, 256K"):
        assert sizes.num_bytes() < 500 << 20
