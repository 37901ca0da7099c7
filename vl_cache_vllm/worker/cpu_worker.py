# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with eviction; chosen through ``ParallelConfig.worker_cls``."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.worker.cpu_worker import CPUWorker

from vl_cache_vllm import hooks
from vl_cache_vllm.config import settings_of
from vl_cache_vllm.engine import report
from vl_cache_vllm.engine.spec import CompressedAttentionSpec
from vl_cache_vllm.ops import native
from vl_cache_vllm.worker.attach import build_eviction_worker

logger = init_logger(__name__)


class EvictionCPUWorker(CPUWorker):
    """`CPUWorker` over our attention backend and model-runner adapter."""

    def load_model(self, *args, **kwargs) -> None:
        with hooks.cpu_backend():
            super().load_model(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, those of full attention with eviction."""
        config = settings_of(self.vllm_config)
        assert config is not None
        return {
            name: CompressedAttentionSpec.wrap(spec, config)
            if type(spec) is FullAttentionSpec
            else spec
            for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if not native.is_built():
            logger.warning_once(
                "KV compression: the C++ operators were not built when vl-cache-vllm was installed "
                "(is there a C++ compiler?); torch operations serve, which take longer"
            )
        self.eviction, group = build_eviction_worker(self.vllm_config, kv_cache_config)
        if self.use_v2_model_runner:
            hooks.attach_v2(self.model_runner, self.eviction, group)
        else:
            hooks.attach_v1(self.model_runner, self.eviction, group)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for request_id in ended:  # what they held is not kept until another step is planned
            self.eviction.requests.drop(request_id)
        self.eviction.cached_requests = scheduler_output.scheduled_cached_reqs
        return self._with_reports(super().execute_model(scheduler_output))

    def sample_tokens(self, *args, **kwargs) -> Any:
        return self._with_reports(super().sample_tokens(*args, **kwargs))

    def _with_reports(self, output: Any) -> Any:
        if not get_pp_group().is_last_rank:  # the scheduler hears of the last stage only
            self.eviction.take_reports()
            return output
        if output is None:  # it follows from `sample_tokens`
            return None
        return report.attach(output, self.eviction.take_reports())
