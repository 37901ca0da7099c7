# SPDX-License-Identifier: Apache-2.0
"""Eviction on one worker: observes requests, then compacts their cache.

Called by the runner adapters (`v1`, `v2`) once per step and by the attention layers once per layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.core.sched.output import CachedRequestData

from vl_cache_vllm.attention.per_layer import LayerInputs
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder, EvictionReport, PendingReport, put_step
from vl_cache_vllm.ops.compact import Move, compact_all
from vl_cache_vllm.ops.device import Fetched, Stopwatch, to_device
from vl_cache_vllm.ops.dispatch import implementation_for
from vl_cache_vllm.ops.layer_tables import LayerTables
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool
from vl_cache_vllm.policy import Prompt, Shard
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.late_observation import (
    MAX_LATE_QUERIES,
    LateObservation,
    QueryBuffer,
    split_late,
)
from vl_cache_vllm.worker.requests import RequestTable
from vl_cache_vllm.worker.selection import (
    Division,
    EvictionInput,
    Selection,
    divide,
    selections,
    whole,
)
from vl_cache_vllm.worker.source import EvictionSource
from vl_cache_vllm.worker.step import (
    Batch,
    BatchRow,
    ObservedQueries,
    PendingEviction,
    observes_prefill,
    plan_step,
    table_width,
)
from vl_cache_vllm.worker.step_tables import GraphShape, StepTables, TableSizes
from vl_cache_vllm.worker.tp_group import TPGroup
from vl_cache_vllm.worker.trace import Trace

logger = init_logger(__name__)


@dataclass(eq=False)
class EvictionStep:
    """What eviction does in one step; the `StepObserver` of the attention layers. R requests."""

    evictor: Evictor
    observations: list[ObservedQueries]  # layer by layer
    late: LateObservation | None  # several layers at once
    pending_evictions: list[PendingEviction]
    block_table: torch.Tensor  # int32 [R, C], the runner's
    tables: LayerTables | None  # None: no request of the batch is evicted, so all layers agree
    num_keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of rows that are observed through the layers' tables: keys of each layer, int32 [L]."""
    layer_index: dict[str, int] = field(default_factory=dict)
    layer_inputs: LayerInputs | None = None
    layers_done: int = 0

    @property
    def pages(self) -> torch.Tensor:
        """The pages of the pool."""
        return self.evictor.pool.pages

    def layer_done(
        self, layer: int, query: torch.Tensor, scale: float, softcap: float, is_owner: bool = True
    ) -> None:
        """Arguments as for `Evictor.layer_done`."""
        self.evictor.layer_done(self, layer, query, scale, softcap, is_owner)

    def attach(self, metadata: dict[str, Any], layer_index: dict[str, int]) -> None:
        """Let the evicted layers see this step.

        Args:
            metadata: attention metadata by vLLM's layer name; layers of one group share theirs.
            layer_index: index in the pool of each evicted layer, by the same names.
        """
        self.layer_index = layer_index
        last = None
        for layer_metadata in map(metadata.get, layer_index):
            if layer_metadata is not last:
                put_step(layer_metadata, self)
                last = layer_metadata


