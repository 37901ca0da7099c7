# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with eviction; chosen through ``ParallelConfig.worker_cls``."""

from dataclasses import replace
from typing import Any

from vl_cache_vllm import hooks
from vl_cache_vllm.engine.observation import room_for
from vl_cache_vllm.engine.spec import CompressedAttentionSpec
from vl_cache_vllm.worker.attach import NO_FULL_ATTENTION, eviction_worker_over
from vl_cache_vllm.worker.evicting import EvictingWorker
from vl_cache_vllm.worker.rehearsal import Rehearsal, blank_pool, rehearsed


class EvictionGPUWorker(EvictingWorker):
    def determine_available_memory(self) -> int:
        with hooks.profile_run(self.model_runner, self._profile_run):
            return super().determine_available_memory()

    def _profile_run(self, profile_run: Any, *args: Any, **kwargs: Any) -> None:
        """vLLM's, with an eviction around it."""
        rehearsal = self._rehearsal()
        rehearsal.observe()
        profile_run(*args, **kwargs)
        rehearsal.evict()

    def _rehearsal(self) -> Rehearsal:
        specs = {
            name: spec
            for name, spec in self.get_kv_cache_spec().items()
            if isinstance(spec, CompressedAttentionSpec)
        }
        if not specs:
            raise ValueError(NO_FULL_ATTENTION)
        name, spec = next(iter(specs.items()))
        assert spec.kv_compress is not None and self.device is not None
        layer = self.compilation_config.static_forward_context[name]
        pool = blank_pool(
            len(specs),
            spec.num_kv_heads,
            spec.block_size,
            spec.head_size,
            spec.dtype,
            self.device,
        )
        spec = replace(spec, kv_compress=rehearsed(spec.kv_compress))
        room = room_for(self.vllm_config, [*specs.values()])
        assert room is not None
        return Rehearsal(
            eviction_worker_over(pool, spec, self.vllm_config, [*specs], layer.num_heads),
            self.model_config.max_model_len,
            room,
            layer.num_heads,
            float(layer.impl.logits_soft_cap),
        )
