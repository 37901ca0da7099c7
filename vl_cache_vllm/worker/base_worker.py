# SPDX-License-Identifier: Apache-2.0
"""What our workers add to vLLM's CPU and GPU worker."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker

from vl_cache_vllm.attention import registration
from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.core.spec import with_eviction
from vl_cache_vllm.messages import put_reports, take_admitted, take_deferred, take_orders
from vl_cache_vllm.worker.build import build_evictors


class EvictionWorkerMixin(Worker):
    """Mixin for both vLLM workers (``CPUWorker`` derives from the GPU ``Worker``)."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, with our attention backends in place of its own."""
        with registration.eviction_backends():
            super().load_model(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs; those of full attention bring our block manager."""
        config = get_kv_compress_config(self.vllm_config)
        assert config is not None
        return {
            name: with_eviction(spec, config) for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """vLLM's, then builds the evictor over the allocated cache and hooks it into the runner."""
        super().initialize_from_config(kv_cache_config)
        # Each adapter imports its runner, which the other one's platform may lack.
        adapter: Any
        if self.use_v2_model_runner:
            from vl_cache_vllm.worker import v2

            adapter = v2
        else:
            from vl_cache_vllm.worker import v1

            adapter = v1
        self.evictor, group, self.drafts = build_evictors(
            self.vllm_config, kv_cache_config, adapter.draft_layers(self.model_runner)
        )
        adapter.install(self.model_runner, self.evictor, group, self.drafts)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's, with the scheduler's messages before it and the eviction reports after it."""
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        messages = (
            ended,
            take_admitted(scheduler_output),
            take_orders(scheduler_output),
            take_deferred(scheduler_output),
        )
        self.evictor.begin_output(*messages)
        if self.drafts is not None:
            self.drafts.begin_output(*messages)
        self.evictor.cached_requests = scheduler_output.scheduled_cached_reqs
        return self._with_reports(super().execute_model(scheduler_output))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, with the eviction reports."""
        return self._with_reports(super().sample_tokens(*args, **kwargs))

    def _with_reports(self, output: Any) -> Any:
        if self.drafts is not None and output is not None:
            self.drafts.end_step()
        if not get_pp_group().is_last_rank:  # the scheduler reads the last stage's output only
            self.evictor.take_reports()
            return output
        if output is None:  # the output comes from `sample_tokens`
            return None
        return put_reports(output, self.evictor.take_reports())
