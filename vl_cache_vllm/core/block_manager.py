# SPDX-License-Identifier: Apache-2.0
"""Block accounting of evicted requests.

Blocks of a request, block size 32. A prompt of 70 tokens is evicted to M = 1 kept block. Later the
request, then of 140 tokens, is evicted again::

                            row of vLLM          kept blocks
    prefill ends            [7, 8, 9]            [4]         the step orders: replace E = 64 tokens
    step processed          [-, -, 9]            [4]         freed, hashes intact, null in place
    decoding                [-, -, 9, 5, 6]      [4]
    evicted again           [-, -, 9, 5, 6]      [4] [2]     the step orders: replace E = 128 tokens
    step processed          [-, -, -, -, 6]      [2]

The row is vLLM's own: token t is in column t // 32. The tail, what stands behind the last whole
block, stays where it is.

Owns: the kept blocks, when replaced blocks are freed, and what is hashed.
Does not own: which requests are evicted (`decisions`, `later_evictions`), how many blocks admission
reserves (`output_reserve`), which tokens survive and how the M x L pages are divided among the
layers (worker).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import EvictionPlan, Skip, whole_blocks
from vl_cache_vllm.core.connectors import ConnectorGuard, hands_over
from vl_cache_vllm.core.decisions import EvictionDecisions
from vl_cache_vllm.core.later_evictions import (
    FULL_CACHE,
    AnswerBound,
    DeferredEviction,
    LaterEvictions,
    Trigger,
    room_under_pressure,
)
from vl_cache_vllm.core.observation_budget import ObservationBudget
from vl_cache_vllm.core.output_reserve import EvictedOutput, EvictedOutputs, OutputReserve
from vl_cache_vllm.core.pressure import PrefillDemand
from vl_cache_vllm.core.stats import EvictionStats, OrderedEviction
from vl_cache_vllm.messages import EvictionOrder

STEPS_UNTIL_FREED = 3
"""Steps from the decision to evict to the one that can use the freed blocks, at most."""


@dataclass(frozen=True)
class ReplacedBlocks:
    """What an eviction replaced, until its step has been processed."""

    safe_at: int  # processed tokens of the request from which on nothing reads them
    columns: int  # of the row, from its start; earlier evictions may have freed some
    kept: list[KVCacheBlock]  # kept blocks of the eviction before


@dataclass
class EvictedBlocks:
    """What the evictions of a request left of its blocks."""

    hashed_tokens: int  # E of the first eviction: nothing behind it is hashed
    evicted_tokens: int = 0  # E of the last one
    kept: list[KVCacheBlock] = field(default_factory=list)  # that replace them
    freed_columns: int = 0  # of the row, from its start
    to_free: deque[ReplacedBlocks] = field(default_factory=deque)

    @property
    def blocks_to_free(self) -> list[KVCacheBlock]:
        """Replaced kept blocks that are not free yet."""
        return [block for replaced in self.to_free for block in replaced.kept]


class EvictionBlockManager(FullAttentionManager):
    """`FullAttentionManager` with kept blocks, which frees what they replace and hashes no more."""

    # vLLM then warns that --prefix-match-unit has no effect: parts of blocks are not cached here.
    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def __init__(self, kv_cache_spec, *args, **kwargs) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._config: KVCompressConfig = kv_cache_spec.kv_compress
        self._evicted: dict[str, EvictedBlocks] = {}
        # Of requests whose first eviction is deferred: the blocks that will be their kept ones.
        self._reserved: dict[str, list[KVCacheBlock]] = {}
        # Of the step that is being scheduled.
        self._orders: dict[str, tuple[EvictionOrder, OrderedEviction]] = {}
        self._newly_deferred: list[str] = []
        # Requests about whose prompt is decided, and that still hold what an eviction replaced or
        # are counted as observed.
        self._unsettled: set[str] = set()
        self._output_reserve = OutputReserve(self.block_size)
        self._outputs = EvictedOutputs(self.block_size)
        self._stats = EvictionStats()  # since the last report
        self._reported = EvictionStats()  # what a report without news would say
        self._totals = EvictionStats()  # of all reports
        self.bind(lambda _: None)  # until the scheduler, which vLLM creates later, binds its own

    def bind(
        self,
        lookup: Callable[[str], Request | None],
        others: Sequence[SingleTypeKVCacheManager] = (),
        observation_tokens: int | None = None,
        has_drafts: bool = False,
        connector: KVConnectorBase_V1 | None = None,
    ) -> None:
        """Give the manager what vLLM's interface does not pass.

        Args:
            lookup: finds the scheduler's requests by id.
            others: the managers of the cache's other groups, which draw on the same pool.
            observation_tokens: bound of what workers observe at once; None: not bounded.
            has_drafts: whether the engine decodes speculatively.
            connector: the scheduler's KV connector.
        """
        self._lookup = lookup
        self.decisions = EvictionDecisions(
            self._config,
            self,
            lookup,
            others,
            ObservationBudget(observation_tokens),
            hands_over(connector),
        )
        self.connector = ConnectorGuard(
            connector, self.decisions.max_hit_tokens, self.block_size, bool(others)
        )
        self._decided = self.decisions.decided_plans
        self._prefill_demand = PrefillDemand(self, others)
        self._num_others = len(others)
        self.later = LaterEvictions(
            self.block_size, self._last_eviction, self._freed_by, has_drafts
        )

    def missing_blocks(self, request: Request) -> int:
        """Blocks that a request's prefill still takes from the pool, without the kept ones."""
        if self.decisions.decided(request.request_id) is not None:
            return 0
        return self._prefill_demand.blocks(request)

    def plan_later_evictions(self, running: Sequence[Request], demands: Callable[[], int]) -> None:
        """Start a step: decide which running requests are to be evicted in it.

        Args:
            running: in vLLM's order.
            demands: blocks that unfinished prefills still ask for.
        """
        budget = self.decisions.observation_budget
        is_short = self._is_short(running)
        self.later.plan_deferred(self._lookup, is_short)
        self.later.plan_every(self._lookup, budget.has_room, is_short)
        if self.decisions.by_pressure:
            is_on = self.decisions.pressure.is_on
            usable = self.block_pool.num_gpu_blocks - 1  # one is the null block
            free = self.block_pool.get_num_free_blocks()
            if not is_on:
                if free > usable // 2:
                    return
                # An eviction keeps less than its request has.
                longest = max((request.num_computed_tokens for request in running), default=0)
                most_kept = cdiv(longest, self.block_size)
                if free >= room_under_pressure(len(running), most_kept):
                    return

            def excess() -> int:
                if not is_on:
                    return 0
                used = usable - free - self._blocks_to_free()
                return used + demands() - int(self._config.pressure.high * usable)

            self.later.plan_pressure(
                running,
                self.decisions.decided,
                lambda request: self._config.for_request(request.sampling_params),
                excess,
                free,
                budget.has_room,
            )

    def take_orders(self) -> dict[str, EvictionOrder]:
        """The evictions of the step that has been scheduled, by request id.

        They are counted here: a preemption later in the same step withdraws its victim's.
        """
        orders, self._orders = self._orders, {}
        for _, counted in orders.values():
            self._stats.add_eviction(counted)
        return {request_id: order for request_id, (order, _) in orders.items()}

    def take_deferred(self) -> list[str]:
        """The requests whose prefill ends in the scheduled step and whose eviction follows."""
        deferred, self._newly_deferred = self._newly_deferred, []
        return deferred

    # ----------------------------------------------------------------------------------------------
    # What vLLM's coordinator calls

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args,
        **kwargs,
    ) -> int:
        """vLLM's, plus the M kept blocks, a free block for decoding, and the output reserve."""
        is_capped = kwargs.get("apply_admission_cap", False)
        if (
            request_id in self._decided
            and request_id not in self.later.due
            and request_id in self.num_cached_block
            and not is_capped
        ):  # what vLLM's returns for a running request
            return max(cdiv(num_tokens, self.block_size) - len(self.req_to_blocks[request_id]), 0)
        is_loading = self.connector.is_loading(request_id)
        has_blocks = bool(self.req_to_blocks.get(request_id))
        uncounted = 0
        if is_loading or (is_capped and has_blocks and self.connector.is_used):
            request = self._lookup(request_id)
            assert request is not None
            uncounted = self._prefill_demand.uncounted(
                request, num_tokens, total_computed_tokens, is_capped
            )
            if is_loading:
                # It cannot be preempted while it waits. So that it will go on, whatever others have
                # been admitted by then, its whole prefill must fit before it gets any blocks.
                num_tokens = max(num_tokens, request.num_tokens)
        if not is_loading and self.decisions.must_wait(request_id, num_tokens):
            return self.block_pool.num_gpu_blocks  # more than there are
        num_blocks = uncounted + super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        if (later := self.later.due.get(request_id)) is not None:
            if request_id in self._reserved:
                return num_blocks
            with_kept = num_blocks + later.kept_blocks
            if later.trigger is Trigger.PRESSURE or later.is_early or num_blocks == 0:
                # Nobody is preempted so that another is evicted. A bound does not need it while the
                # last block has room.
                room = self.block_pool.get_num_free_blocks() - self._num_others
            else:  # others are, so that a bound holds, but the request itself is not
                room = self.block_pool.num_gpu_blocks - 1 - self._num_held(request_id)
            if with_kept <= room:
                return with_kept
            del self.later.due[request_id]
        plan = self.decisions.plan_of(request_id)
        if (
            plan is not None
            and plan.kept_blocks
            and num_tokens >= plan.prompt_tokens
            and self.decisions.decided(request_id) is None
        ):
            # The step that ends an evicted prefill asks for one free block more than it takes. With
            # async scheduling the next step is scheduled while the prompt's blocks are still held:
            # without the reserve a request that just fitted would preempt itself, over and over.
            num_blocks += plan.kept_blocks + 1
        # Requests that have blocks were admitted before their load.
        if is_capped and self._config.output_reserve and not has_blocks:
            request = self._lookup(request_id)
            if request is not None and num_blocks <= self.block_pool.get_num_free_blocks():
                return max(num_blocks, self._free_blocks_for(request))
        return num_blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """vLLM's, plus the M kept blocks in a step that evicts the request."""
        if request_id in self._decided and request_id not in self.later.due:
            if num_tokens <= len(self.req_to_blocks[request_id]) * self.block_size:
                return []  # most steps; vLLM's allocates nothing then
            blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            if request_id in self._evicted:
                self._outputs.set_held(request_id, self._num_held(request_id))
            return blocks
        if self.connector.is_loading(request_id):  # its end is computed in a later step
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        self.decisions.admit_to_observation(request_id, num_tokens_main_model)
        plan = self.decisions.plan_of(request_id)
        if later := self.later.take(request_id):
            request = self._lookup(request_id)
            assert request is not None
            self._order(
                request_id,
                later.trigger,
                later.evicted_tokens,
                later.kept_blocks,
                safe_at=request.num_computed_tokens + 1,
            )
        elif (
            plan is not None
            and self.decisions.decided(request_id) is None
            and num_tokens_main_model >= plan.prompt_tokens
        ):
            self.decisions.decide(request_id, plan)
            self._unsettled.add(request_id)
            bound = self._bound_of(request_id, plan)
            self.later.set_bound(request_id, bound)
            if plan.skip is not None:
                self._stats.skipped[plan.skip.value] += 1
            else:
                # After a preemption the prefill includes generated tokens.
                kept = min(plan.kept_blocks, bound.kept_blocks) if bound else plan.kept_blocks
                self._evict_prompt(request_id, plan, kept)
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if request_id in self._evicted:
            self._put_output(request_id)
        return blocks

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """vLLM's, without the blocks after an eviction: they are no prefix of anything."""
        if (evicted := self._evicted.get(request.request_id)) is not None:
            num_tokens = min(num_tokens, evicted.hashed_tokens)
        if self.num_cached_block.get(request.request_id, 0) >= num_tokens // self.block_size:
            return  # most steps; vLLM's returns then, too
        plan = self.decisions.plan_of(request.request_id)
        if plan is not None and plan.kept_blocks:
            # Cache the blocks before each such block, then step over it.
            for index in self._renew_cached_copies(request, num_tokens):
                super().cache_blocks(
                    request,
                    index * self.block_size,
                    retention_interval,
                    replay_boundaries=replay_boundaries,
                )
                self.num_cached_block[request.request_id] = index + 1
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Frees what an eviction replaced once its step has been processed.

        Full attention itself skips nothing, so there is no call of the base.
        """
        if request_id not in self._unsettled:
            return
        plan, evicted = self.decisions.decided(request_id), self._evicted.get(request_id)
        assert plan is not None
        is_observed = processed_computed_tokens < plan.prompt_tokens or self.later.is_deferred(
            request_id
        )
        if not is_observed:
            self.decisions.observation_budget.release(request_id)
        if evicted is not None and evicted.to_free:
            self._free_replaced(request_id, evicted, processed_computed_tokens)
        if not is_observed and not (evicted is not None and evicted.to_free):
            self._unsettled.remove(request_id)

    def _free_replaced(
        self, request_id: str, evicted: EvictedBlocks, processed_computed_tokens: int
    ) -> None:
        """Free what evictions replaced whose steps have been processed."""
        if processed_computed_tokens < evicted.to_free[0].safe_at:
            return
        if self.connector.is_reading(request_id):
            return  # asked again in the request's next step
        self.connector.forget_blocks(request_id)
        before = self.block_pool.get_num_free_blocks()
        while evicted.to_free and processed_computed_tokens >= evicted.to_free[0].safe_at:
            replaced = evicted.to_free.popleft()
            self._remove_blocks_in_range(request_id, evicted.freed_columns, replaced.columns)
            self.block_pool.free_blocks(replaced.kept)
            evicted.freed_columns = replaced.columns
        self._outputs.set_held(request_id, self._num_held(request_id))
        self._stats.freed_blocks += self.block_pool.get_num_free_blocks() - before

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's, with the kept blocks, and forgets the request."""
        evicted, request = self._evicted.pop(request_id, None), self._lookup(request_id)
        if self.later.is_deferred(request_id) and request and request.is_finished():
            self._stats.skipped[Skip.SHORT_OUTPUT.value] += 1
        self.decisions.forget(request_id)
        self.connector.forget(request_id)
        self.later.forget(request_id)
        self._outputs.discard(request_id)
        self._unsettled.discard(request_id)
        self._orders.pop(request_id, None)
        if request_id in self._newly_deferred:
            self._newly_deferred.remove(request_id)
        blocks = [*self._reserved.pop(request_id, ()), *super().pop_blocks_for_free(request_id)]
        if evicted is None:
            return blocks
        if request and request.is_finished():
            self._output_reserve.lengths.add(request.num_output_tokens, request.max_tokens)
        return [*evicted.blocks_to_free, *evicted.kept, *blocks]

    # ----------------------------------------------------------------------------------------------
    # Blocks

    def _evict_prompt(self, request_id: str, plan: EvictionPlan, num_kept: int) -> None:
        """The prefill of a request ends in this step: evict it now, or after some tokens."""
        request = self._lookup(request_id)
        assert request is not None
        evict_at = self._evict_at(request)
        if evict_at > plan.prompt_tokens:
            # Taken now, so that there is room for them then.
            self._reserved[request_id] = self._take_kept_blocks(num_kept)
            deferred = DeferredEviction(plan.prompt_tokens, evict_at, num_kept)
            self.later.defer(request_id, deferred)
            self._newly_deferred.append(request_id)
            return
        evicted_tokens = whole_blocks(plan.prompt_tokens, self.block_size)
        self._order(
            request_id, Trigger.PREFILL, evicted_tokens, num_kept, safe_at=plan.prompt_tokens
        )

    def _order(
        self, request_id: str, trigger: Trigger, evicted_tokens: int, num_kept: int, safe_at: int
    ) -> None:
        """Evict a request in the step that is being scheduled: take its M kept blocks."""
        evicted = self._evicted.setdefault(request_id, EvictedBlocks(evicted_tokens))
        self._unsettled.add(request_id)
        assert evicted_tokens > evicted.evicted_tokens
        columns = (evicted_tokens - evicted.evicted_tokens) // self.block_size
        present = len(evicted.kept) + columns
        blocks = present + (safe_at > evicted_tokens)  # the last block may stay where it is
        freed_tokens = (present - num_kept) * self.block_size
        counted = OrderedEviction(trigger, not evicted.kept, num_kept, blocks, freed_tokens)
        end = evicted_tokens // self.block_size
        evicted.to_free.append(ReplacedBlocks(safe_at, end, evicted.kept))
        reserved = self._reserved.pop(request_id, None)
        evicted.kept = reserved or self._take_kept_blocks(num_kept)
        evicted.evicted_tokens = evicted_tokens
        ids = tuple(block.block_id for block in evicted.kept)
        self._orders[request_id] = EvictionOrder(evicted_tokens, ids), counted

    def _take_kept_blocks(self, number: int) -> list[KVCacheBlock]:
        blocks = self.block_pool.get_new_blocks(number)
        self.connector.on_blocks_taken(blocks)
        return blocks

    def _last_eviction(self, request_id: str) -> tuple[int, int]:
        """E and M of a request's last eviction; zeros if it has not been evicted."""
        evicted = self._evicted.get(request_id)
        return (evicted.evicted_tokens, len(evicted.kept)) if evicted else (0, 0)

    def _freed_by(self, request_id: str, evicted_tokens: int) -> int:
        """Blocks that would return to the pool with the first tokens of a full cache."""
        blocks = self.req_to_blocks.get(request_id, ())[: evicted_tokens // self.block_size]
        return sum(block.ref_cnt == 1 for block in blocks)

    def _is_short(self, running: Sequence[Request]) -> bool:
        """Whether blocks may run out in the steps that an eviction takes to return some."""
        kept = self.later.most_kept
        if not (self._reserved or kept) or self._blocks_to_free():
            return False
        needed = sum(
            -request.num_computed_tokens % self.block_size < STEPS_UNTIL_FREED
            for request in running
        )
        needed *= 1 + self._num_others  # groups have blocks of one size
        return needed + kept > self.block_pool.get_num_free_blocks()

    def _blocks_to_free(self) -> int:
        """Blocks that evictions have replaced and that are not free yet."""
        return sum(
            self._freed_by(request_id, evicted.evicted_tokens) + len(evicted.blocks_to_free)
            for request_id, evicted in self._evicted.items()
            if evicted.to_free and not self.connector.is_reading(request_id)
        )

    def _bound_of(self, request_id: str, plan: EvictionPlan) -> AnswerBound | None:
        request = self._lookup(request_id)
        if request is None:
            return None
        config = self._config.for_request(request.sampling_params)
        return AnswerBound.of(config, plan, request.num_prompt_tokens, self.block_size)

    def _num_held(self, request_id: str) -> int:
        """Blocks of a request, without the null blocks in its row."""
        num_blocks = len(self.req_to_blocks.get(request_id, ()))
        num_blocks += len(self._reserved.get(request_id, ()))
        if (evicted := self._evicted.get(request_id)) is None:
            return num_blocks
        kept = len(evicted.kept) + len(evicted.blocks_to_free)
        return num_blocks - evicted.freed_columns + kept

    def _renew_cached_copies(self, request: Request, num_tokens: int) -> list[int]:
        """Indices of a request's new full blocks whose contents the prefix cache already has.

        There is at least one new full block.

        A shortened hit recomputes the observed part of a cached prompt. A second copy in the
        prefix cache would be announced (KV events) as if it were new, and its removal as if it were
        the only one. The first copy is renewed instead, as by a hit: touched and freed, it moves to
        the end of the free queue.
        """
        start, end = self.num_cached_block.get(request.request_id, 0), num_tokens // self.block_size
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        indices, copies = [], []
        for index in range(start, end):
            cached = self.block_pool.get_cached_block(hashes[index], [self.kv_cache_group_id])
            if cached is not None:
                indices.append(index)
                copies.append(cached[0])
        self.block_pool.touch(copies)
        self.block_pool.free_blocks(reversed(copies))
        return indices

    @property
    def blocks_held(self) -> int:
        """Blocks of requests that are evicted, or will be when their step ends."""
        return self._outputs.blocks_held

    def _free_blocks_for(self, newcomer: Request) -> int:
        """Free blocks that the output reserve asks for if this request is admitted."""
        if self.req_to_blocks.keys() <= {newcomer.request_id}:
            return 0  # no request's end is worth waiting for

        def demand(request: Request) -> int:
            if request is newcomer:  # vLLM adds what other groups need
                return self._prefill_demand.blocks_of_evicted_group(request)
            return self.missing_blocks(request)

        total = self.block_pool.num_gpu_blocks - 1  # one is the null block
        return self._output_reserve.free_blocks_for(
            newcomer,
            self._outputs,
            self._others(newcomer),
            demand,
            total - self.block_pool.get_num_free_blocks(),
        )

    def _others(self, newcomer: Request) -> Iterator[tuple[Request, EvictedOutput | None, int]]:
        """Requests that hold blocks and have not been evicted, and the newcomer."""
        for request_id in {*self.req_to_blocks, newcomer.request_id}.difference(self._evicted):
            request = self._lookup(request_id)
            if request is not None:
                yield request, self._coming_output(request), self._num_held(request_id)

    def _put_output(self, request_id: str) -> None:
        """Note how an evicted request grows from now on."""
        request, evicted = self._lookup(request_id), self._evicted[request_id]
        plan = self.decisions.decided(request_id)
        assert request is not None and plan is not None
        bound = self.later.bound(request_id)
        output = EvictedOutput(evicted.evicted_tokens, len(evicted.kept), plan.prompt_blocks, bound)
        self._outputs.put(request, output, self._num_held(request_id))

    def _coming_output(self, request: Request) -> EvictedOutput | None:
        """How a request grows that will be evicted; None for one that keeps its cache.

        Under pressure, a request that only the load left whole can be evicted when blocks run out.
        """
        request_id, plan = request.request_id, self.decisions.plan(request)
        if plan.skip in FULL_CACHE and self.decisions.pressure.is_on:
            plan = self.decisions.possible_plan(request)
        if not plan.kept_blocks:
            return None
        bound = self.later.bound(request_id) or self._bound_of(request_id, plan)
        evict_at = self._evict_at(request)
        before = 0
        if evict_at > plan.prompt_tokens:
            before = cdiv(evict_at, self.block_size) + plan.kept_blocks
        return EvictedOutput(
            whole_blocks(plan.prompt_tokens, self.block_size),
            plan.kept_blocks,
            plan.prompt_blocks,
            bound,
            before,
        )

    def _evict_at(self, request: Request) -> int:
        """Computed tokens with which a request is evicted at the latest, if its prompt is."""
        policy = self._config.for_request(request.sampling_params).policy
        return request.num_prompt_tokens + policy.evict_after

    # ----------------------------------------------------------------------------------------------
    # Statistics

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
        self._stats.blocks_held = self.blocks_held
        self._stats.pressure = self.decisions.pressure.is_on if self.decisions.by_pressure else None
        return self._stats
