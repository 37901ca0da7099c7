# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with eviction; chosen through ``ParallelConfig.worker_cls``."""

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from vl_cache_vllm.ops import native
from vl_cache_vllm.worker import generators
from vl_cache_vllm.worker.base_worker import EvictionWorkerMixin

logger = init_logger(__name__)


class EvictionCPUWorker(EvictionWorkerMixin, CPUWorker):
    """`CPUWorker` with eviction."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """The mixin's, and warns where the C++ operators are missing."""
        if not native.is_built():
            logger.warning_once(
                "KV compression: the C++ operators were not built when vl-cache-vllm was installed "
                "(is there a C++ compiler?); the slower torch operations are used"
            )
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            generators.install(self.model_runner)
