# SPDX-License-Identifier: Apache-2.0
"""From a scheduled batch to what eviction must do in that step: host-side numbers only.

Runner-neutral: the V1 and V2 adapters translate their batches into `BatchRow`s.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import (
    plan_eviction,
    post_vision_start,
    visual_ranges,
)
from vl_cache_vllm.core.patch_grids import patch_grids
from vl_cache_vllm.ops.layer_tables import LayerTables
from vl_cache_vllm.policy import PatchGrid
from vl_cache_vllm.worker.attention_stats import AttentionStats


@dataclass(eq=False)
class RequestState:
    """One request on this worker, from the start of its prefill to its end or preemption."""

    request_id: str
    slot: int  # row of the device buffer of kept pages, at least 1
    config: KVCompressConfig  # the engine's, with what the request changed
    vision_end: int | None  # position after the last visual token
    prefill_tokens: int  # tokens known when prefill (re)started
    visual: tuple[tuple[int, int], ...] = ()  # (first, end) positions of each image
    grids: Callable[[], tuple[PatchGrid, ...]] = tuple

    observed: AttentionStats | None = None  # from the first observed query to the eviction

    # After eviction, all in tokens or blocks of the logical sequence; 0 before.
    evicted_tokens: int = 0  # E
    prompt_blocks: int = 0  # N
    kept_blocks: int = 0  # M


@dataclass(frozen=True)
class BatchRow:
    """One scheduled request as a runner sees it."""

    state: RequestState
    num_computed: int  # before this step
    num_scheduled: int
    num_blocks: int  # length of its block-table row


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


@dataclass(eq=False)
class EvictionStep:
    """Everything eviction does in one step. Tensors are on the device; L layers, R requests."""

    observations: list[ObservedQueries]
    pending_evictions: list[PendingEviction]
    block_table: torch.Tensor  # int32 [R, C], the runner's
    query_start_loc: torch.Tensor  # int32 [R + 1]
    tables: LayerTables | None  # None: no request of the batch is evicted, layers agree
    layers_done: int = field(default=0)


@dataclass(frozen=True)
class StepPlan:
    """Host-side result of planning."""

    observations: list[ObservedQueries]
    pending_evictions: list[PendingEviction]
    kept_whole: list[RequestState]  # observed, but not evicted
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
    """Find the rows to observe, to finish, and to read through per-layer tables.

    Args:
        rows: the batch.
        block_size: tokens of a block.
        num_layers: of the pool.
        admitted: ids of the requests that may be observed; None: all.

    A row longer than its computed tokens need ends its prefill in this step: the surplus are the
    M kept blocks that the scheduler reserved. Updates the states of finishing rows, so that the
    next step sees them evicted.
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
            # Longer rows elsewhere hold room for draft tokens that were rejected.
            kept_blocks = row.num_blocks - num_blocks if end == state.prefill_tokens else 0
            is_declined = end >= state.prefill_tokens and kept_blocks <= 0
            if kept_blocks > 0:
                pending_evictions.append(
                    PendingEviction(index, state, end, num_blocks, kept_blocks)
                )
            if is_declined and state.observed is not None:
                kept_whole.append(state)
            if not is_declined and (admitted is None or state.request_id in admitted):
                observation = _observe_row(index, row, query_start, block_size)
                if observation is not None:
                    observations.append(observation)
        query_start += row.num_scheduled
    for finish in pending_evictions:
        state = finish.state
        state.evicted_tokens = finish.prompt_tokens
        state.prompt_blocks, state.kept_blocks = finish.prompt_blocks, finish.kept_blocks
    return StepPlan(observations, pending_evictions, kept_whole, any_evicted, width)


def _observe_row(
    index: int,
    row: BatchRow,
    query_start: int,
    block_size: int,
) -> ObservedQueries | None:
    state = row.state
    # Beyond the prefill is room for drafts, in a last chunk of one token.
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
    before = query_start - row.num_computed  # token of the step at position 0
    return ObservedQueries(index, state, before + first, before + end, first, cdiv(end, block_size))


class RequestTable:
    """The states of the requests on this worker, by request id."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}
        self._free_slots: list[int] = []
        self._num_slots = 1  # slot 0 is nobody's

    def start(
        self,
        request_id: str,
        config: KVCompressConfig,
        vision_end: int | None,
        prefill_tokens: int,
        visual: tuple[tuple[int, int], ...] = (),
        grids: Callable[[], tuple[PatchGrid, ...]] = tuple,
    ) -> RequestState:
        """A fresh state for a request that starts or restarts its prefill."""
        self.drop(request_id)
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        state = RequestState(request_id, slot, config, vision_end, prefill_tokens, visual, grids)
        self._states[request_id] = state
        return state

    def arrive(
        self,
        request_id: str,
        config: KVCompressConfig,
        params: SamplingParams | None,
        features: Sequence[MultiModalFeatureSpec] | None,
        prefill_tokens: int,
        model: ModelConfig,
    ) -> RequestState:
        """`start` from what a runner knows of a request; ``config`` is the engine's."""
        features = features or ()
        decodes = params is not None and (params.max_tokens is None or params.max_tokens > 1)
        return self.start(
            request_id,
            config.for_request(params),
            post_vision_start(config, features) if decodes else None,
            prefill_tokens,
            visual_ranges(features),
            partial(patch_grids, features, model),
        )

    def get(self, request_id: str) -> RequestState | None:
        return self._states.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""
        if (state := self._states.pop(request_id, None)) is not None:
            self._free_slots.append(state.slot)

    def drop_all_but(self, request_ids: Container[str]) -> None:
        """Forget requests whose id is not among ``request_ids``."""
        for request_id in [i for i in self._states if i not in request_ids]:
            self.drop(request_id)

    def __len__(self) -> int:
        return len(self._states)
