# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of its requests, from the start of a prefill to the request's end."""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sampling_params import SamplingParams

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import post_vision_start, visual_ranges
from vl_cache_vllm.core.patch_grids import patch_grids
from vl_cache_vllm.policy import PatchGrid
from vl_cache_vllm.worker.attention_stats import AttentionStats


@dataclass(eq=False)
class RequestState:
    """One request on this worker, from the start of its prefill to its end or preemption."""

    request_id: str
    slot: int  # row of the device buffer of kept pages, at least 1
    config: KVCompressConfig  # the engine's, with what the request changed
    vision_end: int | None  # position after the last visual token; None: never evicted
    prefill_tokens: int  # tokens known when the prefill started or restarted
    visual: tuple[tuple[int, int], ...] = ()  # (first, end) positions of each image
    grids: Callable[[], tuple[PatchGrid, ...]] = tuple

    attention_stats: AttentionStats | None = None  # from the first observed query to the eviction
    is_deferred: bool = False  # the prefill has ended, and the first eviction is still to come

    # Of the last eviction; 0 before the first.
    evicted_tokens: int = 0  # E: tokens that the kept blocks replace, whole blocks
    kept_blocks: int = 0  # M
    num_evictions: int = 0


def columns_of(states: Iterable[RequestState]) -> np.ndarray:
    """What a step needs to know of every request, int64 ``[4, R]``.

    The rows are the prefill's tokens, E, M, and the slot; the last three are 0 for a request that
    is not evicted.
    """
    columns = [
        (s.prefill_tokens, s.evicted_tokens, s.kept_blocks, s.slot)
        if s.evicted_tokens
        else (s.prefill_tokens, 0, 0, 0)
        for s in states
    ]
    return np.array(columns, np.int64).reshape(-1, 4).T


class RequestTable:
    """The states of the requests on this worker, by request id."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}
        self._by_slot: list[RequestState | None] = [None]  # no request has slot 0
        self._free_slots: list[int] = []
        self._columns = np.zeros((4, 1), np.int64)  # `columns_of` the requests, by slot

    def start(
        self,
        request_id: str,
        config: KVCompressConfig,
        vision_end: int | None,
        prefill_tokens: int,
        visual: tuple[tuple[int, int], ...] = (),
        grids: Callable[[], tuple[PatchGrid, ...]] = tuple,
    ) -> RequestState:
        """Return a fresh state for a request that starts or restarts its prefill."""
        self.drop(request_id)
        if not self._free_slots:
            num_slots = len(self._by_slot)
            self._free_slots = [*range(2 * num_slots - 1, num_slots - 1, -1)]
            self._by_slot += [None] * num_slots
            self._columns = np.concatenate((self._columns, np.zeros_like(self._columns)), 1)
        slot = self._free_slots.pop()
        state = RequestState(request_id, slot, config, vision_end, prefill_tokens, visual, grids)
        self._states[request_id] = self._by_slot[slot] = state
        self.note(state)
        return state

    def note(self, state: RequestState) -> None:
        """Take in that a request has been evicted."""
        self._columns[:, state.slot] = columns_of([state])[:, 0]

    def columns(self, slots: np.ndarray) -> np.ndarray:
        """`columns_of` the requests in some slots, a copy; zeros for slots without a request."""
        return self._columns[:, slots]

    def evicted_slots(self) -> list[int]:
        """Slots of the requests that have been evicted, those of this step included."""
        return np.flatnonzero(self._columns[2]).tolist()

    def in_slot(self, slot: int) -> RequestState:
        """The state of the request in a slot."""
        state = self._by_slot[slot]
        assert state is not None
        return state

    def add(
        self,
        request_id: str,
        config: KVCompressConfig,
        params: SamplingParams | None,
        features: Sequence[MultiModalFeatureSpec] | None,
        prefill_tokens: int,
        model: ModelConfig,
    ) -> RequestState:
        """`start` from what a model runner knows of a request; ``config`` is the engine's."""
        features = features or ()
        own = config.for_request(params)
        least = 1 + own.policy.evict_after
        decodes = params is not None and (params.max_tokens is None or params.max_tokens > least)
        return self.start(
            request_id,
            own,
            post_vision_start(config, features) if decodes else None,
            prefill_tokens,
            visual_ranges(features),
            partial(patch_grids, features, model),
        )

    def get(self, request_id: str) -> RequestState | None:
        """The state of a request; None for an unknown id."""
        return self._states.get(request_id)

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""
        if (state := self._states.pop(request_id, None)) is not None:
            self._free_slots.append(state.slot)
            self._by_slot[state.slot] = None
            self._columns[:, state.slot] = 0

    def drop_all_but(self, request_ids: Container[str]) -> None:
        """Forget requests whose id is not among ``request_ids``."""
        for request_id in [i for i in self._states if i not in request_ids]:
            self.drop(request_id)

    def __len__(self) -> int:
        return len(self._states)
