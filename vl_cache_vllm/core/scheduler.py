# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers; our block manager sees their requests, load and outputs."""

import os
from collections.abc import Iterator
from itertools import chain, islice

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vl_cache_vllm.core import messages
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.observation_budget import announce, observation_budget_tokens
from vl_cache_vllm.core.stats import SEND, EvictionStats, put


class EvictionSchedulerMixin:
    """What eviction needs from a scheduler; admission, preemption and order stay vLLM's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        (manager,) = (m for m in managers if isinstance(m, EvictionBlockManager))
        groups = self.kv_cache_manager.kv_cache_config.kv_cache_groups  # type: ignore[attr-defined]
        group = groups[manager.kv_cache_group_id]
        layers = [group.kv_cache_spec] * len(group.layer_names)
        room = observation_budget_tokens(self.vllm_config, layers)  # type: ignore[attr-defined]
        manager.bind(self.requests.get, [m for m in managers if m is not manager], room)  # type: ignore[attr-defined]
        self._eviction_manager = manager
        self._sends_stats = SEND in os.environ

    def schedule(self, *args, **kwargs) -> SchedulerOutput:
        if self._eviction_manager.decides_by_pressure:
            pool = self.kv_cache_manager.block_pool  # type: ignore[attr-defined]
            total = pool.num_gpu_blocks - 1  # one is the null block
            self._eviction_manager.pressure.update(
                total - pool.get_num_free_blocks(), self._demands(), total
            )
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._eviction_manager.observation_budget.tokens is not None:
            announce(output, self._eviction_manager.observation_budget.take_new())
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        self._eviction_manager.add_reports(messages.detach(model_runner_output))
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        eviction = self._eviction_manager.take_stats()  # even if nobody asked: it would pile up
        if stats is not None and eviction is not None and self._sends_stats:
            put(stats, eviction)
        return stats

    @property
    def eviction_stats(self) -> EvictionStats:
        """Counts of this engine's decisions and evictions since start-up."""
        return self._eviction_manager.total_stats

    def _demands(self) -> Iterator[int]:
        """Blocks that each unfinished prefill still asks for, running ones first.

        Of the waiting ones, as many as may run beside them: others do not wait for blocks.
        """
        running = self.running  # type: ignore[attr-defined]
        waiting = chain(self.kv_holding_waiting, self.waiting)  # type: ignore[attr-defined]
        room = max(0, self.max_num_active_reqs - len(running))  # type: ignore[attr-defined]
        requests = chain(running, islice(waiting, room))
        return map(self._eviction_manager.missing_blocks, requests)

    def _get_local_prefix_cache_hit(
        self, request: Request, *args, **kwargs
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Shorten the hit so that the observed queries are computed, not taken from the cache."""
        hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)  # type: ignore[misc]
        blocks, num_tokens, _, diverged = hit
        limit = self._eviction_manager.max_hit_tokens(request)
        if limit is None:
            return hit
        if num_tokens > limit:
            # Looked up again: of a sliding-window group a longer hit has the end of it only.
            manager = self.kv_cache_manager  # type: ignore[attr-defined]
            found, num_tokens, _ = manager.coordinator.find_longest_cache_hit(
                request.block_hashes, limit
            )
            blocks = manager.create_kv_cache_blocks(found)
        # Groups with a sliding window cache its blocks before a few positions only, by default;
        # here is where the next question about the same image will want to go on.
        return blocks, num_tokens, limit, diverged


class EvictionScheduler(EvictionSchedulerMixin, Scheduler):
    """`Scheduler` with eviction."""


class AsyncEvictionScheduler(EvictionSchedulerMixin, AsyncScheduler):
    """`AsyncScheduler` with eviction."""