class Evictor:
    """Plans steps, observes layers as they run, and evicts requests after the last layer.

    Args:
        config: the engine's settings.
        pool: the cache of this worker's layers.
        num_heads: query heads per layer on this worker.
        max_num_reqs: requests that the model runner may hold at once.
        max_num_tokens: tokens of the largest step.
        max_table_width: pages that one layer of a request can hold.
        max_graph_reqs: requests of the largest full CUDA graph.
        tp_group: the workers that hold the other heads of these layers.
        shard: which layers and KV heads of the model are on this worker.
        readers: attention layers that read the cache of each layer of the pool, its own included;
            empty: one each.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        pool: PagePool,
        num_heads: int,
        max_num_reqs: int,
        max_num_tokens: int,
        max_table_width: int,
        max_graph_reqs: int = 0,
        tp_group: TPGroup = TPGroup(),  # noqa: B008  frozen
        shard: Shard = Shard(),  # noqa: B008  frozen
        readers: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.pool = pool
        self.num_heads = num_heads * tp_group.size
        self._num_attention_layers = sum(readers) or pool.num_layers
        self._readers: torch.Tensor | None = None
        if self._num_attention_layers > pool.num_layers:
            self._readers = to_device(readers, pool.device)
        self.tp_group = tp_group
        self.shard = shard
        self._layer_numbers = shard.layer_numbers(pool.num_layers)
        self.requests = RequestTable()
        self._query_buffer = QueryBuffer()
        self.max_late_queries = MAX_LATE_QUERIES
        """Queries of all layers that a step holds at most; the buffer has room for no more."""
        sizes = TableSizes(
            pool.num_layers, max_num_reqs, max_num_tokens, max_table_width, max_graph_reqs
        )
        self.tables = StepTables(pool, sizes)
        self.cached_requests: CachedRequestData | None = None
        """What the scheduler says about the step's requests that are not new."""
        self.admitted: set[str] | None = None
        """Ids of the requests that may be observed; None: all (`vl_cache_vllm.messages`)."""
        self.orders: Mapping[str, EvictionOrder] = {}
        """The requests to evict in this step, by id."""
        self.deferred: Collection[str] = ()
        """Ids of the requests whose prefill ends in this step and whose eviction follows."""
        self._trace = (
            Trace(config, tp_group.rank, self._layer_numbers, pool.block_size)
            if config.trace.path is not None
            else None
        )
        self._reports: list[PendingReport] = []
        self._step: EvictionStep | None = None  # the last one, if it evicts

    def begin_output(
        self,
        ended: Iterable[str],
        admitted: Iterable[str] | None,
        orders: Mapping[str, EvictionOrder],
        deferred: Collection[str] = (),
    ) -> None:
        """Take in a scheduler's output before the model runner does.

        Args:
            ended: requests that ended or were preempted, whose scores are no longer needed.
            admitted: requests that may be observed from now on; None: observation is not bounded.
            orders: requests to evict in this step, by id.
            deferred: requests whose prefill ends in this step and whose eviction is still to come.
        """
        self.orders, self.deferred = orders, deferred
        for request_id in ended:
            self.requests.drop(request_id)
        if admitted is not None:
            self.admitted = self.admitted or set()
            self.admitted.difference_update(ended)
            self.admitted.update(admitted)

    def observes_prefill(self, row: BatchRow) -> bool:
        """Whether a row that prefills is observed in the step of the last `begin_output`."""
        block_size = self.pool.block_size
        return observes_prefill(row, block_size, self.admitted, self.orders, self.deferred)

    def table_width(self, columns: np.ndarray, ends: np.ndarray) -> int:
        """Bound of the pages of any layer of some requests.

        Args:
            columns: of the requests, int64 ``[4, R]`` (`vl_cache_vllm.worker.requests`).
            ends: logical tokens of each, int ``[R]``.
        """
        return table_width(columns, ends, self.pool.block_size, self.pool.num_layers)

    def begin_step(
        self,
        batch: Batch,
        block_table: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        graph: GraphShape | None = None,
    ) -> EvictionStep | None:
        """Plan a step.

        Args:
            batch: the scheduled requests, R.
            block_table: int32 ``[>= R, C]``.
            query_start_loc: int32 ``[>= R + 1]``.
            seq_lens: logical lengths after the step, int32 ``[>= R]``.
            graph: shape of the full CUDA graph that runs the step or is captured from it. The
                tensors are then padded to it.

        Returns:
            The step, or None when vLLM's own path serves it unchanged.
        """
        plan = plan_step(
            batch,
            self.pool.block_size,
            self.pool.num_layers,
            self.admitted,
            self.orders,
            self.deferred,
        )
        for eviction in plan.pending_evictions:
            self.requests.note(eviction.state)
        for state in plan.kept_whole:
            assert state.attention_stats is not None
            self._reports.append(partial(_report, state.attention_stats.stopwatch))
            state.attention_stats = None
        if plan.is_plain and graph is None:
            return None
        num_reqs = graph.num_reqs if graph else len(batch.num_computed)
        block_table = _first(num_reqs, block_table)
        tables = None
        if graph is not None or plan.needs_tables:
            assert graph is None or not (plan.observations or plan.pending_evictions), (
                "a step in a full CUDA graph cannot be observed"
            )
            tables = self.tables.fill(
                batch.columns[1:],  # before this step, which evicts at its end
                batch.num_tokens,
                plan.table_width,
                block_table,
                _first(num_reqs + 1, query_start_loc),
                _first(num_reqs, seq_lens),
                graph,
            )
        late, observations = None, plan.observations
        if implementation_for(self.pool.device) == "triton":  # launches cost time
            waiting, observations = split_late(
                observations, self.max_late_queries, self.pool.num_layers
            )
            if waiting:
                late = LateObservation(waiting, self.pool, self._query_buffer)
        step = EvictionStep(self, observations, late, plan.pending_evictions, block_table, tables)
        for observation in plan.observations:
            if not observation.num_blocks:
                assert tables is not None
                drafts = int(batch.num_scheduled[observation.row]) - 1
                step.num_keys[observation.row] = tables.seq_lens[:, observation.row] - drafts
        if plan.pending_evictions:
            self._step = step
        return step

    def layer_done(
        self,
        step: EvictionStep,
        layer: int,
        query: torch.Tensor,
        scale: float,
        softcap: float,
        is_owner: bool = True,
    ) -> None:
        """Observe one layer or several right after attention, and evict after the last layer.

        Args:
            step: the running step.
            layer: index of the layer in the pool.
            query: the step's queries, ``[num_tokens, num_heads, head_size]``.
            scale: softmax scale.
            softcap: logit soft cap, 0 for none.
            is_owner: False: a later layer that reads the cache of ``layer``. Its attention counts
                as that of further heads, and it is never observed late.
        """
        observations, late = step.observations, step.late
        if late is not None and not is_owner:
            observations, late = [*observations, *late.observations], None
        for observation in observations:
            stats = self._stats_of(observation)
            table, num_keys = self._keys_of(step, observation)
            if num_keys is None:
                keys = PagedKeys.of_blocks(self.pool, layer, table)
            else:
                keys, num_keys = PagedKeys(self.pool, table[layer]), num_keys[layer]
            with stats.stopwatch:
                stats.add(
                    layer,
                    query[observation.query_start : observation.query_end],
                    keys,
                    observation.first_position,
                    scale,
                    softcap,
                    num_keys,
                    reader=step.layers_done,
                )
        if late is not None:
            late.hold(layer, query, scale, softcap)
            if late.is_due:
                late.observe(partial(self._keys_of, step), self._stats_of)
        step.layers_done += 1
        if step.layers_done == self._num_attention_layers and step.pending_evictions:
            self._evict_all(step)

    def _stats_of(self, observation: ObservedQueries) -> AttentionStats:
        """What the observation adds to, with room for its tokens."""
        state = observation.state
        if state.attention_stats is None:
            state.attention_stats = AttentionStats(
                state.config,
                self.pool.num_layers,
                self.pool.num_kv_heads,
                observation.tokens,
                self.pool.device,
                state.config.policy.evict_after if observation.num_blocks else 0,
            )
        elif state.attention_stats.tokens < observation.tokens:
            state.attention_stats.extend(observation.tokens)
        return state.attention_stats

    def _keys_of(
        self, step: EvictionStep, observation: ObservedQueries
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids of the blocks of the keys, int32 ``[n]``.

        Of a request whose layers have tables of their own, ids of the pages, int32
        ``[num_layers, n]``, and the number of keys of each layer, int32 ``[num_layers]``.
        """
        row = observation.row
        if observation.num_blocks:
            return step.block_table[row, : observation.num_blocks], None
        assert step.tables is not None
        return step.tables.block_table[:, row], step.num_keys[row]

    def take_reports(self) -> list[PendingReport]:
        """The reports since the last call, after the step has run."""
        assert self._step is None or self._step.layers_done == self._num_attention_layers, (
            "an attention layer of the last step was not seen, so nothing was evicted"
        )
        self._step = None
        reports, self._reports = self._reports, []
        return reports

    def _evict_all(self, step: EvictionStep) -> None:
        """Evict the step's requests together; `selection` says how."""
        pool, evictions = self.pool, step.pending_evictions
        stopwatch = Stopwatch(pool.device)
        with stopwatch:
            inputs = self._inputs(step)
            if self._readers is not None:
                for one in inputs:
                    one.observed.divide(self._readers)
            division = divide(inputs)
            kept_rows = [
                to_device(eviction.order.kept_blocks, pool.device) for eviction in evictions
            ]
            parts: list[Selection] = []
            for group in selections(inputs, division, self.tp_group.mean):
                moves = [
                    Move(
                        inputs[part.request].source.page_ids,
                        kept_rows[part.request],
                        division.kept_pages[part.request],
                        part.positions,
                        part.first_layer,
                    )
                    for part in group
                ]
                compact_all(pool, moves)
                if self._trace is not None:
                    parts += map(self._trace.recorded, group)
                del moves
                group.clear()  # so that the next one can use its memory
            live = self.requests.evicted_slots()
            for eviction, pages, row in zip(evictions, division.kept_pages, kept_rows, strict=True):
                self.tables.set_kept(eviction.state.slot, pages, row, live)
        self._report_all(evictions, inputs, division, stopwatch)
        if self._trace is not None:
            for index, (eviction, one) in enumerate(zip(evictions, inputs, strict=True)):
                selection = whole([part for part in parts if part.request == index])
                self._trace.write(eviction, one, division.of(index), selection)

    def _inputs(self, step: EvictionStep) -> list[EvictionInput]:
        """What each eviction of the step is decided on."""
        pool, evictions = self.pool, step.pending_evictions
        stats = []
        for eviction in evictions:
            state = eviction.state
            assert state.attention_stats is not None, (
                f"request {state.request_id} is to be evicted but was never observed"
            )
            stats.append(state.attention_stats)
        # One sum over the ranks for all requests of the step.
        dense_entries = self.tp_group.sum(torch.stack([one.dense_entries for one in stats]))
        if self._readers is not None:  # means over the attention layers that read a cache
            dense_entries = dense_entries.double() / self._readers
        slots = [one.state.slot if one.evicted_before else 0 for one in evictions]
        kept_before = self.tables.kept_pages(to_device(slots, pool.device))
        inputs = []
        for eviction, observed, dense, kept in zip(
            evictions, stats, dense_entries, kept_before, strict=True
        ):
            if step.tables is None:
                page_ids = pool.block_pages(step.block_table[eviction.row, : eviction.max_pages])
            else:
                page_ids = step.tables.block_table[:, eviction.row]
            source = EvictionSource.of(eviction, pool, page_ids, kept)
            inputs.append(
                EvictionInput(
                    eviction.state.config,
                    observed,
                    dense,
                    self._prompt(eviction, source),
                    self.num_heads,
                    eviction.num_queries,
                    len(eviction.order.kept_blocks),
                    source,
                    eviction.unobserved,
                )
            )
        return inputs

    def _report_all(
        self,
        evictions: Sequence[PendingEviction],
        inputs: Sequence[EvictionInput],
        division: Division,
        stopwatch: Stopwatch,
    ) -> None:
        """Note the reports of a step and forget what was observed.

        The requests share the time of the step by their tokens.
        """
        pool = self.pool
        tails = division.cached_tokens - division.num_tokens
        kept_tokens = division.kept_pages * pool.block_size + tails
        tokens = Fetched(torch.stack((kept_tokens, division.cached_tokens), 1))
        total = sum(one.prompt.tokens for one in inputs)
        for index, (eviction, one) in enumerate(zip(evictions, inputs, strict=True)):
            compaction = Stopwatch(pool.device)
            compaction.share(stopwatch, one.prompt.tokens / total)
            self._reports.append(
                partial(
                    _report,
                    one.observed.stopwatch,
                    compaction,
                    tokens,
                    index,
                    self._layer_numbers,
                )
            )
            eviction.state.attention_stats = None

    def _prompt(self, eviction: PendingEviction, source: EvictionSource) -> Prompt:
        """The tokens as policies see them; patch grids only where somebody reads them."""
        state = eviction.state
        policy = state.config.policy
        if not source.is_first:
            return Prompt(source.max_tokens, shard=self.shard, lengths=source.cached_tokens)
        grids = state.grids() if policy.wants_grids or self._trace is not None else ()
        if policy.wants_grids and not all(
            any(first <= grid.first < end for grid in grids) for first, end in state.visual
        ):
            logger.warning_once(
                "policy %s: the patch grid of an image is not known for this model; its tokens "
                "are treated as a sequence",
                policy.name,
            )
        return Prompt(source.max_tokens, state.visual, grids, self.shard)


def _first(number: int, tensor: torch.Tensor) -> torch.Tensor:
    """The first rows of a tensor; slicing costs time even where it changes nothing."""
    return tensor if tensor.shape[0] == number else tensor[:number]


def _report(
    observation: Stopwatch,
    compaction: Stopwatch | None = None,
    tokens: Fetched | None = None,
    index: int = 0,
    layer_numbers: Sequence[int] = (),
) -> EvictionReport:
    """Build a report; blocks until the device has finished the eviction.

    Args:
        observation, compaction: the request's times.
        tokens: of each layer after and before the evictions of a step, ``[R, 2, num_layers]``.
        index: of the request among them.
        layer_numbers: indices of the layers in the model.
    """
    if compaction is None or tokens is None:
        return EvictionReport(observation.seconds())
    after, before = tokens.wait()[index].tolist()
    ratios = {
        layer: kept / cached
        for layer, kept, cached in zip(layer_numbers, after, before, strict=True)
    }
    return EvictionReport(observation.seconds(), compaction.seconds(), ratios)
