# SPDX-License-Identifier: Apache-2.0
"""Runs eviction on one worker: owns the device state, called by runner adapters and backends."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.math_utils import round_up
from vllm.v1.core.sched.output import CachedRequestData

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.messages import EvictionReport, PendingReport
from vl_cache_vllm.ops.compact import compact
from vl_cache_vllm.ops.device import Fetched, Stopwatch, to_device
from vl_cache_vllm.ops.layer_tables import LayerTables, layer_tables
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool
from vl_cache_vllm.policy import Prompt, Shard
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.selection import Selection, select_kept
from vl_cache_vllm.worker.step import (
    BatchRow,
    EvictionStep,
    PendingEviction,
    RequestTable,
    plan_step,
)
from vl_cache_vllm.worker.tp_group import TPGroup

logger = init_logger(__name__)

_ALIGNED_ENTRIES = 16  # of a row of a block table


@dataclass(frozen=True)
class GraphShape:
    """Sizes that a full CUDA graph pads its batch to."""

    num_reqs: int
    num_tokens: int


class Evictor:
    """Plans steps, observes layers as they run, and evicts after the last one.

    Args:
        config: settings.
        pool: the cache of this worker's layers.
        num_heads: query heads per layer on this worker.
        ranks: the workers that hold the other heads of these layers.
        shard: which layers and KV heads of the model these are.
        max_num_reqs: requests the runner may hold at once.
        max_num_tokens: tokens of the largest step.
        max_table_width: pages that one layer of a request can hold.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        pool: PagePool,
        num_heads: int,
        max_num_reqs: int,
        max_num_tokens: int,
        max_table_width: int,
        ranks: TPGroup = TPGroup(),  # noqa: B008  frozen
        shard: Shard = Shard(),  # noqa: B008  frozen
    ) -> None:
        self.config = config
        self.pool = pool
        self.num_heads = num_heads * ranks.size
        self.ranks = ranks
        self.shard = shard
        self._layer_numbers = shard.layer_numbers(pool.num_layers)
        self.requests = RequestTable()
        self.cached_requests: CachedRequestData | None = None
        """What the scheduler says of the step's requests that are not new."""
        self.admitted: set[str] | None = None
        """Who may be observed (`vl_cache_vllm.core.observation_budget`); None: everybody."""
        self._trace_file = _open_trace(config.trace.path)
        self._reports: list[PendingReport] = []
        device, num_layers = pool.pages.device, pool.num_layers
        # Row 0 stays zero: it serves requests that are not evicted.
        self._kept_pages = torch.zeros(
            max_num_reqs + 1, num_layers, dtype=torch.int64, device=device
        )
        max_table_width = round_up(max_table_width, _ALIGNED_ENTRIES)
        self._max_table_width = max_table_width
        # Reused by every step, and known to CUDA graphs.
        self._block_table = torch.zeros(
            num_layers * max_num_reqs * max_table_width, dtype=torch.int32, device=device
        )
        self._seq_lens = torch.zeros(num_layers * max_num_reqs, dtype=torch.int32, device=device)
        self._slots = torch.zeros(num_layers * max_num_tokens, dtype=torch.int64, device=device)
        self._last_views: tuple[tuple[int, int, int], LayerTables] | None = None
        self._last_columns: tuple[list[tuple[int, ...]], tuple[torch.Tensor, ...]] | None = None

    def begin_output(self, ended: Iterable[str], admitted: Iterable[str] | None) -> None:
        """Hear of a scheduler's output before the runner does.

        Args:
            ended: requests that ended or were preempted: what they held is not kept until another
                step is planned.
            admitted: those that may be observed from now on; None: everybody always.
        """
        for request_id in ended:
            self.requests.drop(request_id)
        if admitted is not None:
            self.admitted = (self.admitted or set()).difference(ended).union(admitted)

    def begin_step(
        self,
        rows: Sequence[BatchRow],
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        graph: GraphShape | None = None,
    ) -> EvictionStep | None:
        """Plan a step.

        Args:
            rows: the batch in order, R requests.
            block_table: int32 ``[>= R, C]``.
            query_start_loc: int32 ``[>= R + 1]``.
            seq_lens: logical lengths after the step, int32 ``[>= R]``.
            graph: of the full CUDA graph that runs the step or is captured of it; the tensors
                are then padded to it, and the layers' tables are where every such graph finds
                them.

        Returns:
            The step, or None when vLLM's own path serves it unchanged.
        """
        num_reqs = graph.num_reqs if graph else len(rows)
        evicted: list[tuple[int, ...]] = [
            (s.evicted_tokens, s.prompt_blocks, s.kept_blocks, s.slot if s.evicted_tokens else 0)
            for s in (row.state for row in rows)
        ]
        numbers = plan_step(rows, self.pool.block_size, self.pool.num_layers, self.admitted)
        for state in numbers.kept_whole:
            assert state.observed is not None
            self._reports.append(partial(_report, state.observed.stopwatch))
            state.observed = None
        if numbers.is_plain and graph is None:
            return None
        block_table = block_table[:num_reqs]
        query_start_loc = query_start_loc[: num_reqs + 1]
        tables = None
        if graph is not None:
            assert not numbers.observations and not numbers.pending_evictions, (
                "a graph cannot observe"
            )
            evicted += [(0, 0, 0, 0)] * (num_reqs - len(rows))
            tables = self._views(num_reqs, graph.num_tokens, self._max_table_width)
        elif numbers.any_evicted:
            num_tokens = sum(row.num_scheduled for row in rows)
            # Kernels of others specialise on the alignment of rows.
            width = round_up(min(numbers.table_width, block_table.shape[1]), _ALIGNED_ENTRIES)
            tables = self._views(num_reqs, num_tokens, width)
        if tables is not None:
            self._fill(tables, evicted, block_table, query_start_loc, seq_lens[:num_reqs])
        return EvictionStep(
            numbers.observations, numbers.pending_evictions, block_table, query_start_loc, tables
        )

    def _fill(
        self,
        tables: LayerTables,
        evicted: list[tuple[int, ...]],
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> None:
        # Decode steps of one batch have them in common until a request comes, goes or is evicted.
        if self._last_columns is None or self._last_columns[0] != evicted:
            *columns, slot = to_device([*zip(*evicted, strict=True)], block_table.device)
            self._last_columns = evicted, (*columns, self._kept_pages[slot])
        evicted_tokens, prompt_blocks, kept_blocks, kept_pages = self._last_columns[1]
        layer_tables(
            block_table,
            query_start_loc,
            seq_lens,
            evicted_tokens,
            prompt_blocks,
            kept_blocks,
            kept_pages,
            self.pool.block_size,
            self.pool.layer_stride,
            self.pool.block_stride,
            tables,
        )

    def _views(self, num_reqs: int, num_tokens: int, width: int) -> LayerTables:
        """The buffers in the shapes of a step; steps that follow one another mostly share them."""
        shape = num_reqs, num_tokens, width
        if self._last_views is None or self._last_views[0] != shape:
            num_layers = self.pool.num_layers
            views = LayerTables(
                _prefix_view(self._block_table, num_layers, num_reqs, width),
                _prefix_view(self._seq_lens, num_layers, num_reqs),
                _prefix_view(self._slots, num_layers, num_tokens),
            )
            self._last_views = shape, views
        return self._last_views[1]

    def layer_done(
        self, step: EvictionStep, layer: int, query: torch.Tensor, scale: float, softcap: float
    ) -> None:
        """Observe one layer, right after its attention; evict after the last.

        Args:
            step: the step that runs.
            layer: index of the layer in the pool.
            query: the step's queries, ``[num_tokens, num_heads, head_size]``.
            scale: softmax scale.
            softcap: logit soft cap, 0 for none.
        """
        for observation in step.observations:
            state = observation.state
            if state.observed is None:
                state.observed = AttentionStats(
                    state.config,
                    self.pool.num_layers,
                    self.pool.num_kv_heads,
                    state.prefill_tokens,
                    query.device,
                )
            row = step.block_table[observation.row, : observation.num_blocks]
            with state.observed.stopwatch:
                state.observed.add(
                    layer,
                    query[observation.query_start : observation.query_end],
                    PagedKeys(self.pool, layer, row),
                    observation.first_position,
                    scale,
                    softcap,
                )
        step.layers_done += 1
        if step.layers_done == self.pool.num_layers and step.pending_evictions:
            self._evict_all(step)

    def take_reports(self) -> list[PendingReport]:
        """Of the evictions since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def _evict_all(self, step: EvictionStep) -> None:
        observed = []
        for finish in step.pending_evictions:
            state = finish.state
            assert finish.prompt_tokens == state.prefill_tokens
            assert state.observed is not None, (
                f"request {state.request_id} was given kept blocks but never observed"
            )
            observed.append(state.observed)
        dense_entries = self.ranks.sum(torch.stack([one.dense_entries for one in observed]))
        for arguments in zip(step.pending_evictions, observed, dense_entries, strict=True):
            self._evict(step, *arguments)

    def _evict(
        self,
        step: EvictionStep,
        finish: PendingEviction,
        observed: AttentionStats,
        dense_entries: torch.Tensor,
    ) -> None:
        state, pool = finish.state, self.pool
        policy = state.config.policy
        grids = state.grids() if policy.wants_grids or self._trace_file is not None else ()
        if policy.wants_grids and not all(
            any(first <= grid.first < end for grid in grids) for first, end in state.visual
        ):
            logger.warning_once(
                "policy %s: where the visual tokens of an image lie in it is not known for this "
                "model; they are treated as tokens in a sequence",
                policy.name,
            )
        prompt = Prompt(finish.prompt_tokens, state.visual, grids, self.shard, self.ranks.mean)
        stopwatch = Stopwatch(pool.device)
        with stopwatch:
            choice = select_kept(
                state.config,
                observed,
                dense_entries,
                prompt,
                self.num_heads,
                policy.observation_start(state.vision_end, finish.prompt_tokens),  # type: ignore[arg-type]
                finish.kept_blocks,
                pool.block_size,
            )
            row = step.block_table[finish.row].long()
            end = finish.prompt_blocks + finish.kept_blocks
            prompt_row, kept_row = row[: finish.prompt_blocks], row[finish.prompt_blocks : end]
            compact(pool, prompt_row, kept_row, choice.kept_pages, choice.positions)
            while state.slot >= len(self._kept_pages):  # preempted requests keep theirs
                more = torch.zeros_like(self._kept_pages)
                self._kept_pages = torch.cat((self._kept_pages, more))
            self._kept_pages[state.slot] = choice.kept_pages
        self._last_columns = None
        state.observed = None
        kept_tokens = Fetched(choice.kept_pages * pool.block_size)
        self._reports.append(
            partial(
                _report,
                observed.stopwatch,
                stopwatch,
                kept_tokens,
                self._layer_numbers,
                finish.prompt_tokens,
            )
        )
        if self._trace_file is not None:
            self._trace(finish, prompt, choice, observed, kept_tokens.wait().tolist())

    def _trace(
        self,
        finish: PendingEviction,
        prompt: Prompt,
        choice: Selection,
        observed: AttentionStats,
        kept_tokens: list[int],
    ) -> None:
        record = {
            "request_id": finish.state.request_id,
            "rank": self.ranks.rank,
            "layers": self._layer_numbers,
            "budget": finish.state.config.budget,
            "prompt_tokens": finish.prompt_tokens,
            "vision_end": finish.state.vision_end,
            "block_size": self.pool.block_size,
            "prompt_blocks": finish.prompt_blocks,
            "kept_blocks": finish.kept_blocks,
            "density": choice.density.tolist(),
            "kept_tokens": kept_tokens,
            "visual": prompt.visual,
            "grids": [dataclasses.astuple(grid) for grid in prompt.grids],
        }
        if self.config.trace.positions:
            record["kept_positions"] = [
                layer[:, :kept].tolist()
                for layer, kept in zip(choice.positions, kept_tokens, strict=True)
            ]
        if self.config.trace.scores:
            record["attention"] = _rounded(observed.column_sums)
            record["scores"] = _rounded(choice.scores)
        assert self._trace_file is not None
        # One write: workers of several engines may share the file.
        os.write(self._trace_file, (json.dumps(record) + "\n").encode())


def _report(
    observation: Stopwatch,
    compaction: Stopwatch | None = None,
    kept_tokens: Fetched | None = None,
    layer_numbers: Sequence[int] = (),
    prompt_tokens: int = 0,
) -> EvictionReport:
    """Made when the device has come so far."""
    if compaction is None or kept_tokens is None:
        return EvictionReport(observation.seconds())
    kept = zip(layer_numbers, kept_tokens.wait().tolist(), strict=True)
    shares = {layer: tokens / prompt_tokens for layer, tokens in kept}
    return EvictionReport(observation.seconds(), compaction.seconds(), shares)


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists of numbers of four digits."""

    def shorten(value: Any) -> Any:
        return [*map(shorten, value)] if isinstance(value, list) else float(f"{value:.3e}")

    return shorten(values.tolist())


def _open_trace(path: str | None) -> int | None:
    """A descriptor to append to, opened at start-up so that a bad path fails there."""
    if path is None:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"KV compression cannot write its trace.path: {error}") from error


def _prefix_view(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of a flat buffer, densely shaped."""
    size = 1
    for extent in shape:
        size *= extent
    return buffer[:size].view(shape)
