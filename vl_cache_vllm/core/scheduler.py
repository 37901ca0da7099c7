# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers; our block manager sees their requests, load and outputs."""

import os
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.connectors import bounds_hits
from vl_cache_vllm.core.observation_budget import observation_budget_tokens
from vl_cache_vllm.core.spec import EvictionAttentionSpec
from vl_cache_vllm.core.stats import EvictionStats
from vl_cache_vllm.messages import (
    SEND_STATS,
    put_admitted,
    put_deferred,
    put_orders,
    put_stats,
    take_reports,
)

if TYPE_CHECKING:
    _Base = Scheduler
else:
    _Base = object


class EvictionSchedulerMixin(_Base):
    """What eviction needs from a scheduler; admission, preemption and order stay vLLM's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        (manager,) = (m for m in managers if isinstance(m, EvictionBlockManager))
        group = self.kv_cache_manager.kv_cache_config.kv_cache_groups[manager.kv_cache_group_id]
        assert isinstance(group.kv_cache_spec, EvictionAttentionSpec)
        if len(managers) > 1 and not bounds_hits(self.connector):
            raise ValueError(
                f"KV compression cannot be used with {type(self.connector).__name__} and a model "
                f"whose cache has {len(managers)} groups: use OffloadingConnector, or remove "
                "--kv-transfer-config or --kv-offloading-size"
            )
        layers = [group.kv_cache_spec] * len(group.layer_names)
        manager.bind(
            self.requests.get,
            [m for m in managers if m is not manager],
            observation_budget_tokens(self.vllm_config, layers),
            self.vllm_config.speculative_config is not None,
            self.connector,
        )
        self._eviction_manager = manager
        self._connector_guard = manager.connector
        self._decisions = manager.decisions
        self._sends_stats = SEND_STATS in os.environ

    def add_request(self, request: Request) -> None:
        """vLLM's, after which the connector knows how much of the request it may store."""
        super().add_request(request)
        self._connector_guard.on_new_request(request)

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        """vLLM's, with the requests to evict in this step and those admitted to observation."""
        if self._decisions.by_pressure:
            pool = self.kv_cache_manager.block_pool
            total = pool.num_gpu_blocks - 1  # one is the null block
            self._decisions.pressure.update(
                total - pool.get_num_free_blocks(), self._demands(), total
            )
        self._eviction_manager.plan_later_evictions(self.running, lambda: sum(self._demands()))
        output = super().schedule(*args, **kwargs)
        put_orders(output, self._eviction_manager.take_orders())
        put_deferred(output, self._eviction_manager.take_deferred())
        budget = self._decisions.observation_budget
        if not budget.is_unbounded:
            put_admitted(output, budget.take_new())
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, after the workers' eviction reports were counted."""
        self._eviction_manager.add_reports(take_reports(model_runner_output))
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        """vLLM's, with ours in them if the front end reads them."""
        stats = super().make_stats(*args, **kwargs)
        eviction = self._eviction_manager.take_stats()  # always: otherwise they would pile up
        if stats is not None and eviction is not None and self._sends_stats:
            put_stats(stats, eviction.to_dict())
        return stats

    @property
    def eviction_stats(self) -> EvictionStats:
        """Counts of this engine's decisions and evictions since start-up."""
        return self._eviction_manager.total_stats

    def _demands(self) -> Iterator[int]:
        """Blocks that each unfinished prefill still asks for, running requests first.

        Only as many waiting requests are counted as may run: the others do not wait for blocks.
        """
        waiting = chain(self.kv_holding_waiting, self.waiting)
        room = max(0, self.max_num_active_reqs - len(self.running))
        requests = chain(self.running, islice(waiting, room))
        return map(self._eviction_manager.missing_blocks, requests)

    def _update_waiting_for_remote_kv(self, request: Request) -> None:
        """vLLM's, then the observed queries of what has been loaded are computed again."""
        super()._update_waiting_for_remote_kv(request)
        request.num_computed_tokens = self._connector_guard.computed_after_load(request)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args, **kwargs
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """vLLM's hit, shortened so that the observed queries are computed, not cached."""
        hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        blocks, num_tokens, junction, diverged = hit
        limit = self._decisions.max_hit_tokens(request)
        if limit is None:
            return hit
        if num_tokens > limit:
            # Looked up again: a sliding-window group keeps only the end of a longer hit.
            manager = self.kv_cache_manager
            found, num_tokens, uncached = manager.coordinator.find_longest_cache_hit(
                request.block_hashes, limit
            )
            blocks, junction = manager.create_kv_cache_blocks(found), num_tokens + uncached
        # By default groups with a sliding window or with states cache their blocks only before a
        # few positions, of which the scheduler names one.
        boundary = self._decisions.shared_prefix_tokens(request, num_tokens, junction, limit)
        return blocks, num_tokens, boundary, diverged


class EvictionScheduler(EvictionSchedulerMixin, Scheduler):
    """`Scheduler` with eviction."""


class AsyncEvictionScheduler(EvictionSchedulerMixin, AsyncScheduler):
    """`AsyncScheduler` with eviction."""
