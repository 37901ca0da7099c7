# SPDX-License-Identifier: Apache-2.0
"""From a scheduled batch to what eviction must do in that step: host-side integers only.

Runner-neutral: the V1 and V2 adapters translate their batches into a `Batch`. Rows that decode are
planned as arrays; only those that prefill or are evicted cost time of their own. Numpy's reductions
are avoided: lists take less time, up to some hundred rows, and much less in a small batch on a CPU,
where the model's weights have replaced numpy's code in the caches.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

import numpy as np
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.worker.requests import RequestState, columns_of


@dataclass(frozen=True)
class BatchRow:
    """One scheduled request as a model runner sees it."""

    state: RequestState
    num_computed: int  # before this step
    num_scheduled: int


@dataclass(frozen=True)
class Batch:
    """The scheduled requests of a step, R rows in the order of a model runner."""

    request_ids: Sequence[str]  # R
    num_computed: np.ndarray  # int [R], before this step
    num_scheduled: np.ndarray  # int [R]
    columns: np.ndarray  # int64 [4, R], `columns_of` the requests before this step
    state: Callable[[int], RequestState]  # of a row

    @classmethod
    def of(cls, rows: Sequence[BatchRow]) -> "Batch":
        """The batch of some rows."""
        return cls(
            [row.state.request_id for row in rows],
            np.array([row.num_computed for row in rows], np.int64),
            np.array([row.num_scheduled for row in rows], np.int64),
            columns_of(row.state for row in rows),
            lambda row: rows[row].state,
        )

    def row(self, index: int) -> BatchRow:
        """One row."""
        computed, scheduled = self.num_computed[index], self.num_scheduled[index]
        return BatchRow(self.state(index), int(computed), int(scheduled))

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return sum(self.num_scheduled.tolist())


@dataclass(frozen=True)
class ObservedQueries:
    """Queries of one row whose attention is accumulated in this step."""

    row: int
    state: RequestState
    query_start: int  # index into the step's tokens
    query_end: int
    first_position: int  # index of the first query in the layers' caches; at most, if they differ
    num_blocks: int  # blocks that hold the keys; 0: the keys are found through the layers' tables
    tokens: int  # that are scored when the observation is complete

    @property
    def num_queries(self) -> int:
        return self.query_end - self.query_start


@dataclass(frozen=True)
class PendingEviction:
    """A row that the scheduler ordered to evict at the end of this step.

    A layer's cache consists of whole pages that the eviction replaces, and of a tail that stays
    where it is: the last tokens of the prompt, or of what was generated.
    """

    row: int
    state: RequestState
    order: EvictionOrder
    tokens: int  # logical tokens up to the last observed query
    num_queries: int  # observed
    unobserved: int  # tokens between the last observed query and the one before it
    evicted_before: int  # E of the eviction before; 0: this is the first
    kept_before: int  # M of the eviction before
    max_pages: int  # bound of the pages of any layer that this eviction replaces

    @property
    def tail(self) -> int:
        """Tokens up to the last observed query that stay where they are."""
        return self.tokens - self.order.evicted_tokens


@dataclass(frozen=True)
class StepPlan:
    """What `plan_step` found: host-side integers only."""

    observations: list[ObservedQueries]
    pending_evictions: list[PendingEviction]
    kept_whole: list[RequestState]  # observed, but not evicted at the end of the prefill
    needs_tables: bool  # whether the layers need tables of their own
    table_width: int  # bound of any layer's pages of any row

    @property
    def is_plain(self) -> bool:
        """Whether vLLM's own path serves this step unchanged."""
        return not (self.observations or self.pending_evictions or self.needs_tables)


