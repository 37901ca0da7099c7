# SPDX-License-Identifier: Apache-2.0
"""Block accounting of evicted requests.

Blocks of a request, N = 3 prompt blocks evicted to M = 1:

    prefill ends      [7, 8, 9] [4]            M blocks reserved with the last chunk
    step processed    [-, -, -] [4]            prompt blocks freed, hashes intact, null in place
    decode            [-, -, -] [4] [5] ...    positions >= E start in a fresh block

Owns: the decision (once per prefill), N, M, when prompt blocks are freed, and what admission keeps
free for the answers of evicted requests.
Does not own: which tokens survive, how the M x L pages are dealt to the layers (worker).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request, RequestStatus

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import (
    EvictionPlan,
    Skip,
    plan_eviction,
    post_vision_start,
)
from vl_cache_vllm.core.observation_budget import ObservationBudget
from vl_cache_vllm.core.output_reserve import OutputLengths, peak_blocks
from vl_cache_vllm.core.pressure import PressureGauge
from vl_cache_vllm.core.stats import EvictionStats


class EvictionBlockManager(FullAttentionManager):
    """`FullAttentionManager` that reserves, frees and stops hashing for evicted requests."""

    def __init__(self, kv_cache_spec, *args, **kwargs) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._config: KVCompressConfig = kv_cache_spec.kv_compress
        self.pressure = PressureGauge(self._config.pressure.high, self._config.pressure.low)
        self._lookup: Callable[[str], Request | None] = lambda _: None
        self._others: Sequence[SingleTypeKVCacheManager] = ()
        # Decided plans, also the negative ones: vLLM's end of prefill moves along with a decoding
        # request, so a rule asked again later would answer for tokens the worker has long decoded.
        self._decided: dict[str, EvictionPlan] = {}
        self._prompt_freed: set[str] = set()
        self.observation_budget = ObservationBudget()
        self._unobserved: set[str] = set()  # for want of room
        self._output_lengths = OutputLengths()
        self._stats = EvictionStats()  # since the last report
        self._reported = EvictionStats()  # what a report of no news would say
        self._totals = EvictionStats()  # of all reports

    def bind(
        self,
        lookup: Callable[[str], Request | None],
        others: Sequence[SingleTypeKVCacheManager] = (),
        observation_tokens: int | None = None,
    ) -> None:
        """Give the manager what vLLM's interface does not pass.

        Args:
            lookup: finds the scheduler's requests by id.
            others: the managers of the cache's other groups, which draw on the same pool.
            observation_tokens: bound of what workers observe at once; None: none.
        """
        self._lookup = lookup
        self._others = others
        self.observation_budget = ObservationBudget(observation_tokens)

    def plan(self, request: Request) -> EvictionPlan:
        """The decision about a request, or what it would be if its prefill ended now."""
        if decided := self._decided.get(request.request_id):
            return decided
        plan = self._possible_plan(request)
        if plan.kept_blocks and request.request_id in self._unobserved:
            return replace(plan, kept_blocks=0, skip=Skip.NO_OBSERVATION_ROOM)
        if plan.kept_blocks and self.decides_by_pressure and not self.pressure.is_on:
            return replace(plan, kept_blocks=0, skip=Skip.NO_PRESSURE)
        return plan

    def _possible_plan(self, request: Request) -> EvictionPlan:
        """The plan as far as the request alone decides it."""
        plan = plan_eviction(
            self._config.for_request(request.sampling_params),
            self.block_size,
            request.num_tokens,
            post_vision_start(self._config, request.mm_features),
            usable_blocks=self.block_pool.num_gpu_blocks
            - 1  # the null block
            - sum(_most_blocks(other, request.num_tokens + 1) for other in self._others),
            num_prompt_tokens=request.num_prompt_tokens,
        )
        if plan.kept_blocks and request.resumable:
            return replace(plan, kept_blocks=0, skip=Skip.STREAMING_INPUT)  # its prompt still grows
        if plan.kept_blocks and request.max_tokens <= 1:
            return replace(plan, kept_blocks=0, skip=Skip.NO_DECODE)
        return plan

    @property
    def decides_by_pressure(self) -> bool:
        return self._config.when == "pressure"

    def missing_blocks(self, request: Request) -> int:
        """Blocks that a request's prefill still takes from the pool, without the kept ones.

        Those of its prefix that others hold are there already.
        """
        if request.request_id in self._decided:
            return 0
        return self._missing_here(request) + self._missing_elsewhere(request)

    def _missing_here(self, request: Request) -> int:
        """Those of this group."""
        held = len(self.req_to_blocks.get(request.request_id, ()))
        if not held:
            held = sum(1 for _ in takewhile(self._is_held, request.block_hashes))
        return max(0, cdiv(request.num_tokens, self.block_size) - held)

    def _missing_elsewhere(self, request: Request) -> int:
        """The same of the other groups."""
        missing = 0
        for other in self._others:
            blocks = other.req_to_blocks.get(request.request_id, ())
            held = sum(1 for block in blocks if not block.is_null)
            missing += max(0, _most_blocks(other, request.num_tokens) - held)
        return missing

    def _is_held(self, block_hash: BlockHash) -> bool:
        cached = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
        return cached is not None and cached[0].ref_cnt > 0

    @property
    def blocks_held(self) -> int:
        """Blocks of requests that are evicted or being so."""
        return sum(
            self._num_held(request_id, plan)
            for request_id, plan in self._decided.items()
            if plan.kept_blocks
        )

    def _num_held(self, request_id: str, plan: EvictionPlan) -> int:
        """Blocks of a request's row without the null blocks in the place of its prompt."""
        freed = plan.prompt_blocks if request_id in self._prompt_freed else 0
        return len(self.req_to_blocks.get(request_id, ())) - freed

    def add_reports(self, reports: Sequence[dict[str, Any]]) -> None:
        """Count what the worker has done."""
        self._stats.add_reports(reports)

    def take_stats(self) -> EvictionStats | None:
        """What happened since the last call; None if nothing did."""
        stats = self._current_stats()
        if stats == self._reported:
            return None
        self._reported = EvictionStats(blocks_held=stats.blocks_held, pressure=stats.pressure)
        self._stats = EvictionStats()
        self._totals += stats
        return stats

    @property
    def total_stats(self) -> EvictionStats:
        """Counts since start-up."""
        return self._totals + self._current_stats()

    def _current_stats(self) -> EvictionStats:
        is_on = self.pressure.is_on if self.decides_by_pressure else None
        return replace(self._stats, blocks_held=self.blocks_held, pressure=is_on)

    def max_hit_tokens(self, request: Request) -> int | None:
        """Longest prefix-cache hit that leaves all observed queries to be computed.

        None where the request will not be evicted and any hit is welcome. Under ``pressure`` that
        is not known before the prefill ends, so a request that may be is treated as one that will.
        """
        plan = self._possible_plan(request)
        if not plan.kept_blocks:
            return None
        start = self._observation_start(request, plan)
        # With drafts vLLM lengthens a prefill of one token by room for them: it must not be one.
        start = min(start, plan.prompt_tokens - 2)
        return start // self.block_size * self.block_size

    def _observation_start(self, request: Request, plan: EvictionPlan) -> int:
        """Position of the first observed query."""
        vision_end = post_vision_start(self._config, request.mm_features)
        assert vision_end is not None
        policy = self._config.for_request(request.sampling_params).policy
        return policy.observation_start(vision_end, plan.prompt_tokens)

    def _wants_room(self, request_id: str, num_tokens: int) -> EvictionPlan | None:
        """The plan of a request whose first observed query is among ``num_tokens``."""
        if self.observation_budget.tokens is None or request_id in self._decided:
            return None
        request = self._lookup(request_id)
        if (
            request is None
            or request_id in self.observation_budget
            or request_id in self._unobserved
        ):
            return None
        plan = self._possible_plan(request)
        if not plan.kept_blocks or num_tokens <= self._observation_start(request, plan):
            return None
        return plan

    def _waits_for_room(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request must not start yet, because others are being observed."""
        if self.observation_budget.is_empty:  # always, where observation is not bounded
            return False
        request = self._lookup(request_id)
        if request is None or request.status == RequestStatus.RUNNING:
            return False
        plan = self._wants_room(request_id, num_tokens)
        return plan is not None and not self.observation_budget.has_room(plan.prompt_tokens)

    def _plan_of(self, request_id: str) -> EvictionPlan | None:
        """`plan` by id; None for requests that the scheduler does not know."""
        request = self._lookup(request_id)
        return self._decided.get(request_id) or (self.plan(request) if request else None)

    def _token_slots(self, plan: EvictionPlan | None, num_tokens: int) -> int:
        """Tokens that a whole cache of the size needed for ``num_tokens`` would hold."""
        if plan is None or not plan.kept_blocks or num_tokens < plan.prompt_tokens:
            return num_tokens
        decode_blocks = cdiv(num_tokens - plan.prompt_tokens, self.block_size)
        return (plan.prompt_blocks + plan.kept_blocks + decode_blocks) * self.block_size

    def _free_for_answers(self, newcomer: Request) -> int:
        """Free blocks with which the pool is not expected to run out if one more is admitted.

        0 where none of them is evicted: admission is vLLM's alone. An evicted request is never
        counted with more blocks than its prompt had, whatever is expected of its answer. Less
        urgent requests (``--scheduling-policy priority``) make room by being preempted.
        """
        total = self.block_pool.num_gpu_blocks - 1  # one is the null block
        held = lasting = total - self.block_pool.get_num_free_blocks()
        answers = []
        for request_id in {*self.req_to_blocks, newcomer.request_id}:
            request = self._lookup(request_id)
            if request is None:
                continue
            plan = self.plan(request)
            if request.priority > newcomer.priority:
                lasting -= self._num_held(request_id, plan)
            elif plan.kept_blocks:
                lasting -= self._num_held(request_id, plan)
                answers.append(self._expected_answer(request, plan))
            elif request is newcomer:
                lasting += self._missing_here(request)  # vLLM adds what other groups need
            else:
                lasting += self.missing_blocks(request)
        return max(0, lasting) + peak_blocks(answers) - held if answers else 0

    def _expected_answer(self, request: Request, plan: EvictionPlan) -> tuple[int, int, int]:
        """Blocks of an evicted request and its answer so far, of what is still expected, at most.

        At most as many as its prompt had are counted.
        """
        generated = request.num_output_tokens
        coming = self._output_lengths.expected(generated, request.max_tokens) - generated
        decoded = max(0, request.num_tokens - plan.prompt_tokens)
        now = cdiv(decoded, self.block_size)
        end = cdiv(decoded + max(0, coming), self.block_size)
        return plan.kept_blocks + now, end - now, plan.prompt_blocks

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        if self._waits_for_room(request_id, num_tokens):
            return self.block_pool.num_gpu_blocks  # more than there are
        plan = self._plan_of(request_id)
        slots = self._token_slots(plan, num_tokens)
        num_blocks = super().get_num_blocks_to_allocate(request_id, slots, *args, **kwargs)
        # The step that ends an evicted prefill asks for one free block more than it takes. Decoding
        # starts in a fresh block, and under async scheduling it is scheduled while the prompt's
        # blocks are still held: without the reserve a request that just fitted would preempt
        # itself, over and over. (Slots exceed tokens from that step on, and never before.)
        ends_prefill = slots > num_tokens and request_id not in self._decided
        num_blocks += ends_prefill
        if kwargs.get("apply_admission_cap") and self._config.output_reserve:
            request = self._lookup(request_id)
            if request is not None and num_blocks <= self.block_pool.get_num_free_blocks():
                return max(num_blocks, self._free_for_answers(request))
        return num_blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        wanting = self._wants_room(request_id, num_tokens_main_model)
        if wanting is not None and self.observation_budget.has_room(wanting.prompt_tokens):
            self.observation_budget.admit(request_id, wanting.prompt_tokens)
        elif wanting is not None:
            self._unobserved.add(request_id)
        plan = self._plan_of(request_id)
        if (
            plan is not None
            and request_id not in self._decided
            and num_tokens_main_model >= plan.prompt_tokens
        ):
            self._decide(request_id, plan)
        slots = self._token_slots(plan, num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def _decide(self, request_id: str, plan: EvictionPlan) -> None:
        self._decided[request_id] = plan
        self._stats.decided(plan, self.block_size)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        plan = self._decided.get(request.request_id)
        if plan is not None and plan.kept_blocks:
            # Later blocks hold a request's private selection, not a prefix of anything.
            num_tokens = min(num_tokens, plan.prompt_tokens)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        plan = self._decided.get(request_id)
        if plan is None or processed_computed_tokens < plan.prompt_tokens:
            return
        self.observation_budget.release(request_id)
        if plan.kept_blocks and request_id not in self._prompt_freed:
            # The step that compacted is done: nobody reads this request's prompt pages any more.
            before = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, 0, plan.prompt_blocks)
            self._prompt_freed.add(request_id)
            self._stats.freed_blocks += self.block_pool.get_num_free_blocks() - before

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        plan, request = self._decided.pop(request_id, None), self._lookup(request_id)
        if plan and plan.kept_blocks and request and request.is_finished():
            self._output_lengths.add(request.num_output_tokens, request.max_tokens)
        self._prompt_freed.discard(request_id)
        self._unobserved.discard(request_id)
        self.observation_budget.release(request_id)
        return super().pop_blocks_for_free(request_id)


def _most_blocks(manager: SingleTypeKVCacheManager, num_tokens: int) -> int:
    """Blocks that another group's manager holds at most for so many tokens of one request."""
    blocks = cdiv(num_tokens, manager.block_size)
    most = manager.max_admission_blocks_per_request
    return blocks if most is None else min(blocks, most)
