# SPDX-License-Identifier: Apache-2.0
"""Which running requests are evicted while they decode, and to how many blocks.

For one of three reasons: a request's first eviction was deferred into its answer (``evict_after``);
it has generated as many tokens since its last eviction as ``every`` allows; or blocks are scarce
and it still holds its full cache (``--kv-compress-when pressure``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import EvictionPlan, Skip, whole_blocks

MOST_UNDER_PRESSURE = 4
"""Evictions of running requests in one step under pressure: each delays the whole batch."""

# A prompt that was not evicted for one of these reasons may be once its request has grown.
_GROWS = {
    None,
    Skip.SHORT_PROMPT,
    Skip.NO_SAVING,
    Skip.NO_POST_VISION_TOKENS,
    Skip.NO_PRESSURE,
    Skip.NO_OBSERVATION_ROOM,
}
FULL_CACHE = {Skip.NO_PRESSURE, Skip.NO_OBSERVATION_ROOM}
"""Why a request was left whole that is evicted when blocks run out."""


def room_under_pressure(num_running: int, most_kept: int) -> int:
    """Free blocks with which nobody need be evicted in this step because blocks may run out.

    What an eviction frees returns some steps later. Until then running requests take blocks, and
    further evictions their kept ones.

    Args:
        num_running: running requests.
        most_kept: the most blocks that one of their evictions keeps.
    """
    return 2 * (num_running + most_kept)


class Trigger(Enum):
    """What made the scheduler evict a request."""

    PREFILL = "prefill"
    EVERY = "every"
    PRESSURE = "pressure"


@dataclass(frozen=True)
class LaterEviction:
    """An eviction of a request that decodes."""

    trigger: Trigger
    evicted_tokens: int  # E, whole blocks
    kept_blocks: int  # M
    is_early: bool = False  # because blocks may run out, before it had to be


@dataclass(frozen=True)
class DeferredEviction:
    """The first eviction of a request that first generates some tokens (``evict_after``)."""

    prompt_tokens: int  # computed when the prefill ended
    at: int  # tokens that are computed when the step of the eviction ends, or more
    kept_blocks: int  # M, which the request already holds


@dataclass(frozen=True)
class AnswerBound:
    """How far a request's cache may grow between two evictions (setting ``every``)."""

    start: int  # E at which counting starts if the prompt is not evicted
    growth: int  # blocks
    kept_blocks: int  # M of every later eviction

    @property
    def most_blocks(self) -> int:
        """Blocks that a request holds at most between two evictions; the last need not be full.

        While one is carried out, its kept blocks are held, too.
        """
        return self.kept_blocks + self.growth + 1

    @classmethod
    def of(
        cls, config: KVCompressConfig, plan: EvictionPlan, prompt_tokens: int, block_size: int
    ) -> AnswerBound | None:
        """The bound of a request; None if it has none.

        Args:
            config: the request's settings.
            plan: what was decided at the end of its prefill.
            prompt_tokens: of the prompt, without generated tokens.
            block_size: tokens per block.
        """
        if config.every is None or config.budget >= 1.0 or plan.skip not in _GROWS:
            return None
        growth = cdiv(config.every, block_size)
        blocks = cdiv(prompt_tokens, block_size)
        return cls(blocks * block_size, growth, config.kept_blocks(blocks + growth, block_size))