def plan_step(
    batch: Batch,
    block_size: int,
    num_layers: int,
    admitted: Container[str] | None = None,
    orders: Mapping[str, EvictionOrder] | None = None,
    deferred: Container[str] = (),
) -> StepPlan:
    """Find the rows to observe, the rows to evict, and whether layers need tables of their own.

    A prefill is observed from its first observed query on. A request that is evicted later, while
    it decodes, is observed in that step alone, by its first query of the step; what its prompt's
    queries attended to counts as well if the eviction was deferred.

    The states of the rows to evict are updated, so that the next step sees them evicted.

    Args:
        batch: the rows of the step.
        block_size: tokens of a block.
        num_layers: layers of the pool.
        admitted: ids of the requests that may be observed; None: all.
        orders: by id, the requests to evict in this step.
        deferred: ids of the requests whose prefill ends in this step, but which are evicted later.
    """
    orders = orders or {}
    observations, pending_evictions, kept_whole = [], [], []
    prefill_tokens, evicted_tokens, kept_blocks, _ = batch.columns
    ends = batch.num_computed + batch.num_scheduled
    needs_tables = any(evicted_tokens.tolist())
    is_special = batch.num_computed < prefill_tokens
    if orders:
        is_special |= [request_id in orders for request_id in batch.request_ids]
    special = [*compress(range(len(ends)), is_special.tolist())]
    starts = [*accumulate(batch.num_scheduled.tolist(), initial=0)] if special else []
    for index in special:
        row, query_start = batch.row(index), starts[index]
        state, order = row.state, orders.get(row.state.request_id)
        max_pages = 0
        if order is not None:
            pages = _max_pages(
                evicted_tokens[index],
                kept_blocks[index],
                order.evicted_tokens,
                block_size,
                num_layers,
            )
            max_pages = int(pages)
        unobserved = 0
        if row.num_computed < state.prefill_tokens:
            ends_prefill = row.num_computed + row.num_scheduled >= state.prefill_tokens
            state.is_deferred = ends_prefill and state.request_id in deferred
            ends_whole = ends_prefill and order is None and not state.is_deferred
            if ends_whole and state.attention_stats is not None:
                kept_whole.append(state)
            if observes_prefill(row, block_size, admitted, orders, deferred):
                observations.append(_observe_prefill(index, row, query_start, block_size))
            if order is not None:
                first = _observation_start(state)
                tokens, num_queries = state.prefill_tokens, state.prefill_tokens - first
        elif order is not None:
            needs_tables = True
            tokens, num_queries = row.num_computed + 1, 1
            if state.is_deferred:
                num_queries += state.prefill_tokens - _observation_start(state)
                unobserved = row.num_computed - state.prefill_tokens
                state.is_deferred = False
            most_tokens = max_pages * block_size + tokens - order.evicted_tokens
            observations.append(_observe_decode(index, state, query_start, most_tokens))
        if order is not None:
            pending_evictions.append(
                PendingEviction(
                    index,
                    state,
                    order,
                    tokens,
                    num_queries,
                    unobserved,
                    state.evicted_tokens,
                    state.kept_blocks,
                    max_pages,
                )
            )
    for eviction in pending_evictions:
        state = eviction.state
        state.evicted_tokens = eviction.order.evicted_tokens
        state.kept_blocks = len(eviction.order.kept_blocks)
        state.num_evictions += 1
    width = table_width(batch.columns, ends, block_size, num_layers)
    return StepPlan(observations, pending_evictions, kept_whole, needs_tables, width)


def table_width(columns: np.ndarray, ends: np.ndarray, block_size: int, num_layers: int) -> int:
    """Bound of the pages of any layer of some requests, at least 1.

    Args:
        columns: of the requests, int64 ``[4, R]`` (`columns_of`).
        ends: logical tokens of each after the step, int ``[R]``.
        block_size: tokens of a block.
        num_layers: layers of the pool.
    """
    _, evicted_tokens, kept_blocks, _ = columns
    pages = _max_pages(evicted_tokens, kept_blocks, ends, block_size, num_layers)
    return max([1, *pages.tolist()])


def observes_prefill(
    row: BatchRow,
    block_size: int,
    admitted: Container[str] | None,
    orders: Container[str],
    deferred: Container[str],
) -> bool:
    """Whether a row that prefills is observed in this step; arguments as for `plan_step`."""
    state, end = row.state, row.num_computed + row.num_scheduled
    request_id, vision_end = state.request_id, state.vision_end
    if vision_end is None or not (admitted is None or request_id in admitted):
        return False
    if end >= state.prefill_tokens and request_id not in orders and request_id not in deferred:
        return False  # it ends whole
    if not plan_eviction(state.config, block_size, state.prefill_tokens, vision_end).kept_blocks:
        return False  # the scheduler's rule is at least as strict
    first, end = _observed_positions(row)
    return first < end


def _max_pages(
    evicted_tokens: np.ndarray,
    kept_blocks: np.ndarray,
    tokens: np.ndarray | int,
    block_size: int,
    num_layers: int,
) -> np.ndarray:
    """Bound of the pages in which any layer stores the first ``tokens`` logical tokens, ``[R]``."""
    evicted_blocks = evicted_tokens // block_size
    # Every layer has at least one of the kept pages.
    most_kept = kept_blocks * num_layers - (num_layers - 1)
    kept = np.maximum(0, np.minimum(evicted_blocks, most_kept))
    return (tokens + block_size - 1) // block_size - evicted_blocks + kept


def _observation_start(state: RequestState) -> int:
    """Position of the first observed query of a prefill."""
    assert state.vision_end is not None
    return state.config.policy.observation_start(state.vision_end, state.prefill_tokens)


def _observed_positions(row: BatchRow) -> tuple[int, int]:
    """First and end position of the queries of a prefill that are observed in this step."""
    # A last chunk of one token may be scheduled together with draft tokens after the prefill.
    end = min(row.num_computed + row.num_scheduled, row.state.prefill_tokens)
    return max(row.num_computed, _observation_start(row.state)), end


def _observe_prefill(
    index: int, row: BatchRow, query_start: int, block_size: int
) -> ObservedQueries:
    first, end = _observed_positions(row)
    before = query_start - row.num_computed  # index in the step that position 0 would have
    return ObservedQueries(
        index,
        row.state,
        before + first,
        before + end,
        first,
        cdiv(end, block_size),
        row.state.prefill_tokens,
    )


def _observe_decode(
    index: int, state: RequestState, query_start: int, most_tokens: int
) -> ObservedQueries:
    """The first query of the step; draft tokens behind it may be rejected."""
    return ObservedQueries(
        index, state, query_start, query_start + 1, most_tokens - 1, 0, most_tokens
    )
