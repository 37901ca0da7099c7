# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with eviction; chosen through ``ParallelConfig.worker_cls``."""

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vl_cache_vllm import hooks
from vl_cache_vllm.ops import native
from vl_cache_vllm.worker.evicting import EvictingWorker

logger = init_logger(__name__)


class EvictionCPUWorker(EvictingWorker, CPUWorker):
    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        if not native.is_built():
            logger.warning_once(
                "KV compression: the C++ operators were not built when vl-cache-vllm was installed "
                "(is there a C++ compiler?); torch operations serve, which take longer"
            )
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            hooks.attach_generators(self.model_runner)
