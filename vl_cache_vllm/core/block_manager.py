# SPDX-License-Identifier: Apache-2.0
"""Block accounting of evicted requests.

Blocks of a request, N = 3 prompt blocks evicted to M = 1 kept block:

    prefill ends      [7, 8, 9] [4]            M blocks are allocated with the last chunk
    step processed    [-, -, -] [4]            prompt blocks freed, hashes intact, null in place
    decode            [-, -, -] [4] [5] ...    positions >= E start in a fresh block

Owns: the M kept blocks, when prompt blocks are freed, and what is hashed.
Does not own: which requests are evicted (`decisions`), how many blocks admission reserves
(`output_reserve`), which tokens survive and how the M x L pages are divided among the layers
(worker).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import EvictionPlan
from vl_cache_vllm.core.decisions import EvictionDecisions
from vl_cache_vllm.core.observation_budget import ObservationBudget
from vl_cache_vllm.core.output_reserve import OutputReserve
from vl_cache_vllm.core.pressure import PrefillDemand
from vl_cache_vllm.core.stats import EvictionStats


class EvictionBlockManager(FullAttentionManager):
    """`FullAttentionManager` that adds kept blocks and frees and stops hashing evicted prompts."""

    def __init__(self, kv_cache_spec, *args, **kwargs) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._config: KVCompressConfig = kv_cache_spec.kv_compress
        self._prompt_freed: set[str] = set()
        self._output_reserve = OutputReserve(self.block_size)
        self._stats = EvictionStats()  # since the last report
        self._reported = EvictionStats()  # what a report without news would say
        self._totals = EvictionStats()  # of all reports
        self.bind(lambda _: None)  # until the scheduler, which vLLM creates later, binds its own

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
            observation_tokens: bound of what workers observe at once; None: not bounded.
        """
        self._lookup = lookup
        self.decisions = EvictionDecisions(
            self._config, self, lookup, others, ObservationBudget(observation_tokens)
        )
        self._prefill_demand = PrefillDemand(self, others)

    def missing_blocks(self, request: Request) -> int:
        """Blocks that a request's prefill still takes from the pool, without the kept ones."""
        if self.decisions.decided(request.request_id) is not None:
            return 0
        return self._prefill_demand.blocks(request)

    # ----------------------------------------------------------------------------------------------
    # What vLLM's coordinator calls

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        """vLLM's, plus the M kept blocks, one free block for decoding, and the output reserve."""
        if self.decisions.must_wait(request_id, num_tokens):
            return self.block_pool.num_gpu_blocks  # more than there are
        plan = self.decisions.plan_of(request_id)
        slots = self._token_slots(plan, num_tokens)
        num_blocks = super().get_num_blocks_to_allocate(request_id, slots, *args, **kwargs)
        # The step that ends an evicted prefill asks for one free block more than it takes. Decoding
        # starts in a fresh block, and async scheduling schedules it while the prompt's blocks are
        # still held: without the reserve a request that just fitted would preempt itself, over and
        # over. (Slots exceed tokens from that step on, and never before.)
        ends_prefill = slots > num_tokens and self.decisions.decided(request_id) is None
        num_blocks += ends_prefill
        if kwargs.get("apply_admission_cap") and self._config.output_reserve:
            request = self._lookup(request_id)
            if request is not None and num_blocks <= self.block_pool.get_num_free_blocks():
                return max(num_blocks, self._free_blocks_for(request))
        return num_blocks

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """vLLM's, plus the M kept blocks in the step that ends an evicted prefill."""
        self.decisions.admit_to_observation(request_id, num_tokens_main_model)
        plan = self.decisions.plan_of(request_id)
        if (
            plan is not None
            and self.decisions.decided(request_id) is None
            and num_tokens_main_model >= plan.prompt_tokens
        ):
            self.decisions.decide(request_id, plan)
            self._stats.decided(plan, self.block_size)
        slots = self._token_slots(plan, num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """vLLM's, without the blocks after an evicted prompt: they are no prefix of anything."""
        plan = self.decisions.plan_of(request.request_id)
        if plan is not None and plan.kept_blocks:
            num_tokens = min(num_tokens, plan.prompt_tokens)
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
        """Frees the N prompt blocks once the step that compacted them has been processed.

        Full attention itself skips nothing, so there is no call of the base.
        """
        plan = self.decisions.decided(request_id)
        if plan is None or processed_computed_tokens < plan.prompt_tokens:
            return
        self.decisions.observation_budget.release(request_id)
        if plan.kept_blocks and request_id not in self._prompt_freed:
            before = self.block_pool.get_num_free_blocks()
            self._remove_blocks_in_range(request_id, 0, plan.prompt_blocks)
            self._prompt_freed.add(request_id)
            self._stats.freed_blocks += self.block_pool.get_num_free_blocks() - before

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """vLLM's, and forgets the request."""
        plan, request = self.decisions.forget(request_id), self._lookup(request_id)
        if plan and plan.kept_blocks and request and request.is_finished():
            self._output_reserve.lengths.add(request.num_output_tokens, request.max_tokens)
        self._prompt_freed.discard(request_id)
        return super().pop_blocks_for_free(request_id)

    # ----------------------------------------------------------------------------------------------
    # Blocks

    def _token_slots(self, plan: EvictionPlan | None, num_tokens: int) -> int:
        """Tokens of a full cache that takes as many blocks as this request's ``num_tokens``.

        vLLM computes the length of a row from it. With block size 32, E = 70 and M = 1::

            num_tokens = 70:   [prompt 3 blocks][kept 1]              -> 4 * 32 = 128 slots
            num_tokens = 75:   [prompt 3 blocks][kept 1][decode 1]    -> 5 * 32 = 160 slots
        """
        if plan is None or not plan.kept_blocks or num_tokens < plan.prompt_tokens:
            return num_tokens
        decode_blocks = cdiv(num_tokens - plan.prompt_tokens, self.block_size)
        return (plan.prompt_blocks + plan.kept_blocks + decode_blocks) * self.block_size

    def _num_held(self, request_id: str, plan: EvictionPlan) -> int:
        """Blocks of a request's row without the null blocks in place of its prompt."""
        freed = plan.prompt_blocks if request_id in self._prompt_freed else 0
        return len(self.req_to_blocks.get(request_id, ())) - freed

    def _renew_cached_copies(self, request: Request, num_tokens: int) -> list[int]:
        """Indices of a request's new full blocks whose contents the prefix cache already has.

        A shortened hit recomputes the observed part of a cached prompt. A second copy in the
        prefix cache would be announced (KV events) as if it were new, and its removal as if it were
        the only one. The first copy is renewed instead, as by a hit: touched and freed, it moves to
        the end of the free queue.
        """
        start, end = self.num_cached_block.get(request.request_id, 0), num_tokens // self.block_size
        if start >= end:  # every decode step
            return []
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
        return sum(self._num_held(*evicted) for evicted in self.decisions.evicted())

    def _free_blocks_for(self, newcomer: Request) -> int:
        """Free blocks that the output reserve asks for if this request is admitted."""

        def demand(request: Request) -> int:
            if request is newcomer:  # vLLM adds what other groups need
                return self._prefill_demand.blocks_of_evicted_group(request)
            return self.missing_blocks(request)

        total = self.block_pool.num_gpu_blocks - 1  # one is the null block
        return self._output_reserve.free_blocks_for(
            newcomer,
            self._holders(newcomer),
            demand,
            total - self.block_pool.get_num_free_blocks(),
        )

    def _holders(self, newcomer: Request) -> Iterator[tuple[Request, EvictionPlan, int]]:
        for request_id in {*self.req_to_blocks, newcomer.request_id}:
            request = self._lookup(request_id)
            if request is not None:
                plan = self.decisions.plan(request)
                yield request, plan, self._num_held(request_id, plan)

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
        is_on = self.decisions.pressure.is_on if self.decisions.by_pressure else None
        return replace(self._stats, blocks_held=self.blocks_held, pressure=is_on)
