# SPDX-License-Identifier: Apache-2.0
"""What our workers add to those of vLLM's that they extend."""

from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker

from vl_cache_vllm import hooks
from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.core import messages
from vl_cache_vllm.core.observation_budget import announced
from vl_cache_vllm.core.spec import EvictionAttentionSpec
from vl_cache_vllm.worker.build import build_evictor


class EvictionWorkerMixin(Worker):
    """vLLM's worker over our attention backends and model-runner adapters.

    vLLM's CPU worker extends its GPU worker; ours stand before either.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with hooks.backends():
            super().load_model(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The model's specs, those of full attention with eviction."""
        config = get_kv_compress_config(self.vllm_config)
        assert config is not None
        return {
            name: EvictionAttentionSpec.wrap(spec, config)
            if type(spec) is FullAttentionSpec
            else spec
            for name, spec in super().get_kv_cache_spec().items()
        }

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self.eviction, group = build_evictor(self.vllm_config, kv_cache_config)
        if self.use_v2_model_runner:
            hooks.attach_v2(self.model_runner, self.eviction, group)
        else:
            hooks.attach_v1(self.model_runner, self.eviction, group)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        self.eviction.begin_output(ended, announced(scheduler_output))
        self.eviction.cached_requests = scheduler_output.scheduled_cached_reqs
        return self._with_reports(super().execute_model(scheduler_output))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_reports(super().sample_tokens(*args, **kwargs))

    def _with_reports(self, output: Any) -> Any:
        if not get_pp_group().is_last_rank:  # the scheduler hears of the last stage only
            self.eviction.take_reports()
            return output
        if output is None:  # it follows from `sample_tokens`
            return None
        return messages.attach(output, self.eviction.take_reports())
