# SPDX-License-Identifier: Apache-2.0
"""From a scheduled batch to what eviction must do in that step: host-side integers only.

Runner-neutral: the V1 and V2 adapters translate their batches into `BatchRow`s.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from vllm.utils.math_utils import cdiv

from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.worker.requests import RequestState


@dataclass(frozen=True)
class BatchRow:
    """One scheduled request as a model runner sees it."""

    state: RequestState
    num_computed: int  # before this step
    num_scheduled: int
    num_blocks: int  # length of its block-table row, kept blocks included


@dataclass(frozen=True)
class ObservedQueries:
    """Queries of one row whose attention is accumulated in this step."""

    row: int
    state: RequestState
    query_start: int  # index into the step's tokens
    query_end: int
    first_position: int  # position of the first of them
    num_blocks: int  # prompt blocks that hold their keys


@dataclass(frozen=True)
class PendingEviction:
    """A row whose prefill ends in this step and that the scheduler gave kept blocks."""

    row: int
    state: RequestState
    prompt_tokens: int
    prompt_blocks: int
    kept_blocks: int


@dataclass(frozen=True)
class StepPlan:
    """What `plan_step` found: host-side integers only."""

    observations: list[ObservedQueries]
    pending_evictions: list[PendingEviction]
    kept_whole: list[RequestState]  # observed, but the scheduler reserved no kept blocks
    any_evicted: bool
    table_width: int  # bound of any layer's pages of any row

    @property
    def is_plain(self) -> bool:
        """Whether vLLM's own path serves this step unchanged."""
        return not (self.observations or self.pending_evictions or self.any_evicted)


def plan_step(
    rows: Sequence[BatchRow],
    block_size: int,
    num_layers: int,
    admitted: Container[str] | None = None,
) -> StepPlan:
    """Find the rows to observe, the rows to evict, and whether layers need tables of their own.

    Args:
        rows: the batch.
        block_size: tokens of a block.
        num_layers: layers of the pool.
        admitted: ids of the requests that may be observed; None: all.

    The scheduler reserves M kept blocks in the step that ends a prefill. A row that is longer than
    its computed tokens need is therefore evicted in this step, and the surplus blocks are the M::

        E = 70 tokens, block size 32:   [prompt 3 blocks][kept 1 block]   N = 3, M = 1

    The states of these rows are updated, so that the next step sees them evicted.
    """
    observations, pending_evictions, kept_whole = [], [], []
    any_evicted, width, query_start = False, 1, 0
    for index, row in enumerate(rows):
        state, end = row.state, row.num_computed + row.num_scheduled
        if state.evicted_tokens:
            any_evicted = True
            kept_bound = min(
                state.evicted_tokens // block_size,
                state.kept_blocks * num_layers - (num_layers - 1),
            )
            width = max(width, kept_bound + cdiv(end - state.evicted_tokens, block_size))
        else:
            num_blocks = cdiv(end, block_size)
            width = max(width, num_blocks)
            # Rows may also be longer because draft tokens were rejected: not evicted then.
            kept_blocks = row.num_blocks - num_blocks if end == state.prefill_tokens else 0
            is_kept_whole = end >= state.prefill_tokens and kept_blocks <= 0
            if kept_blocks > 0:
                pending_evictions.append(
                    PendingEviction(index, state, end, num_blocks, kept_blocks)
                )
            if is_kept_whole and state.attention_stats is not None:
                kept_whole.append(state)
            if not is_kept_whole and (admitted is None or state.request_id in admitted):
                observation = _observe_row(index, row, query_start, block_size)
                if observation is not None:
                    observations.append(observation)
        query_start += row.num_scheduled
    for eviction in pending_evictions:
        state = eviction.state
        state.evicted_tokens = eviction.prompt_tokens
        state.prompt_blocks, state.kept_blocks = eviction.prompt_blocks, eviction.kept_blocks
    return StepPlan(observations, pending_evictions, kept_whole, any_evicted, width)


def _observe_row(
    index: int,
    row: BatchRow,
    query_start: int,
    block_size: int,
) -> ObservedQueries | None:
    state = row.state
    # A last chunk of one token may be scheduled together with draft tokens after the prefill.
    end = min(row.num_computed + row.num_scheduled, state.prefill_tokens)
    vision_end = state.vision_end
    if vision_end is None or row.num_computed >= state.prefill_tokens:
        return None
    config = state.config
    if not plan_eviction(config, block_size, state.prefill_tokens, vision_end).kept_blocks:
        return None  # the scheduler's rule is at least as strict
    first = max(row.num_computed, config.policy.observation_start(vision_end, state.prefill_tokens))
    if first >= end:
        return None
    before = query_start - row.num_computed  # index in the step that position 0 would have
    return ObservedQueries(index, state, before + first, before + end, first, cdiv(end, block_size))
