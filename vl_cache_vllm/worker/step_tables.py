# SPDX-License-Identifier: Apache-2.0
"""The per-layer tables of a step, in device buffers that full CUDA graphs can replay."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.math_utils import round_up

from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.worker.kept_blocks import KeptBlocks

_ALIGNED_ENTRIES = 16  # of a block-table row; vLLM's kernels specialise on its alignment

MAX_TABLE_BYTES = 128 << 20
"""Bound of the tables of full graphs; those of one request of the maximum length always fit."""


@dataclass(frozen=True)
class TableSizes:
    """What the buffers of a worker depend on."""

    num_layers: int
    max_num_reqs: int  # requests that the model runner may hold at once
    max_num_tokens: int  # tokens of the largest step
    max_table_width: int  # pages that one layer of a request can hold
    max_graph_reqs: int  # requests of the largest full CUDA graph; 0: there are no graphs

    @property
    def width(self) -> int:
        """Entries of a row of the widest table."""
        return round_up(self.max_table_width, _ALIGNED_ENTRIES)

    @property
    def graph_entries(self) -> int:
        """Entries of one layer's table in all graphs."""
        bound = MAX_TABLE_BYTES // (4 * self.num_layers)
        narrowest = self.max_graph_reqs * _ALIGNED_ENTRIES
        most = self.max_graph_reqs * self.width
        return min(most, max(bound, self.width, narrowest))

    def graph_width(self, num_reqs: int) -> int:
        """Entries of a row of the table in a graph of this many requests."""
        fitting = self.graph_entries // num_reqs // _ALIGNED_ENTRIES * _ALIGNED_ENTRIES
        return min(self.width, fitting)

    def num_bytes(self) -> int:
        """Bytes of all buffers of `StepTables`, without the few of `KeptBlocks`."""
        tables = 4 * self.num_layers * (self.graph_entries + self.max_num_reqs)
        slots = 8 * self.num_layers * self.max_num_tokens
        kept = 8 * self.num_layers * (self.max_num_reqs + 1)
        return tables + slots + kept


@dataclass(frozen=True)
class GraphShape:
    """Sizes that a full CUDA graph pads its batch to."""

    num_reqs: int
    num_tokens: int


