# SPDX-License-Identifier: Apache-2.0
"""Every place where we replace or extend something of vLLM's, and why: one table.

With ``--kv-compress none`` only the hooks of `EngineArgs` and the checks of requests are in place.
They only add flags, look at one key of ``additional_config`` and refuse requests that ask for
eviction.
"""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

SUPPORTED_VLLM = (Version("0.32"), Version("0.34"))
"""Half-open range of vLLM versions; the table below was written for 0.32.0 and fits 0.33.0."""


@dataclass(frozen=True)
class Hook:
    """One row of the table."""

    target: str
    """What of vLLM's is touched, as ``module:qualified.name``."""
    kind: str
    """"extension point" (vLLM offers it) or "wrap" (we replace a method, calling the original)."""
    scope: str
    """Where and when it takes effect."""
    reason: str


HOOKS: tuple[Hook, ...] = (
    Hook(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "wrap",
        "every process that loads plugins",
        "adds the --kv-compress* flags; vLLM has no registry of plugins' flags",
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "wrap",
        "every process that loads plugins",
        "moves the flags into additional_config; the original drops flags it has no field for",
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrap",
        "every process that loads plugins; acts when kv_compress is set",
        "validates, refuses what is unsupported, chooses our worker and scheduler classes; always "
        "installs the checks of requests below",
    ),
    Hook(
        "vllm.entrypoints.generate.base.serving:GenerateBaseServing._check_model",
        "wrap",
        "processes that create an engine's config; acts on HTTP requests with settings "
        "of their own",
        "checks a request's own settings before its images are processed: the front end's cache "
        "must not take images that the engine will not get; every endpoint that generates calls "
        "this method first",
    ),
    Hook(
        "vllm.entrypoints.common.offline:OfflineInferenceMixin._render_and_add_requests",
        "wrap",
        "processes that create an engine's config; acts on requests of LLM with settings "
        "of their own",
        "the same check before LLM processes the images of the first prompt",
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "wrap",
        "processes that create an engine's config; acts on requests with settings of "
        "their own, and with eviction on prompts that vLLM refuses",
        "the same check for callers of AsyncLLM and LLMEngine; a refused prompt's new images are "
        "taken out of the front end's cache; custom logits processors could check too, but make V1 "
        "copy every sampled token to the host",
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "wrap",
        "processes that create the config of an engine with eviction; acts on such engines",
        "adds our metrics to every front end; plugins of vLLM's group for stat loggers reach only "
        "AsyncLLM, and come after loggers that ours must precede",
    ),
    Hook(
        "vllm.config:ParallelConfig.worker_cls",
        "extension point",
        "engines with eviction",
        "our worker installs the worker-side hooks below; nothing is patched in other engines",
    ),
    Hook(
        "vllm.config:SchedulerConfig.scheduler_cls",
        "extension point",
        "engines with eviction",
        "lets our block manager look up requests by id, and shortens prefix-cache hits",
    ),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.get_num_new_matched_tokens",
        "wrap",
        "the scheduler's KV connector in engines with eviction, that instance only",
        "shortens hits from outside; the scheduler asks in the middle of its longest method",
    ),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:"
        "RequestOffloadState.max_offload_tokens",
        "wrap",
        "the OffloadingConnector of engines with eviction, requests that may be evicted",
        "bounds what is stored of a request: requests set it in kv_transfer_params, which arrive "
        "before their prompt's length is known",
    ),
    Hook(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:"
        "OffloadingConnectorScheduler",
        "wrap",
        "the OffloadingConnector of engines with eviction, steps that evict",
        "kept blocks join its _current_batch_allocated_block_ids, so that pending copies from them "
        "end first; vLLM adds the blocks of requests' rows, where kept blocks are not",
    ),
    Hook(
        "vllm.v1.simple_kv_offload.manager:SimpleCPUOffloadScheduler._free_pending_cpu_hit",
        "wrap",
        "the SimpleCPUOffloadConnector of engines with eviction, requests that may be evicted",
        "a hit that is computed here instead is released; the connector would release it as well, "
        "with a warning for each request",
    ),
    Hook(
        "lmcache.integration.vllm.lmcache_mp_metadata:LMCacheMPRequestTracker.num_scheduled_tokens",
        "wrap",
        "the LMCacheMPConnector of engines with eviction, requests that may be evicted",
        "it adds the tokens of a hit to those of all steps; those that are computed although they "
        "were a hit would count twice, and blocks be stored before they are full",
    ),
    Hook(
        "lmcache.integration.vllm.lmcache_mp_connector:LMCacheMPConnector.build_connector_meta",
        "wrap",
        "the LMCacheMPConnector of engines with eviction, that instance only",
        "after evictions its workers wait until the replaced blocks have been copied, as they do "
        "after preemptions",
    ),
    Hook(
        "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec",
        "extension point",
        "engines with eviction",
        "our block manager",
    ),
    *(
        Hook(
            f"vllm.v1.attention.backends.registry:AttentionBackendEnum.{name}",
            "extension point",
            f"{device} workers with eviction, through register_backend, while the model is built",
            f"per-layer tables and observation; {why}",
        )
        for name, device, why in (
            ("CPU_ATTN", "CPU", "the CPU platform selects no other backend name"),
            ("FLASH_ATTN", "GPU", "--attention-backend knows no new names"),
            ("TRITON_ATTN", "GPU", "--attention-backend knows no new names"),
        )
    ),
    *(
        Hook(
            f"vllm.model_executor.layers.attention.mla_attention:MLAAttention.{method}",
            "wrap",
            "the layers of CPU workers with eviction that have multi-head latent attention, those "
            "instances only",
            f"{reason}; an attention backend of MLA sees only the prefills or the decodes of a "
            "step, and writes the cache without its metadata",
        )
        for method, reason in (
            ("forward_impl", "per-layer tables and observation"),
            ("update_kv_cache", "a layer's own slots"),
        )
    ),
    Hook(
        "vllm.platforms.cuda:_get_backend_priorities",
        "wrap",
        "GPU workers with eviction, while the model is built",
        "leaves the backends that we have to the automatic choice, which prefers others on some "
        "GPUs",
    ),
    Hook(
        "vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear",
        "wrap",
        "workers with eviction, before and after the model is built",
        "engines of one process share this cache of chosen classes",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        "wrap",
        "the model runner of workers with eviction, V1, that instance only",
        "the only place that sees the batch and the metadata together",
    ),
    Hook(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample",
        "wrap",
        "the model runner of CPU workers with eviction, V1, that instance only",
        "vLLM sets the generator of a seeded request back after each prefill chunk but the last, "
        "which torch's CPU generators cannot do: the engine would end",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.profile_run",
        "wrap",
        "the model runner of GPU workers with eviction, that instance only, at start-up",
        "vLLM's profile of memory counts what eviction takes, too",
    ),
    Hook(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state",
        "wrap",
        "the model runner of workers with eviction, V2, that instance only",
        "keeps prefills out of full CUDA graphs, where they could not be observed",
    ),
    *(
        Hook(
            f"vllm.v1.worker.gpu.model_states.interface:ModelState.{method}",
            "wrap",
            "the model state of workers with eviction, V2, that instance only",
            reason,
        )
        for method, reason in (
            ("add_request", "a request starts, or starts over after a preemption"),
            ("remove_request", "a request's slot becomes free"),
            ("prepare_attn", "the only place that sees the batch and the metadata together"),
        )
    ),
    Hook(
        "vllm.v1.spec_decode.llm_base_proposer:"
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        "wrap",
        "the drafter of workers with eviction and a draft model, V1, that instance only",
        "the draft's layers need tables of their own in each of its passes",
    ),
    *(
        Hook(
            f"vllm.v1.worker.gpu.spec_decode.{where}",
            "wrap",
            "the speculator of workers with eviction and a draft model, V2, that instance only",
            reason,
        )
        for where, reason in (
            (
                "target_dependent_ar.speculator:TargetDependentARSpeculator._prefill",
                "the first pass takes the model's metadata, whose tables are those of its layers",
            ),
            (
                "speculator:DraftModelSpeculator._build_attn_metadata",
                "the draft's layers need tables of their own in each further pass",
            ),
            (
                "speculator:DraftModelSpeculator._configure_decode_metadata_update",
                "its result, supports_decode_metadata_update, is set to False: metadata that is "
                "updated in place would keep the tables of the pass before",
            ),
        )
    ),
)

WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vl_cache_vllm.worker.cpu_worker.EvictionCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vl_cache_vllm.worker.gpu_worker.EvictionGPUWorker",
}
CPU_BACKENDS = {"CPU_ATTN": "vl_cache_vllm.attention.cpu.EvictionCPUAttentionBackend"}
GPU_BACKENDS = {
    "FLASH_ATTN": "vl_cache_vllm.attention.flash.EvictionFlashAttentionBackend",
    "TRITON_ATTN": "vl_cache_vllm.attention.triton.EvictionTritonAttentionBackend",
}
SCHEDULER = "vl_cache_vllm.core.scheduler.EvictionScheduler"
ASYNC_SCHEDULER = "vl_cache_vllm.core.scheduler.AsyncEvictionScheduler"
