# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of its requests, from the start of a prefill to the request's end."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

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


class RequestTable:
    """The states of the requests on this worker, by request id."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}
        self._free_slots: list[int] = []
        self._num_slots = 1  # no request has slot 0

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
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        state = RequestState(request_id, slot, config, vision_end, prefill_tokens, visual, grids)
        self._states[request_id] = state
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

    def drop_all_but(self, request_ids: Container[str]) -> None:
        """Forget requests whose id is not among ``request_ids``."""
        for request_id in [i for i in self._states if i not in request_ids]:
            self.drop(request_id)

    def __len__(self) -> int:
        return len(self._states)
