# SPDX-License-Identifier: Apache-2.0
"""Which prompts are evicted, and to how many blocks: decided once, when a prefill ends."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request, RequestStatus

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import (
    EvictionPlan,
    Skip,
    plan_eviction,
    post_vision_start,
)
from vl_cache_vllm.core.observation_budget import ObservationBudget
from vl_cache_vllm.core.pressure import PressureGauge, max_blocks


class EvictionDecisions:
    """The plans of all requests: possible ones before the prefill ends, decided ones after it.

    Args:
        config: the engine's settings.
        manager: of the evicted KV cache group.
        lookup: finds the scheduler's requests by id.
        others: managers of the cache's other groups, which draw on the same block pool.
        observation_budget: bound of what workers observe at once.
        hands_over: whether a request's blocks go to another server when it ends.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        manager: SingleTypeKVCacheManager,
        lookup: Callable[[str], Request | None],
        others: Sequence[SingleTypeKVCacheManager],
        observation_budget: ObservationBudget,
        hands_over: Callable[[Request], bool] = lambda request: False,
    ) -> None:
        self._hands_over = hands_over
        self._config, self._manager, self._lookup, self._others = config, manager, lookup, others
        self.observation_budget = observation_budget
        self.pressure = PressureGauge(config.pressure.high, config.pressure.low)
        # Negative decisions are kept, too. vLLM's end of prefill moves along with a decoding
        # request, so a rule that is asked again later would fire while the request decodes.
        self.decided_plans: dict[str, EvictionPlan] = {}
        """The decisions about requests whose prefill has ended, by id; read only."""
        self._unobserved: set[str] = set()  # the observation budget had no room for them

    @property
    def by_pressure(self) -> bool:
        """Whether prompts are evicted only while blocks are scarce."""
        return self._config.when == "pressure"

    def decided(self, request_id: str) -> EvictionPlan | None:
        """The decision about a request; None while its prefill runs."""
        return self.decided_plans.get(request_id)

    def plan(self, request: Request) -> EvictionPlan:
        """The decision about a request, or what it would be if its prefill ended now."""
        if decided := self.decided_plans.get(request.request_id):
            return decided
        plan = self.possible_plan(request)
        if plan.kept_blocks and request.request_id in self._unobserved:
            return replace(plan, kept_blocks=0, skip=Skip.NO_OBSERVATION_ROOM)
        if plan.kept_blocks and self.by_pressure and not self.pressure.is_on:
            return replace(plan, kept_blocks=0, skip=Skip.NO_PRESSURE)
        return plan

    def plan_of(self, request_id: str) -> EvictionPlan | None:
        """`plan` by id; None for requests that the scheduler does not know."""
        request = self._lookup(request_id)
        return self.decided_plans.get(request_id) or (self.plan(request) if request else None)

    def possible_plan(self, request: Request) -> EvictionPlan:
        """The plan as far as the request alone determines it, whatever the load is."""
        pool = self._manager.block_pool
        other_blocks = (max_blocks(other, request.num_tokens + 1) for other in self._others)
        config = self._config.for_request(request.sampling_params)
        plan = plan_eviction(
            config,
            self._manager.block_size,
            request.num_tokens,
            post_vision_start(self._config, request.mm_features),
            usable_blocks=pool.num_gpu_blocks - 1 - sum(other_blocks),  # one is the null block
            num_prompt_tokens=request.num_prompt_tokens,
        )
        if plan.kept_blocks and self._hands_over(request):
            return replace(plan, kept_blocks=0, skip=Skip.HANDED_OVER)
        if request.resumable and plan.skip != Skip.TEXT_ONLY:
            # Its prompt still grows: it is not evicted, and not bounded while it is short.
            return replace(plan, kept_blocks=0, skip=Skip.STREAMING_INPUT)
        # The token that is sampled in the step of the eviction needs no cache.
        if plan.kept_blocks and request.max_tokens <= 1 + config.policy.evict_after:
            return replace(plan, kept_blocks=0, skip=Skip.NO_DECODE)
        return plan

    def decide(self, request_id: str, plan: EvictionPlan) -> None:
        """Fix the decision about a request whose prefill ends in this step."""
        self.decided_plans[request_id] = plan

    def forget(self, request_id: str) -> None:
        """A request has ended or was preempted; unknown ids are fine."""
        self._unobserved.discard(request_id)
        self.observation_budget.release(request_id)
        self.decided_plans.pop(request_id, None)

    def max_hit_tokens(self, request: Request) -> int | None:
        """Longest prefix-cache hit, in tokens, that leaves all observed queries to be computed.

        None for a request that will not be evicted. Under ``pressure`` that is not known before
        the prefill ends, so a request that may be evicted is treated as one that will be.
        """
        plan = self.possible_plan(request)
        if not plan.kept_blocks:
            return None
        start = self._observation_start(request, plan)
        # A prefill of one token must not remain: with drafts vLLM lengthens it by room for them.
        start = min(start, plan.prompt_tokens - 2)
        return start // self._manager.block_size * self._manager.block_size

    def shared_prefix_tokens(self, request: Request, hit: int, junction: int, limit: int) -> int:
        """Where later requests can continue from this one's prefix, in whole blocks.

        Args:
            request: one that has a longest hit.
            hit: its tokens.
            junction: up to where other requests share more of the prefix, if that is known.
            limit: `max_hit_tokens`.
        """
        vision_end = post_vision_start(self._config, request.mm_features) or 0
        block_size = self._manager.block_size
        image_end = min(limit, vision_end // block_size * block_size)
        if hit < junction <= limit:
            return junction
        # The next question is likely to be about the same images.
        return image_end if image_end > hit else limit

    def must_wait(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request must not start yet because other prompts are under observation.

        Args:
            request_id: any request.
            num_tokens: its tokens after the step that is being scheduled.
        """
        if self.observation_budget.is_empty:  # always, where observation is not bounded
            return False
        request = self._lookup(request_id)
        if request is None or request.status == RequestStatus.RUNNING:
            return False
        observed = self._needs_observation(request_id, num_tokens)
        return observed is not None and not self.observation_budget.has_room(observed)

    def admit_to_observation(self, request_id: str, num_tokens: int) -> None:
        """Admit a request whose first observed query is scheduled, or note that it had no room."""
        observed = self._needs_observation(request_id, num_tokens)
        if observed is None:
            return
        if self.observation_budget.has_room(observed):
            self.observation_budget.admit(request_id, observed)
        else:
            self._unobserved.add(request_id)

    def _observation_start(self, request: Request, plan: EvictionPlan) -> int:
        """Position of the first observed query."""
        vision_end = post_vision_start(self._config, request.mm_features)
        assert vision_end is not None
        policy = self._config.for_request(request.sampling_params).policy
        return policy.observation_start(vision_end, plan.prompt_tokens)

    def _needs_observation(self, request_id: str, num_tokens: int) -> int | None:
        """The tokens that are scored of a request whose first observed query is now scheduled.

        None if it has none among ``num_tokens``, or was admitted before.
        """
        if self.observation_budget.is_unbounded or request_id in self.decided_plans:
            return None
        request = self._lookup(request_id)
        if request is None or request_id in self.observation_budget:
            return None
        if request_id in self._unobserved:
            return None
        plan = self.possible_plan(request)
        if not plan.kept_blocks or num_tokens <= self._observation_start(request, plan):
            return None
        policy = self._config.for_request(request.sampling_params).policy
        return plan.prompt_tokens + policy.evict_after
