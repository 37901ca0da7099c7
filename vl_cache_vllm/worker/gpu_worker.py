# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with eviction; chosen through ``ParallelConfig.worker_cls``."""

from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch

from vl_cache_vllm.core.observation_budget import observation_budget_tokens
from vl_cache_vllm.core.spec import EvictionAttentionSpec
from vl_cache_vllm.worker.base_worker import EvictionWorkerMixin
from vl_cache_vllm.worker.build import NO_FULL_ATTENTION, evictor_over
from vl_cache_vllm.worker.warmup import (
    WarmupEviction,
    blank_pool,
    profiling_config,
    warm_up_kernels,
)


class EvictionGPUWorker(EvictionWorkerMixin):
    """The GPU `Worker` with eviction."""

    def determine_available_memory(self) -> int:
        """vLLM's, with an eviction in the profiling run.

        vLLM then captures some graphs to estimate the memory of all of them. That is before
        `initialize_from_config`, so these graphs read vLLM's own tables. Ours have as many kernels,
        and the tables that they read are part of the profiling run.
        """
        runner: Any = self.model_runner
        runner.profile_run = partial(self._profile_run, runner.profile_run)
        try:
            return super().determine_available_memory()
        finally:
            del runner.profile_run

    def _profile_run(self, profile_run: Any, *args: Any, **kwargs: Any) -> None:
        """vLLM's profiling run between the observation and the eviction of a synthetic prompt."""
        specs = self._evicted_specs()
        warmup = self._warmup_eviction(specs)
        warmup.observe()
        profile_run(*args, **kwargs)
        activations = self._last_activations(specs)
        warmup.evict()
        del activations

    def _last_activations(self, specs: dict[str, EvictionAttentionSpec]) -> torch.Tensor:
        """A tensor as large as the activations that a step holds while its last layer evicts.

        These are the residual, its normalised copy, queries, keys, values and attention's output.
        """
        name, spec = next(iter(specs.items()))
        num_heads = self.compilation_config.static_forward_context[name].num_heads
        width = 2 * self.model_config.get_hidden_size()
        width += (2 * num_heads + 2 * spec.num_kv_heads) * spec.head_size
        num_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        dtype = cast(torch.dtype, self.model_config.dtype)
        return torch.empty(num_tokens, width, dtype=dtype, device=self.device)

    def _evicted_specs(self) -> dict[str, EvictionAttentionSpec]:
        specs = {
            name: spec
            for name, spec in self.get_kv_cache_spec().items()
            if isinstance(spec, EvictionAttentionSpec)
        }
        if not specs:
            raise ValueError(NO_FULL_ATTENTION)
        return specs

    def _warmup_eviction(self, specs: dict[str, EvictionAttentionSpec]) -> WarmupEviction:
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
        spec = replace(spec, kv_compress=profiling_config(spec.kv_compress))
        room = observation_budget_tokens(self.vllm_config, [*specs.values()])
        assert room is not None
        worker = evictor_over(pool, spec, self.vllm_config, [*specs], layer.num_heads)
        tokens, softcap = self.model_config.max_model_len, float(layer.impl.logits_soft_cap)
        warm_up_kernels(worker, tokens, layer.num_heads, softcap)
        return WarmupEviction(worker, tokens, room, layer.num_heads, softcap)
