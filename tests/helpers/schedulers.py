# SPDX-License-Identifier: Apache-2.0
"""Our schedulers, that is vLLM's real ones, without an engine or a model."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vllm.config import CacheConfig, ObservabilityConfig, SchedulerConfig
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from vl_cache_vllm.core.scheduler import AsyncEvictionScheduler, EvictionScheduler

Scheduler = EvictionScheduler | AsyncEvictionScheduler


@dataclass(frozen=True)
class Setup:
    """What an engine's flags decide of its scheduler."""

    block_size: int
    max_model_len: int
    max_num_seqs: int = 8
    max_num_tokens: int = 64
    use_v2: bool = False
    is_async: bool = False
    steps_in_flight: int = 1  # more than one without async scheduling: pipeline stages
    num_drafts: int = 0
    by_priority: bool = False
    must_fit: bool = False  # admit a prompt only if all of it fits
    encoder_tokens: int = 1000  # image tokens that may be encoded in a step, or be held


class _AnyGrammar:
    """In place of StructuredOutputManager."""

    def accept_tokens(self, request: Any, token_ids: list[int]) -> bool:
        return True

    def validate_tokens(self, request: Any, token_ids: list[int]) -> list[int]:
        return token_ids


def make_scheduler(setup: Setup, kv_cache_config: KVCacheConfig) -> Scheduler:
    speculative = SimpleNamespace(
        max_num_new_slots_for_drafting=0,
        num_speculative_tokens_per_batch_size=None,
        use_eagle=lambda: False,
        use_eagle_block_drop=lambda: False,
    )
    cache_config = CacheConfig(block_size=setup.block_size, enable_prefix_caching=True)
    cache_config.num_gpu_blocks = kv_cache_config.num_blocks
    vllm_config: Any = SimpleNamespace(
        scheduler_config=SchedulerConfig(
            max_model_len=setup.max_model_len,
            is_encoder_decoder=False,
            max_num_batched_tokens=setup.max_num_tokens,
            max_num_seqs=setup.max_num_seqs,
            policy="priority" if setup.by_priority else "fcfs",
            scheduler_reserve_full_isl=setup.must_fit,
            async_scheduling=setup.is_async,
        ),
        cache_config=cache_config,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1 if setup.is_async else setup.steps_in_flight,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            data_parallel_index=0,
        ),
        observability_config=ObservabilityConfig(),
        model_config=SimpleNamespace(
            max_model_len=setup.max_model_len,
            runner_type="generate",
            uses_mrope=False,
            is_diffusion=False,
            is_encoder_decoder=False,
            supports_multimodal_inputs=False,  # vLLM would ask the model for its encoder's budget
            return_sampling_mask=False,
        ),
        speculative_config=speculative if setup.num_drafts else None,
        num_speculative_tokens=setup.num_drafts,
        num_lookahead_tokens=0,
        num_prefill_lookahead_tokens=0,
        max_concurrent_batches=setup.steps_in_flight,
        max_in_flight_tokens=setup.steps_in_flight * setup.max_num_tokens,
        use_v2_model_runner=setup.use_v2,
        device_config=SimpleNamespace(device_type="cpu"),
        is_mm_encoder_only=False,
        lora_config=None,
        kv_events_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
        ec_manager_config=SimpleNamespace(get_encoder_cache_manager_obj=lambda: None),
        aux_output_config=SimpleNamespace(enabled=False),
    )
    scheduler_cls = AsyncEvictionScheduler if setup.is_async else EvictionScheduler
    scheduler = scheduler_cls(
        vllm_config, kv_cache_config, _AnyGrammar(), block_size=setup.block_size
    )
    scheduler.max_num_encoder_input_tokens = setup.encoder_tokens
    scheduler.encoder_cache_manager = EncoderCacheManager(setup.encoder_tokens)
    return scheduler