class StepTables:
    """Block table, lengths and slots of every layer, and what is kept of every request.

    Args:
        pool: the cache of this worker's layers.
        sizes: of the buffers.
    """

    def __init__(self, pool: PagePool, sizes: TableSizes) -> None:
        self._pool, self.sizes = pool, sizes
        max_num_reqs = sizes.max_num_reqs
        device, num_layers = pool.device, pool.num_layers
        # int64 [max_num_reqs + 1, num_layers]. Row 0 stays zero: it serves requests that are not
        # evicted.
        self._kept_pages = torch.zeros(
            max_num_reqs + 1, num_layers, dtype=torch.int64, device=device
        )
        self._kept_blocks = KeptBlocks(device)
        # Every step reuses these buffers, so a CUDA graph finds its tables where it captured them.
        self._block_table = torch.zeros(
            num_layers * sizes.graph_entries, dtype=torch.int32, device=device
        )
        self._seq_lens = torch.zeros(num_layers * max_num_reqs, dtype=torch.int32, device=device)
        self._slots = torch.zeros(
            num_layers * sizes.max_num_tokens, dtype=torch.int64, device=device
        )
        self._last_views: tuple[tuple[int, int, int], LayerTables] | None = None
        self._last_rows: tuple[bytes, EvictedRows] | None = None

    def kept_pages(self, slots: torch.Tensor | int) -> torch.Tensor:
        """Kept pages of each layer of the request in a slot, or in each of some slots, int64."""
        return self._kept_pages[slots]

    def set_kept(
        self, slot: int, kept_pages: torch.Tensor, kept_row: torch.Tensor, live: Iterable[int]
    ) -> None:
        """Store the result of an eviction.

        Args:
            slot: of the request.
            kept_pages: pages of each layer, int64 ``[num_layers]``.
            kept_row: ids of the kept blocks, int64 ``[M]``.
            live: slots of all evicted requests.
        """
        while slot >= len(self._kept_pages):  # preempted requests keep their slots
            self._kept_pages = torch.cat((self._kept_pages, torch.zeros_like(self._kept_pages)))
        self._kept_pages[slot] = kept_pages
        self._kept_blocks.store(slot, kept_row, live)
        self._last_rows = None

    def fill(
        self,
        evicted: np.ndarray,
        num_tokens: int,
        table_width: int,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        graph: GraphShape | None,
    ) -> LayerTables:
        """Compute the tables of a step.

        Args:
            evicted: E, M and the slot of each request before padding, int64 ``[3, <= R]``; zeros
                for one that is not evicted.
            num_tokens: tokens of the step, before padding.
            table_width: bound of any layer's pages of any request.
            block_table: int32 ``[R, C]``, padded to the graph.
            query_start_loc: int32 ``[R + 1]``.
            seq_lens: logical lengths after the step, int32 ``[R]``.
            graph: the full CUDA graph that reads the tables; None: no graph.

        Returns:
            The tables; the next call overwrites them.
        """
        num_reqs = block_table.shape[0]
        if graph is not None:
            assert num_reqs <= self.sizes.max_graph_reqs, (
                f"a graph of {num_reqs} requests, but tables for {self.sizes.max_graph_reqs}"
            )
            width = self.sizes.graph_width(num_reqs)
            assert table_width <= width, f"a graph of {width} pages, but a request of {table_width}"
            tables = self._views(num_reqs, graph.num_tokens, width)
        else:
            width = round_up(min(table_width, block_table.shape[1]), _ALIGNED_ENTRIES)
            tables = self._views(num_reqs, num_tokens, width)
        if (padding := num_reqs - evicted.shape[1]) > 0:
            evicted = np.concatenate((evicted, np.zeros((3, padding), np.int64)), 1)
        # Consecutive decode steps share these rows until a request joins, ends or is evicted.
        key = evicted.tobytes()
        if self._last_rows is None or self._last_rows[0] != key:
            evicted_tokens, kept, slots = evicted
            numbers = np.stack((evicted_tokens, slots, self._kept_blocks.first(slots)))
            on_device, slot, first = to_device(numbers, block_table.device)
            most_kept = max(1, int(kept.max(initial=0)))
            kept_blocks = self._kept_blocks.rows(first, most_kept)
            rows = EvictedRows(on_device, kept_blocks, self._kept_pages[slot])
            self._last_rows = key, rows
        layer_tables(self._pool, self._last_rows[1], block_table, query_start_loc, seq_lens, tables)
        return tables

    def _views(self, num_reqs: int, num_tokens: int, width: int) -> LayerTables:
        """The buffers in the shapes of a step; consecutive steps mostly share the shapes.

        Steps that are in no graph may have more requests, but mostly narrower tables. If theirs do
        not fit, they get a table of their own.
        """
        shape = num_reqs, num_tokens, width
        if self._last_views is None or self._last_views[0] != shape:
            self._last_views = None  # frees a table of its own
            num_layers = self._pool.num_layers
            if num_layers * num_reqs * width <= len(self._block_table):
                block_table = _prefix_view(self._block_table, num_layers, num_reqs, width)
            else:
                block_table = self._block_table.new_zeros(num_layers, num_reqs, width)
            views = LayerTables(
                block_table,
                _prefix_view(self._seq_lens, num_layers, num_reqs),
                _prefix_view(self._slots, num_layers, num_tokens),
            )
            self._last_views = shape, views
        return self._last_views[1]


def _prefix_view(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a flat buffer as a dense tensor."""
    size = 1
    for extent in shape:
        size *= extent
    return buffer[:size].view(shape)