class LaterEvictions:
    """Decides before each step; the block manager carries out what fits.

    Args:
        block_size: tokens per block.
        last_eviction: E and M of a request's last eviction, zeros if it has not been evicted.
        freed_by: blocks that return to the pool if a request's first E tokens are replaced: those
            that no other request holds.
        has_drafts: whether tokens of steps that have not been processed may be rejected.
    """

    def __init__(
        self,
        block_size: int,
        last_eviction: Callable[[str], tuple[int, int]],
        freed_by: Callable[[str, int], int],
        has_drafts: bool = False,
    ) -> None:
        self._block_size, self._last_eviction = block_size, last_eviction
        self._freed_by = freed_by
        self._has_drafts = has_drafts
        self._bounds: dict[str, AnswerBound] = {}
        self._deferred: dict[str, DeferredEviction] = {}
        # Computed tokens below which a bounded request has not reached its bound, by id.
        self._grows_until: dict[str, int] = {}
        self.due: dict[str, LaterEviction] = {}
        """Requests to evict if they are scheduled in the coming step, by id."""

    def bound(self, request_id: str) -> AnswerBound | None:
        """The bound of a decoding request; None if it has none."""
        return self._bounds.get(request_id)

    def set_bound(self, request_id: str, bound: AnswerBound | None) -> None:
        """The request's prefill ends."""
        if bound is not None:
            self._bounds[request_id] = bound

    def defer(self, request_id: str, deferred: DeferredEviction) -> None:
        """The request's prefill ends, and its eviction is to follow."""
        self._deferred[request_id] = deferred

    def is_deferred(self, request_id: str) -> bool:
        """Whether the request's first eviction is still to come."""
        return request_id in self._deferred

    def take(self, request_id: str) -> LaterEviction | None:
        """The eviction of a request that is scheduled; None if none is due."""
        later = self.due.pop(request_id, None)
        if later is not None:
            self._deferred.pop(request_id, None)
            self._grows_until.pop(request_id, None)
        return later

    def forget(self, request_id: str) -> None:
        """The request has ended or was preempted; unknown ids are fine."""
        self._bounds.pop(request_id, None)
        self._deferred.pop(request_id, None)
        self._grows_until.pop(request_id, None)
        self.due.pop(request_id, None)

    def plan_deferred(self, lookup: Callable[[str], Request | None], is_short: bool) -> None:
        """Start a step: find the requests whose answers have begun.

        Args:
            lookup: finds the scheduler's requests by id.
            is_short: whether a request may soon find no block. The request that has waited longest
                is then evicted early, before vLLM would preempt another.
        """
        self.due = {}
        early: dict[str, LaterEviction] = {}
        for request_id, deferred in self._deferred.items():
            request = lookup(request_id)
            if request is None:
                continue
            certain = self._certain_tokens(request)
            evicted = whole_blocks(certain, self._block_size)
            later = LaterEviction(Trigger.PREFILL, evicted, deferred.kept_blocks)
            if certain + 1 >= deferred.at:
                self.due[request_id] = later
            elif is_short and not early and certain >= deferred.prompt_tokens:
                early[request_id] = later
        self.due = self.due or early

    @property
    def most_kept(self) -> int:
        """The most blocks that the next eviction of a bounded request keeps."""
        return max((bound.kept_blocks for bound in self._bounds.values()), default=0)

    def plan_every(
        self,
        lookup: Callable[[str], Request | None],
        has_room: Callable[[int], bool],
        is_short: bool,
    ) -> None:
        """Add the requests that have reached their bound.

        Args:
            lookup: finds the scheduler's requests by id.
            has_room: whether so many more tokens may be under observation.
            is_short: as for `plan_deferred`. If nobody is evicted otherwise, the request that has
                grown most is.
        """
        observed, most_grown = 0, 0
        early: tuple[str, LaterEviction] | None = None
        for request_id, bound in self._bounds.items():
            request = lookup(request_id)
            if request is None or request_id in self._deferred:
                continue
            if request.num_computed_tokens < self._grows_until.get(request_id, 0) and not is_short:
                continue
            evicted_before, kept_before = self._last_eviction(request_id)
            evicted = whole_blocks(self._certain_tokens(request), self._block_size)
            start = evicted_before or bound.start
            self._grows_until[request_id] = start + bound.growth * self._block_size
            grown = (evicted - start) // self._block_size
            present = kept_before + (evicted - evicted_before) // self._block_size
            if bound.kept_blocks >= present:
                continue
            later = LaterEviction(Trigger.EVERY, evicted, bound.kept_blocks, grown < bound.growth)
            if later.is_early:
                if grown > most_grown:
                    most_grown, early = grown, (request_id, later)
                continue
            observed += self._observed(later)
            if has_room(observed):
                self.due[request_id] = later
        if is_short and not self.due and early is not None and has_room(self._observed(early[1])):
            self.due[early[0]] = early[1]

    def plan_pressure(
        self,
        running: Sequence[Request],
        decided: Callable[[str], EvictionPlan | None],
        config_of: Callable[[Request], KVCompressConfig],
        excess: Callable[[], int],
        free: int,
        has_room: Callable[[int], bool],
    ) -> None:
        """Add running requests that still hold their full cache, where blocks are scarce.

        They are if there is an excess, or if evictions would soon find no blocks for what they
        keep. Those that free most blocks come first; among equals, the ones that vLLM would preempt
        first.

        Args:
            running: in vLLM's order.
            decided: the decision at the end of a request's prefill; None while it runs.
            config_of: a request's settings.
            excess: blocks to free, more or less; 0 if the load is low. Only called if somebody can
                be evicted, because it asks for the prefix-cache hits of all waiting requests.
            free: blocks of the pool, of which evictions take their kept ones.
            has_room: whether so many more tokens may be under observation.
        """
        candidates: list[tuple[int, str, LaterEviction]] = []
        for request in reversed(running):
            request_id = request.request_id
            plan = decided(request_id)
            if plan is None or plan.skip not in FULL_CACHE or request_id in self.due:
                continue
            if self._last_eviction(request_id) != (0, 0):
                continue
            evicted = whole_blocks(self._certain_tokens(request), self._block_size)
            if evicted < whole_blocks(plan.prompt_tokens, self._block_size):
                continue  # its last chunk, which may be most of its cache, is in flight
            blocks = cdiv(request.num_computed_tokens, self._block_size)
            kept = config_of(request).kept_blocks(blocks, self._block_size)
            gain = self._freed_by(request_id, evicted) - kept
            if gain > 0:
                later = LaterEviction(Trigger.PRESSURE, evicted, kept)
                candidates.append((gain, request_id, later))
        if not candidates:
            return
        most_kept = max(later.kept_blocks for _, _, later in candidates)
        missing = max(excess(), room_under_pressure(len(running), most_kept) - free)
        candidates.sort(key=lambda candidate: -candidate[0])
        chosen = 0
        observed = sum(self._observed(later) for later in self.due.values())
        for gain, request_id, later in candidates:
            if missing <= 0 or chosen == MOST_UNDER_PRESSURE:
                break
            if later.kept_blocks > free or not has_room(observed + self._observed(later)):
                continue
            self.due[request_id] = later
            chosen += 1
            missing -= gain
            free -= later.kept_blocks
            observed += self._observed(later)

    def _observed(self, later: LaterEviction) -> int:
        """Bound of the tokens of each layer that an eviction observes."""
        return later.evicted_tokens + 2 * self._block_size

    def _certain_tokens(self, request: Request) -> int:
        """Computed tokens that no rejected draft can take back."""
        in_flight = request.num_in_flight_tokens if self._has_drafts else 0
        return max(0, request.num_computed_tokens - in_flight)
