# SPDX-License-Identifier: Apache-2.0
"""Everything that this package relies on in vLLM 0.32, by the file that relies on it.

Methods of vLLM that this package replaces are `Overridden`, and methods that it calls are `Called`.
`Has` lists fields, properties and instance attributes that it reads or sets. `Steps` are facts
about the order in which vLLM does things, which signatures do not show.
"""

from checks.contract.rows import (
    Abstract,
    Called,
    Defined,
    Exists,
    Extends,
    Has,
    Never,
    Overridden,
    Row,
    Steps,
)

WORKER = "vllm.v1.worker.gpu_worker:Worker"
CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
PROPOSER = "vllm.v1.spec_decode.llm_base_proposer:SpecDecodeBaseProposer"
V2_DRAFTS = "vllm.v1.worker.gpu.spec_decode"
V2_SPECULATOR = f"{V2_DRAFTS}.target_dependent_ar.speculator:TargetDependentARSpeculator"
V1_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
V2_STATE = "vllm.v1.worker.gpu.model_states.interface:ModelState"
CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"
FLASH_ATTN = "vllm.v1.attention.backends.flash_attn"
TRITON_ATTN = "vllm.v1.attention.backends.triton_attn"
MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
COORDINATOR = "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator"
KV_CACHE_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
CONNECTORS = "vllm.distributed.kv_transfer.kv_connector.v1"
OFFLOADING = f"{CONNECTORS}.offloading.scheduler"
SIMPLE_OFFLOADING = "vllm.v1.simple_kv_offload.manager:SimpleCPUOffloadScheduler"
ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
KV_INTERFACE = "vllm.v1.kv_cache_interface"
MLA = "vllm.model_executor.layers.attention.mla_attention"
BACKENDS = "vllm.v1.attention.backends.registry"
LOGGERS = "vllm.v1.metrics.loggers"
GENERATE_SERVING = "vllm.entrypoints.generate.base.serving:GenerateBaseServing"
OFFLINE = "vllm.entrypoints.common.offline:OfflineInferenceMixin"


# What this package relies on in a GPU backend, whose classes share a prefix.
def _gpu_backend(module: str, prefix: str) -> tuple[Row, ...]:
    backend, builder = f"{module}:{prefix}Backend", f"{module}:{prefix}MetadataBuilder"
    impl, metadata = f"{module}:{prefix}Impl", f"{module}:{prefix}Metadata"
    return (
        Has(backend, "forward_includes_kv_cache_update"),
        Overridden(f"{backend}.get_impl_cls", ""),
        Overridden(f"{backend}.get_builder_cls", ""),
        Overridden(f"{backend}.supported_kv_cache_layouts", ""),
        Exists(builder),
        Overridden(f"{builder}.get_cudagraph_support", "vllm_config, kv_cache_spec"),
        Has(metadata, "seq_lens block_table slot_mapping"),
        Overridden(f"{impl}.__init__", "..."),
        Has(
            impl,
            "sinks alibi_slopes kv_sharing_target_layer_name scale logits_soft_cap kv_cache_dtype",
        ),
        Overridden(
            f"{impl}.forward",
            "layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
            "output_block_scale=",
        ),
        Called(f"{impl}.do_kv_cache_update", "layer, key, value, kv_cache, slot_mapping"),
        # K and V of a token and head are adjacent, at the strides of the cache.
        Steps(
            f"{impl}.do_kv_cache_update",
            ("kv_cache.transpose(1, 2).split(self.head_size, dim=-1)",),
        ),
        Steps(f"{impl}.forward", ("seqused_k = attn_metadata.seq_lens",)),
        Steps(f"{impl}.forward", ("block_table = attn_metadata.block_table",)),
    )


CDIV = Called("vllm.utils.math_utils:cdiv", "a, b")
VLLM_CONFIG = Has("vllm.config:VllmConfig", "additional_config")
REQUEST = Exists("vllm.v1.request:Request")
LOGGER = Called("vllm.logger:init_logger", "name")
FEATURES = Has(
    "vllm.multimodal.inputs:MultiModalFeatureSpec",
    "data modality mm_position",
)

CONTRACT: dict[str, tuple[Row, ...]] = {
    "plugin.py": (
        Defined(
            "vllm.plugins:DEFAULT_PLUGINS_GROUP", "DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'"
        ),
    ),
    "install.py": (
        # The flags: plugins are loaded before the parser is built and before the config is made.
        Overridden(f"{ENGINE_ARGS}.add_cli_args", "parser", "FlexibleArgumentParser"),
        Overridden(f"{ENGINE_ARGS}.from_cli_args", "args"),
        Overridden(f"{ENGINE_ARGS}.create_engine_config", "...", "VllmConfig"),
        Steps(
            "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
            ("load_general_plugins()", "EngineArgs.add_cli_args(parser)"),
        ),
        Steps(f"{ENGINE_ARGS}.__post_init__", ("load_general_plugins()",)),
        Steps(
            f"{ENGINE_ARGS}.from_cli_args",
            ("cls(**{attr: getattr(args, attr) for attr in attrs if hasattr(args, attr)})",),
        ),
        Has(ENGINE_ARGS, "additional_config"),
        Steps(
            f"{ENGINE_ARGS}.create_engine_config",
            ("VllmConfig(...additional_config=self.additional_config",),
        ),
        # A request's own settings.
        Overridden(
            "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
            "request_id, prompt, params, ...",
        ),
        Has("vllm.v1.engine.input_processor:InputProcessor", "vllm_config renderer"),
        # Refused before its images are processed, on every endpoint and in LLM ...
        Overridden(f"{GENERATE_SERVING}._check_model", "request"),
        Has(GENERATE_SERVING, "input_processor"),
        *(
            Extends(f"vllm.entrypoints.{serving}", GENERATE_SERVING)
            for serving in (
                "openai.chat_completion.serving:OpenAIServingChat",
                "openai.completion.serving:OpenAIServingCompletion",
                "openai.responses.serving:OpenAIServingResponses",
                "scale_out.token_in_token_out.serving:ServingTokens",
                "speech_to_text.base.serving:SpeechToTextBaseServing",
            )
        ),
        *(
            Steps(f"vllm.entrypoints.{function}", ("await self._check_model(request)", render))
            for function, render in (
                (
                    "openai.chat_completion.serving:OpenAIServingChat.render_chat_request",
                    "self.online_renderer.render_chat(request)",
                ),
                (
                    "openai.chat_completion.batch_serving:"
                    "OpenAIServingChatBatch.render_batch_chat_request",
                    "renderer.preprocess_chat(",
                ),
                (
                    "openai.completion.serving:OpenAIServingCompletion.render_completion_request",
                    "self.online_renderer.render_completion(request)",
                ),
                (
                    "openai.responses.serving:OpenAIServingResponses._create_responses",
                    "self._render_resolved_response_inputs(",
                ),
                (
                    "scale_out.token_in_token_out.serving:ServingTokens.serve_tokens",
                    "self.online_renderer.renderer.render_cmpl_async(",
                ),
            )
        ),
        Overridden(f"{OFFLINE}._render_and_add_requests", "prompts, params, ..."),
        Has(OFFLINE, "llm_engine"),
        Has("vllm.v1.engine.llm_engine:LLMEngine", "vllm_config"),
        # ... or afterwards; then new images are taken out of the cache that the renderer used.
        Has("vllm.renderers.base:BaseRenderer", "mm_processor_cache"),
        Steps(
            "vllm.renderers.base:BaseRenderer.process_for_engine",
            ("engine_input['arrival_time'] = arrival_time",),
        ),
        Steps(
            "vllm.renderers.base:BaseRenderer.process_for_engine_async",
            ("engine_input['arrival_time'] = arrival_time",),
        ),
        Called("vllm.inputs:split_enc_dec_input", "inputs"),
        Called("vllm.multimodal.cache.base:BaseMultiModalProcessorCache.invalidate", "mm_hash"),
        Has("vllm.inputs.engine:MultiModalInput", "type mm_hashes mm_kwargs arrival_time"),
        Called("vllm.exceptions:VLLMValidationError", "message, parameter="),
        Extends("vllm.exceptions:VLLMValidationError", "vllm.exceptions:VLLMClientError"),
        # Metrics.
        Overridden(f"{LOGGERS}:StatLoggerManager.__init__", "vllm_config, ..."),
        Has(f"{LOGGERS}:StatLoggerManager", "engine_indexes stat_loggers"),
        Called(
            f"{LOGGERS}:StatLoggerManager", "vllm_config, enable_default_loggers=, client_count="
        ),
        Steps(
            "vllm.v1.engine.async_llm:AsyncLLM.__init__",
            ("StatLoggerManager(...enable_default_loggers=log_stats, client_count=client_count",),
        ),
        Steps(
            "vllm.v1.engine.llm_engine:LLMEngine.__init__",
            ("StatLoggerManager(...enable_default_loggers=log_stats",),
        ),
        # Classes in the config: looked up by name, after the config is finished.
        VLLM_CONFIG,
        Has("vllm.config:VllmConfig", "parallel_config scheduler_config"),
        Has("vllm.config:ParallelConfig", "worker_cls"),
        Has("vllm.config:SchedulerConfig", "scheduler_cls async_scheduling"),
        Steps(
            "vllm.platforms.cpu:CpuPlatform.check_and_update_config",
            (
                "if parallel_config.worker_cls == 'auto'",
                "parallel_config.worker_cls = 'vllm.v1.worker.cpu_worker.CPUWorker'",
            ),
        ),
        Steps(
            "vllm.config:SchedulerConfig.get_scheduler_cls",
            ("resolve_obj_by_qualname(self.scheduler_cls)",),
        ),
        Steps(
            "vllm.v1.worker.worker_base:WorkerWrapperBase.init_worker",
            ("load_general_plugins()", "resolve_obj_by_qualname(parallel_config.worker_cls)"),
        ),
        Steps("vllm.v1.engine.core:EngineCore.__init__", ("load_general_plugins()",)),
        LOGGER,
        Steps(
            "vllm.platforms.cuda:CudaPlatformBase.check_and_update_config",
            ("parallel_config.worker_cls = 'vllm.v1.worker.gpu_worker.Worker'",),
        ),
    ),
    "support.py": (
        Exists("vllm:__version__"),
        Exists("vllm.envs:VLLM_USE_RUST_FRONTEND"),
        Called(f"{KV_INTERFACE}:is_quantized_kv_cache", "cache_dtype", "bool"),
        Has(
            "vllm.config:VllmConfig",
            "parallel_config cache_config scheduler_config kv_transfer_config speculative_config "
            "attention_config is_mm_encoder_only model_config use_v2_model_runner",
        ),
        Has(
            "vllm.config:ParallelConfig",
            "worker_cls decode_context_parallel_size prefill_context_parallel_size enable_dbo "
            "ubatch_size tensor_parallel_size pipeline_parallel_size",
        ),
        Has("vllm.config:SchedulerConfig", "scheduler_cls"),
        Has("vllm.config:CacheConfig", "kv_offloading_size cache_dtype kv_sharing_fast_prefill"),
        Has(
            "vllm.config:KVTransferConfig",
            "kv_connector kv_connector_extra_config kv_connector_module_path",
        ),
        Has("vllm.config:AttentionConfig", "hisparse_config backend backend_per_kind"),
        Exists("vllm.platforms:current_platform"),
        Called("vllm.platforms.interface:Platform.is_cuda", ""),
        Has(
            "vllm.config:SpeculativeConfig",
            "method draft_tensor_parallel_size use_multi_module_mtp parallel_drafting "
            "disable_padded_drafter_batch",
        ),
        Has(
            "vllm.config:ModelConfig",
            "hf_text_config runner_type supports_multimodal_inputs use_mla is_encoder_decoder "
            "is_hybrid is_attention_free is_mm_prefix_lm uses_alibi rswa_window",
        ),
        Called("vllm.config:ModelConfig.get_sliding_window", ""),
    ),
    "config.py": (Has("vllm.sampling_params:SamplingParams", "extra_args"),),
    "metrics.py": (
        Exists("vllm.config:VllmConfig"),
        Has("vllm.config:VllmConfig", "model_config observability_config"),
        Has("vllm.config:ObservabilityConfig", "show_hidden_metrics"),
        Has("vllm.config:ModelConfig", "served_model_name"),
        Called("vllm.logger:init_logger", "name"),
        Exists("vllm.v1.metrics.stats:SchedulerStats"),
        Abstract(
            f"{LOGGERS}:AggregateStatLoggerBase",
            "__init__ log_engine_initialized record",
        ),
        Overridden(
            f"{LOGGERS}:AggregateStatLoggerBase.record",
            "scheduler_stats, iteration_stats, mm_cache_stats=, engine_idx=",
        ),
        Overridden(f"{LOGGERS}:AggregateStatLoggerBase.log", ""),
        Overridden(f"{LOGGERS}:AggregateStatLoggerBase.log_engine_initialized", ""),
        Overridden(f"{LOGGERS}:AggregateStatLoggerBase.__init__", "vllm_config, engine_indexes"),
        # The plugin's logger is first and removes its counts before the other loggers run.
        Steps(
            f"{LOGGERS}:StatLoggerManager.record",
            ("for stat_logger in self.stat_loggers", "stat_logger.record("),
        ),
    ),
    "messages.py": (
        Exists("vllm.v1.core.sched.output:SchedulerOutput"),
        Exists("vllm.v1.metrics.stats:SchedulerStats"),
        Abstract("vllm.v1.outputs:AsyncModelRunnerOutput", "get_output get_kv_connector_output"),
        Overridden("vllm.v1.outputs:AsyncModelRunnerOutput.get_output", "", "ModelRunnerOutput"),
        Exists("vllm.v1.outputs:ModelRunnerOutput"),
        Defined(
            "vllm.v1.metrics.stats:SchedulerStats.kv_connector_stats",
            "kv_connector_stats: dict[str, Any] | None = None",
        ),
    ),
    "core/decisions.py": (
        Has("vllm.v1.request:RequestStatus", "RUNNING"),
        Has(
            "vllm.v1.request:Request",
            "status request_id sampling_params num_tokens mm_features num_prompt_tokens resumable "
            "max_tokens",
        ),
        Has(MANAGER, "block_size block_pool"),
        Has("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks"),
        Exists("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"),
    ),
    "core/later_evictions.py": (
        CDIV,
        Has("vllm.v1.request:Request", "request_id num_computed_tokens num_in_flight_tokens"),
        # In flight is what steps compute that have not been processed.
        Steps(
            "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule",
            (
                "request.num_computed_tokens += num_scheduled_token",
                "request.num_in_flight_tokens += num_scheduled_token",
            ),
        ),
    ),
    "core/pressure.py": (
        CDIV,
        Exists("vllm.v1.core.kv_cache_utils:BlockHash"),
        Has("vllm.v1.core.kv_cache_utils:KVCacheBlock", "ref_cnt is_null"),
        Has("vllm.v1.request:Request", "request_id num_tokens block_hashes"),
        Has(
            MANAGER,
            "block_size block_pool req_to_blocks kv_cache_group_id "
            "max_admission_blocks_per_request",
        ),
        Called(
            f"{MANAGER}.get_num_blocks_to_allocate",
            "request_id, num_tokens, new_computed_blocks, total_computed_tokens, "
            "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap",
            "int",
        ),
        Has("vllm.v1.core.single_type_kv_cache_manager:MambaManager", "mamba_cache_mode"),
        # States that a request holds, and why there are two.
        Steps(
            f"{KV_INTERFACE}:MambaSpec.max_memory_usage_bytes",
            (
                "if vllm_config.cache_config.mamba_cache_mode == 'align':",
                "2 + self.num_speculative_blocks + self.num_prefill_checkpoint_blocks",
                "1 + self.num_speculative_blocks",
            ),
        ),
        Exists("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"),
        Called(
            "vllm.v1.core.block_pool:BlockPool.get_cached_block",
            "block_hash, kv_cache_group_ids",
            "list[KVCacheBlock] | None",
        ),
    ),
    "core/output_reserve.py": (
        CDIV,
        Has("vllm.v1.request:Request", "num_tokens num_output_tokens max_tokens priority"),
    ),
    "core/block_manager.py": (
        Exists(f"{CONNECTORS}.base:KVConnectorBase_V1"),
        CDIV,
        Called("vllm.v1.request:Request.is_finished", "", "bool"),
        # Admission asks once more than allocation does, and only it may be told of later needs.
        Steps(
            f"{KV_CACHE_MANAGER}.allocate_slots",
            ("if full_sequence_must_fit:", "apply_admission_cap=True"),
        ),
        Exists("vllm.v1.core.kv_cache_utils:KVCacheBlock"),
        Has("vllm.v1.request:Request", "request_id max_tokens num_output_tokens"),
        Has(MANAGER, "block_size block_pool req_to_blocks kv_cache_group_id num_cached_block"),
        Exists("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"),
        Has("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks hash_block_size"),
        Called(
            "vllm.v1.core.block_pool:BlockPool.get_cached_block",
            "block_hash, kv_cache_group_ids",
            "list[KVCacheBlock] | None",
        ),
        Called("vllm.v1.core.block_pool:BlockPool.touch", "blocks"),
        Called("vllm.v1.core.block_pool:BlockPool.free_blocks", "ordered_blocks"),
        Called(
            "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
            "block_hashes, hash_block_size, block_size",
        ),
        Called("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "", "int"),
        Called(
            "vllm.v1.core.block_pool:BlockPool.get_new_blocks", "num_blocks", "list[KVCacheBlock]"
        ),
        Has("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id ref_cnt"),
        Overridden(f"{MANAGER}.__init__", "kv_cache_spec, ..."),
        Overridden(
            f"{MANAGER}.get_num_blocks_to_allocate",
            "request_id, num_tokens, new_computed_blocks, total_computed_tokens, ...",
            "int",
        ),
        Overridden(
            f"{MANAGER}.allocate_new_blocks",
            "request_id, num_tokens, num_tokens_main_model",
            "list[KVCacheBlock]",
        ),
        Overridden(
            f"{MANAGER}.cache_blocks",
            "request, num_tokens, retention_interval=, *, replay_boundaries",
        ),
        # Blocks before `num_cached_block` are not touched; the others are cached and announced.
        Steps(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
            (
                "num_cached_blocks = self.num_cached_block.get(request.request_id, 0)",
                "if num_cached_blocks >= num_full_blocks:",
                "self.block_pool.cache_full_blocks(",
                "self.num_cached_block[request.request_id] = num_full_blocks",
            ),
        ),
        Overridden(
            f"{MANAGER}.remove_skipped_blocks",
            "request_id, processed_computed_tokens, num_prompt_tokens=",
        ),
        Overridden(f"{MANAGER}.pop_blocks_for_free", "request_id", "list[KVCacheBlock]"),
        Called(f"{MANAGER}._remove_blocks_in_range", "request_id, first_block, last_block"),
        # Most steps of running requests are answered without a call of these methods.
        Steps(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
            ".get_num_blocks_to_allocate",
            (
                "num_required_blocks = cdiv(num_tokens, self.block_size)",
                "num_req_blocks = len(self.req_to_blocks.get(request_id, ()))",
                "if request_id in self.num_cached_block:",
                "return max(num_required_blocks - num_req_blocks, 0)",
            ),
        ),
        Steps(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
            ".allocate_new_blocks",
            (
                "if request_id in self._partial_hit_reqs:",
                "if num_new_blocks <= 0:",
                "return cow_blocks",
            ),
        ),
        Steps(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager"
            ".add_local_computed_blocks",
            ("self.num_cached_block[request_id] =", "self._partial_hit_reqs[request_id] ="),
        ),
        # Nulled blocks stay in the row, and freed ones keep their hashes.
        Steps(
            f"{MANAGER}._remove_blocks_in_range",
            ("blocks[i] = self._null_block", "self.block_pool.free_blocks(freed)"),
        ),
        Steps(f"{MANAGER}.free", ("self.pop_blocks_for_free(request_id)",)),
        # A row grows to what `num_tokens` need.
        Steps(
            f"{MANAGER}.allocate_new_blocks",
            (
                "num_required_blocks = cdiv(num_tokens, self.block_size)",
                "num_new_blocks = num_required_blocks - len(req_blocks)",
                "req_blocks.extend(new_blocks)",
            ),
        ),
        # Prompt blocks are freed before the step's blocks are counted and taken; a block is hashed
        # after it is allocated.
        Steps(
            f"{KV_CACHE_MANAGER}.allocate_slots",
            (
                "self.coordinator.get_num_blocks_to_allocate(...apply_admission_cap=True",
                "self.coordinator.remove_skipped_blocks(request.request_id, "
                "max(0, total_computed_tokens - request.num_in_flight_tokens)",
                "self.coordinator.get_num_blocks_to_allocate(...num_tokens=num_tokens_need_slot",
                "> available_blocks",
                "self.coordinator.allocate_new_computed_blocks(",
                "self.coordinator.allocate_new_blocks(request.request_id, num_tokens_need_slot, "
                "num_tokens_main_model",
                "self.coordinator.cache_blocks(request, num_tokens_to_cache)",
            ),
        ),
        # What the coordinator passes on, and how.
        Steps(
            f"{COORDINATOR}.get_num_blocks_to_allocate",
            (
                "manager.get_num_blocks_to_allocate(request_id, num_tokens, "
                "new_computed_blocks[i], total_computed_tokens",
            ),
        ),
        Steps(
            f"{COORDINATOR}.allocate_new_blocks",
            ("manager.allocate_new_blocks(request_id, ...num_tokens, num_tokens_main_model)",),
        ),
        Steps(
            f"{COORDINATOR}.cache_blocks",
            ("manager.cache_blocks(request, ...replay_boundaries=",),
        ),
        Steps(
            f"{COORDINATOR}.remove_skipped_blocks",
            (
                "manager.remove_skipped_blocks(request_id, processed_computed_tokens, "
                "num_prompt_tokens)",
            ),
        ),
        Steps(f"{COORDINATOR}.free", ("manager.free(request_id)",)),
        Steps(f"{COORDINATOR}.pop_blocks_for_free", ("manager.pop_blocks_for_free(request_id)",)),
    ),
    "core/spec.py": (
        Exists(f"{KV_INTERFACE}:FullAttentionSpec"),
        Exists(f"{KV_INTERFACE}:KVCacheSpec"),
        Extends(f"{KV_INTERFACE}:MLAAttentionSpec", f"{KV_INTERFACE}:FullAttentionSpec"),
        Overridden(f"{KV_INTERFACE}:MLAAttentionSpec.merge", "specs", "Self"),
        Has(
            f"{KV_INTERFACE}:MLAAttentionSpec",
            "head_size_v cache_role model_version tokens_per_state",
        ),
        Overridden(f"{KV_INTERFACE}:FullAttentionSpec.merge", "specs", "Self"),
        Called(
            "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec",
            "manager_class=, uniform_type_base_spec=",
        ),
        Called("vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered", ""),
    ),
    "core/admission.py": (
        FEATURES,
        Has("vllm.multimodal.inputs:PlaceholderRange", "offset length"),
        CDIV,
    ),
    "core/connectors.py": (
        REQUEST,
        Has(
            "vllm.v1.request:Request",
            "kv_transfer_params num_prompt_tokens num_computed_tokens skip_reading_prefix_cache",
        ),
        Has("vllm.v1.core.kv_cache_utils:KVCacheBlock", "block_id"),
        Has(
            "vllm.config:KVTransferConfig",
            "kv_connector kv_connector_extra_config kv_connector_module_path",
        ),
        Called(
            f"{CONNECTORS}.base:KVConnectorBase_V1.get_num_new_matched_tokens",
            "request, num_computed_tokens",
            "tuple[int | None, bool]",
        ),
        Has(f"{CONNECTORS}.multi_connector:MultiConnector", "_connectors"),
        Exists(f"{CONNECTORS}.example_connector:ExampleConnector"),
        Exists(f"{CONNECTORS}.nixl.connector:NixlPullConnector"),
        Defined(f"{CONNECTORS}.nixl.connector:NixlConnector", "NixlConnector = NixlPullConnector"),
        # What `OffloadingConnector` knows of a request, and when it copies.
        Has(f"{CONNECTORS}.offloading_connector:OffloadingConnector", "connector_scheduler"),
        Has(
            f"{OFFLOADING}:OffloadingConnectorScheduler",
            "_req_status _current_batch_allocated_block_ids",
        ),
        Has(
            f"{OFFLOADING}:RequestOffloadState",
            "transfer_jobs max_load_tokens max_offload_tokens",
        ),
        # A bound of one token more than whole blocks finds a hit of these blocks.
        Steps(
            f"{OFFLOADING}:OffloadingConnectorScheduler._lookup_complete_chunks",
            ("num_computed_tokens + req_status.max_load_tokens", "max_hit_size_tokens -= 1"),
        ),
        Steps(
            f"{OFFLOADING}:OffloadingConnectorScheduler._calc_num_offloadable_tokens",
            ("max_offload_tokens = req_status.max_offload_tokens", "min(num, max_offload_tokens)"),
        ),
        Steps(
            f"{OFFLOADING}:OffloadingConnectorScheduler._build_store_jobs",
            ("req_status.transfer_jobs.add(job_id)",),
        ),
        # `SimpleCPUOffloadConnector` holds what it copies, and stores blocks by their own hashes.
        Has(
            f"{CONNECTORS}.simple_cpu_offload_connector:SimpleCPUOffloadConnector",
            "scheduler_manager",
        ),
        Has(SIMPLE_OFFLOADING, "_pending_cpu_hits _reqs_to_store cpu_block_pool fa_block_size"),
        Has("vllm.v1.simple_kv_offload.manager:StoreRequestState", "request num_stored_blocks"),
        Called(f"{SIMPLE_OFFLOADING}._free_pending_cpu_hit", "pending", "None"),
        Steps(
            f"{SIMPLE_OFFLOADING}.get_num_new_matched_tokens",
            ("self._pending_cpu_hits[request.request_id] = (cpu_hit_blocks, ...",),
        ),
        Steps(
            f"{SIMPLE_OFFLOADING}._prepare_eager_store_specs",
            (
                "self._select_eager_blocks_to_store(state, block_ids_by_group)",
                "gpu_block_pool.touch([gpu_block_pool.blocks[bid] for bid in gpu_block_ids])",
            ),
        ),
        Steps(
            f"{SIMPLE_OFFLOADING}._classify_store_candidate",
            ("if gpu_block.block_hash is None", "return _StoreAdmission.NOT_HASHED"),
        ),
        # LMCache waits before the step that may overwrite blocks.
        Has("vllm.v1.core.sched.output:SchedulerOutput", "total_num_scheduled_tokens"),
        Steps(
            f"{V1_RUNNER}.execute_model",
            ("get_kv_transfer_group().handle_preemptions(kv_connector_metadata)",),
        ),
        Steps(
            "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.pre_forward",
            ("self.kv_connector.handle_preemptions(kv_connector_metadata)",),
        ),
        # LMCache's package brings the connector; that of this module is its older copy.
        Steps(
            f"{CONNECTORS}.lmcache_mp_connector:_resolve_lmcache_mp_connector",
            ("return _ExternalLMCacheMPConnector",),
        ),
    ),
    "core/patch_grids.py": (
        FEATURES,
        Called(
            "vllm.multimodal.inputs:PlaceholderRange.extract_embeds_range",
            "",
            "list[tuple[int, int]]",
        ),
        Has("vllm.multimodal.inputs:MultiModalFieldElem", "data"),
        Has("vllm.config:ModelConfig", "hf_config uses_mrope multimodal_config"),
        Called("vllm.config:MultiModalConfig.is_multimodal_pruning_enabled", ""),
    ),
    "core/scheduler.py": (
        Exists(f"{KV_INTERFACE}:AttentionSpec"),
        Exists("vllm.v1.core.kv_cache_manager:KVCacheBlocks"),
        Extends("vllm.v1.core.sched.async_scheduler:AsyncScheduler", SCHEDULER),
        Exists("vllm.v1.core.sched.output:SchedulerOutput"),
        Exists("vllm.v1.engine:EngineCoreOutputs"),
        Exists("vllm.v1.metrics.stats:SchedulerStats"),
        Exists("vllm.v1.outputs:ModelRunnerOutput"),
        REQUEST,
        Has(
            SCHEDULER,
            "kv_cache_manager requests running waiting kv_holding_waiting max_num_active_reqs",
        ),
        Overridden(f"{SCHEDULER}.__init__", "..."),
        Overridden("vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__", "..."),
        Overridden(f"{SCHEDULER}.schedule", "...", "SchedulerOutput"),
        Overridden(
            f"{SCHEDULER}.update_from_output",
            "scheduler_output, model_runner_output",
            "dict[int, EngineCoreOutputs]",
        ),
        Overridden(f"{SCHEDULER}.make_stats", "...", "SchedulerStats | None"),
        Overridden(
            f"{SCHEDULER}._get_local_prefix_cache_hit",
            "request, ...",
            "tuple[KVCacheBlocks, int, int, bool]",
        ),
        Has(KV_CACHE_MANAGER, "coordinator block_pool"),
        Has(COORDINATOR, "single_type_managers"),
        Called("vllm.v1.core.sched.request_queue:RequestQueue.__iter__"),
        Called(
            f"{COORDINATOR}.find_longest_cache_hit",
            "block_hashes, max_cache_hit_length",
            "tuple[tuple[list[KVCacheBlock], ...], int, int]",
        ),
        Called(f"{KV_CACHE_MANAGER}.create_kv_cache_blocks", "blocks", "KVCacheBlocks"),
        # Where groups with a sliding window cache a prefix for later hits.
        Steps(
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks",
            (
                "reachable_boundaries.append(request.shared_prefix_boundary)",
                "self.reachable_block_mask(...reachable_boundaries=reachable_boundaries",
            ),
        ),
        Has("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks get_num_free_blocks"),
        # A connector's hit is asked for before the request gets blocks.
        Overridden(f"{SCHEDULER}.add_request", "request", "None"),
        Overridden(f"{SCHEDULER}._update_waiting_for_remote_kv", "request", "None"),
        Steps(f"{SCHEDULER}.add_request", ("self.connector.on_new_request(request)",)),
        Steps(
            f"{SCHEDULER}.schedule",
            (
                "self._get_local_prefix_cache_hit(request",
                "self.connector.get_num_new_matched_tokens(",
                "self.kv_cache_manager.allocate_slots(...delay_cache_blocks=load_kv_async",
                "self.connector.update_state_after_alloc(",
            ),
        ),
        # Running requests come first. The prefix hit of a new one is known before it gets blocks.
        Steps(
            f"{SCHEDULER}.schedule",
            (
                "while req_index < len(self.running)",
                "self.kv_cache_manager.allocate_slots(request, num_new_tokens",
                "request.shared_prefix_boundary...self._get_local_prefix_cache_hit(request",
                "self.kv_cache_manager.allocate_slots(...full_sequence_must_fit=",
            ),
        ),
        Steps(
            f"{SCHEDULER}.add_request",
            (
                "self._enqueue_waiting_request(request)",
                "self.requests[request.request_id] = request",
            ),
        ),
        # Reports of a step are counted before its statistics are created.
        Steps(f"{SCHEDULER}.update_from_output", ("self.make_stats(",)),
    ),
    "attention/per_layer.py": (
        Exists("vllm.config:VllmConfig"),
        Called("vllm.config:get_current_vllm_config", "", "VllmConfig"),
        Called(f"{KV_INTERFACE}:is_quantized_kv_cache", "cache_dtype", "bool"),
        Exists(f"{KV_INTERFACE}:KVCacheSpec"),
        Has("vllm.v1.attention.backend:AttentionLayer", "_k_scale_float"),
        Has("vllm.v1.attention.backend:AttentionCGSupport", "UNIFORM_BATCH"),
        Has("vllm.v1.kv_cache_layout:KVCacheLayout", "LBNHC LBHNC BLNHC BLHNC"),
        Has(
            "vllm.model_executor.layers.attention.attention:Attention",
            "layer_name kv_cache head_size",
        ),
        Steps(
            "vllm.model_executor.layers.attention.attention:Attention.forward",
            ("not self.attn_backend.forward_includes_kv_cache_update",),
        ),
        # A step with only the last token of a prefill runs as a decode step: `DecodeGraphsMixin`.
        Steps(
            "vllm.v1.worker.gpu.attn_utils:get_attn_cg_support",
            ("builder.get_cudagraph_support(vllm_config, group.kv_cache_spec)",),
        ),
    ),
    "attention/latent.py": (
        Overridden(
            f"{MLA}:MLAAttention.forward_impl",
            "q, k_c_normed, k_pe, kv_cache, attn_metadata, output, ...",
        ),
        Overridden(
            f"{MLA}:MLAAttention.update_kv_cache",
            "kv_c_normed, k_pe, kv_cache, slot_mapping, attn_metadata, ...",
        ),
        Steps(
            f"{MLA}:unified_mla_kv_cache_update",
            ("attn_layer.update_kv_cache(",),
        ),
        Steps(
            f"{MLA}:unified_mla_attention_with_output",
            ("layer.forward_impl(",),
        ),
        # Prefills follow decodes.
        Steps(
            f"{MLA}:MLAAttention.forward_impl",
            (
                "num_mqa_tokens = attn_metadata.num_decode_tokens",
                "q[num_mqa_tokens:]",
                "mqa_q = q[:num_mqa_tokens]",
                "torch.bmm(mqa_q_nope, W_UK_T",
            ),
        ),
        Has(
            f"{MLA}:MLAAttention",
            "impl layer_name scale qk_nope_head_dim qk_rope_head_dim",
        ),
        Steps(
            f"{MLA}:MLAAttention.process_weights_after_loading",
            ("replace_parameter(self, 'W_UK_T', W_UK.permute(1, 2, 0)",),
        ),
        Has(f"{MLA}:MLACommonMetadata", "prefill decode slot_mapping num_decodes"),
        Has(f"{MLA}:MLACommonPrefillMetadata", "block_table"),
        Has(f"{MLA}:MLACommonDecodeMetadata", "block_table seq_lens"),
        Exists("vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl"),
        # A cached vector is the key, with the value in front.
        Steps(
            "vllm.v1.attention.backends.mla.cpu_mla:CPUMLAImpl.do_kv_cache_update",
            ("flat[slots, :kv_lora_rank]", "flat[slots, kv_lora_rank:]"),
        ),
    ),
    "attention/registration.py": (
        Called("vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear"),
        Has(f"{BACKENDS}:AttentionBackendEnum", "CPU_ATTN FLASH_ATTN TRITON_ATTN"),
        Exists("vllm.platforms:current_platform"),
        Exists("vllm.platforms.cuda"),
        Overridden(
            "vllm.platforms.cuda:_get_backend_priorities", "use_mla, device_capability, ..."
        ),
        Called("vllm.platforms.interface:Platform.is_cpu", ""),
        Steps(
            "vllm.platforms.cuda:CudaPlatformBase.get_valid_backends",
            ("backend_priorities = _get_backend_priorities(", "_get_attn_backend_class(backend)"),
        ),
        Steps("vllm.platforms.cuda:_get_attn_backend_class", ("return backend.get_class()",)),
        Called(f"{BACKENDS}:AttentionBackendEnum.get_path", ""),
        Called(f"{BACKENDS}:AttentionBackendEnum.is_overridden", ""),
        Called(f"{BACKENDS}:AttentionBackendEnum.clear_override", ""),
        Called(f"{BACKENDS}:register_backend", "backend, class_path"),
        Steps(
            "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            ("return AttentionBackendEnum.CPU_ATTN.get_path()",),
        ),
    ),
    "attention/flash.py": _gpu_backend(FLASH_ATTN, "FlashAttention"),
    "attention/triton.py": _gpu_backend(TRITON_ATTN, "TritonAttention"),
    "attention/cpu_packing.py": (
        Exists("vllm._custom_ops"),
        Called(
            "vllm._custom_ops:cpu_attn_reshape_and_cache",
            "key, value, key_cache, value_cache, slot_mapping, isa, kv_cache_dtype=",
        ),
    ),
    "attention/cpu.py": (
        Exists("vllm._custom_ops"),
        Called(
            "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
            "num_reqs=, num_heads=, num_kv_heads=, head_dim=, seq_lens=, dtype=, "
            "query_start_loc=, causal=, sliding_window_size=, isa=, enable_kv_split=, "
            "kv_cache_dtype=",
        ),
        Exists("vllm.envs"),
        Exists("vllm.envs:VLLM_CPU_ATTN_SPLIT_KV"),
        Exists("vllm.v1.attention.backend:CommonAttentionMetadata"),
        Has(f"{CPU_ATTN}:CPUAttentionBackend", "forward_includes_kv_cache_update"),
        Overridden(f"{CPU_ATTN}:CPUAttentionBackend.get_impl_cls", ""),
        Overridden(f"{CPU_ATTN}:CPUAttentionBackend.get_builder_cls", ""),
        Has(
            f"{CPU_ATTN}:CPUAttentionMetadata",
            "query_start_loc seq_lens block_table slot_mapping scheduler_metadata causal",
        ),
        Has(
            f"{CPU_ATTN}:CPUAttentionMetadataBuilder",
            "num_heads num_kv_heads head_dim dtype window_size isa kv_cache_dtype",
        ),
        Overridden(
            f"{CPU_ATTN}:CPUAttentionMetadataBuilder.build",
            "common_prefix_len, common_attn_metadata, fast_build=",
            "CPUAttentionMetadata",
        ),
        Has(
            f"{CPU_ATTN}:CPUAttentionBackendImpl",
            "sinks alibi_slopes kv_sharing_target_layer_name scale logits_soft_cap kv_cache_dtype",
        ),
        Overridden(f"{CPU_ATTN}:CPUAttentionBackendImpl.__init__", "..."),
        Overridden(
            f"{CPU_ATTN}:CPUAttentionBackendImpl.forward",
            "layer, query, key, value, kv_cache, attn_metadata, output, output_scale=, "
            "output_block_scale=",
        ),
        Overridden(
            f"{CPU_ATTN}:CPUAttentionBackendImpl.do_kv_cache_update",
            "layer, key, value, kv_cache, slot_mapping",
        ),
        # The kernel's arguments, which `schedule` repeats with the lengths of one layer.
        Steps(
            f"{CPU_ATTN}:CPUAttentionMetadataBuilder.build",
            (
                "ops.cpu_attn_get_scheduler_metadata(num_reqs=num_reqs, num_heads=self.num_heads, "
                "num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, seq_lens=seq_lens, "
                "dtype=self.dtype, query_start_loc=query_start_loc, causal=causal, "
                "sliding_window_size=self.window_size, isa=self.isa, "
                "enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, dynamic_causal=dynamic_casual, "
                "kv_cache_dtype=self.kv_cache_dtype)",
            ),
        ),
        # In a head's page, V follows K.
        Steps(
            f"{CPU_ATTN}:CPUAttentionBackendImpl.do_kv_cache_update",
            ("kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))", ".chunk(2, dim=2)"),
        ),
        # The builder sets `isa` of a layer.
        Steps(
            f"{CPU_ATTN}:CPUAttentionMetadataBuilder._set_isa_to_layers", ("layer.isa = self.isa",)
        ),
        Has(
            "vllm.model_executor.layers.attention.attention:Attention",
            "kv_cache head_size kv_cache_dtype",
        ),
    ),
    "worker/requests.py": (
        FEATURES,
        Exists("vllm.config:ModelConfig"),
        Has("vllm.sampling_params:SamplingParams", "max_tokens"),
    ),
    "worker/step.py": (CDIV,),
    "worker/trace.py": (CDIV,),
    "worker/step_tables.py": (Called("vllm.utils.math_utils:round_up", "x, y"),),
    "worker/evictor.py": (
        LOGGER,
        Has("vllm.logger:_VllmLogger", "warning_once"),
        Has("vllm.v1.core.sched.output:CachedRequestData", "req_ids num_output_tokens"),
    ),
    "worker/build.py": (
        Has(
            "vllm.config:VllmConfig",
            "compilation_config scheduler_config model_config parallel_config cache_config",
        ),
        Has("vllm.config:CompilationConfig", "static_forward_context max_cudagraph_capture_size"),
        # No graph has more requests than that.
        Steps(
            "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
            (
                "self.compilation_config.cudagraph_capture_sizes",
                "num_reqs=min(num_tokens, self.max_num_reqs)",
                "or rounded_num_tokens > max_cg_capture_size",
                "or rounded_num_reqs > self.max_num_reqs",
            ),
        ),
        Has("vllm.config:SchedulerConfig", "max_num_seqs max_num_batched_tokens"),
        Has("vllm.config:ModelConfig", "max_model_len dtype"),
        Called("vllm.config:ModelConfig.get_total_num_kv_heads", "", "int"),
        Called("vllm.config:ModelConfig.get_total_num_hidden_layers", "", "int"),
        Has("vllm.config:CacheConfig", "cache_dtype"),
        Has("vllm.config:ParallelConfig", "tensor_parallel_size"),
        Called("vllm.model_executor.models.utils:extract_layer_index", "layer_name", "int"),
        CDIV,
        Has(
            f"{KV_INTERFACE}:KVCacheConfig",
            "kv_cache_groups kv_cache_tensors num_blocks kv_cache_layout",
        ),
        Has(f"{KV_INTERFACE}:KVCacheTensor", "layers layer_stride block_stride"),
        Has(f"{KV_INTERFACE}:KVCacheGroupSpec", "kv_cache_spec layer_names"),
        Exists(f"{KV_INTERFACE}:SlidingWindowSpec"),
        Has(f"{KV_INTERFACE}:MambaSpec", "mamba_type"),
        Has("vllm.v1.attention.backends.registry:MambaAttentionBackendEnum", "GDN_ATTN SHORT_CONV"),
        Has("vllm.config:DeviceConfig", "device_type"),
        Has(
            f"{KV_INTERFACE}:FullAttentionSpec",
            "head_size head_size_v block_size dtype unpadded_page_size_bytes page_size_bytes",
        ),
        Has(
            "vllm.model_executor.layers.attention.attention:Attention",
            "kv_cache impl num_heads kv_sharing_target_layer_name",
        ),
        Has(f"{MLA}:MLAAttention", "kv_cache impl num_heads"),
        Steps(f"{MLA}:MLAAttention.bind_kv_cache", ("self.kv_cache = kv_cache.squeeze(1)",)),
        # Layers that read another layer's cache get the metadata of that layer's group.
        Steps(
            "vllm.v1.worker.utils:add_kv_sharing_layers_to_kv_cache_groups",
            ("tgt_kv_cache_group.layer_names.append(layer_name)",),
        ),
    ),
    "worker/cpu_worker.py": (
        LOGGER,
        Has("vllm.logger:_VllmLogger", "warning_once"),
        Exists(f"{KV_INTERFACE}:KVCacheConfig"),
        Extends(CPU_WORKER, WORKER),
        Overridden(f"{CPU_WORKER}.initialize_from_config", "kv_cache_config"),
    ),
    "worker/gpu_worker.py": (
        Exists(f"{V2_RUNNER}.profile_run"),
        Overridden(f"{WORKER}.determine_available_memory", "", "int"),
        Has(WORKER, "device compilation_config model_config model_runner vllm_config"),
        Has("vllm.config:CompilationConfig", "static_forward_context"),
        Has("vllm.config:ModelConfig", "dtype max_model_len"),
        Called("vllm.config:ModelConfig.get_hidden_size", "", "int"),
        Has("vllm.config:SchedulerConfig", "max_num_batched_tokens"),
        Has(f"{KV_INTERFACE}:FullAttentionSpec", "num_kv_heads block_size head_size dtype"),
        Steps(
            f"{WORKER}.determine_available_memory",
            ("self.model_runner.profile_run(", "self.model_runner.profile_cudagraph_memory()"),
        ),
    ),
    "worker/warmup.py": (CDIV,),
    "core/observation_budget.py": (
        Has("vllm.config:VllmConfig", "device_config model_config scheduler_config"),
        Has("vllm.config:DeviceConfig", "device_type"),
        Has(f"{KV_INTERFACE}:AttentionSpec", "num_kv_heads"),
        Has("vllm.config:ModelConfig", "max_model_len"),
        Has("vllm.config:SchedulerConfig", "max_num_batched_tokens"),
    ),
    "worker/base_worker.py": (
        Called("vllm.distributed:get_pp_group", "", "GroupCoordinator"),
        Has("vllm.distributed.parallel_state:GroupCoordinator", "is_last_rank"),
        Exists(f"{KV_INTERFACE}:KVCacheConfig"),
        Exists(f"{KV_INTERFACE}:KVCacheSpec"),
        Has(WORKER, "vllm_config model_runner use_v2_model_runner"),
        Overridden(f"{WORKER}.load_model", "..."),
        Overridden(f"{WORKER}.get_kv_cache_spec", "", "dict[str, KVCacheSpec]"),
        Overridden(f"{WORKER}.initialize_from_config", "kv_cache_config"),
        Overridden(f"{WORKER}.execute_model", "scheduler_output"),
        Has("vllm.v1.core.sched.output:SchedulerOutput", "finished_req_ids preempted_req_ids"),
        Has("vllm.v1.core.sched.output:SchedulerOutput", "scheduled_cached_reqs"),
        Overridden(f"{WORKER}.sample_tokens", "..."),
        # The cache exists when this method of the worker returns. The warm-up comes later.
        Steps(
            f"{WORKER}.initialize_from_config",
            ("self.model_runner.initialize_kv_cache(kv_cache_config",),
        ),
        Steps(
            "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
            (
                "self.model_executor.get_kv_cache_specs()",
                "get_kv_cache_configs(vllm_config, kv_cache_specs",
                "self.model_executor.initialize_from_config(kv_cache_configs)",
            ),
        ),
    ),
    "worker/v1.py": (
        Exists(f"{V1_RUNNER}._build_attention_metadata"),
        Overridden(
            f"{V1_RUNNER}._build_attention_metadata",
            "...",
            "tuple[PerLayerAttnMetadata, CommonAttentionMetadata | None]",
        ),
        Called(f"{V1_RUNNER}._build_attention_metadata", "a, b, c, num_scheduled_tokens="),
        Extends("vllm.v1.worker.cpu_model_runner:CPUModelRunner", V1_RUNNER),
        Has(V1_RUNNER, "requests input_batch model_config query_start_loc seq_lens"),
        Has(
            "vllm.v1.worker.gpu_input_batch:CachedRequestState",
            "block_ids mm_features sampling_params num_prompt_tokens output_token_ids",
        ),
        Has(
            "vllm.v1.worker.gpu_input_batch:InputBatch",
            "req_ids num_reqs num_computed_tokens_cpu block_table",
        ),
        Defined(f"{V1_RUNNER}.query_start_loc", "self.query_start_loc = self._make_buffer(..."),
        Defined(f"{V1_RUNNER}.seq_lens", "self.seq_lens = torch.zeros(..."),
        Defined(
            "vllm.v1.worker.gpu_input_batch:CachedRequestState.block_ids",
            "block_ids: tuple[list[int], ...]",
        ),
        Called("vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__", "index"),
        Called("vllm.v1.worker.block_table:BlockTable.get_device_tensor", "num_reqs"),
        Has("vllm.v1.utils:CpuGpuBuffer", "gpu"),
        # The keyword identifies a real batch. Batch and lengths are those of this step.
        Steps(
            f"{V1_RUNNER}.execute_model",
            (
                "self._update_states(scheduler_output)",
                "self._prepare_inputs(scheduler_output",
                "attn_metadata, ... = self._build_attention_metadata("
                "...num_scheduled_tokens=scheduler_output.num_scheduled_tokens",
            ),
        ),
        Steps(f"{V1_RUNNER}._dummy_run", ("self._build_attention_metadata(",)),
        Never(f"{V1_RUNNER}._dummy_run", "self._build_attention_metadata(...num_scheduled_tokens="),
        # Block ids are extended in place, and replaced when a preempted request resumes.
        Steps(
            f"{V1_RUNNER}._update_states",
            ("block_ids.extend(new_ids)", "req_state.block_ids = new_block_ids"),
        ),
        Steps(f"{V1_RUNNER}._prepare_inputs", ("self.query_start_loc.copy_to_gpu()",)),
        # A draft model: one call for each of its passes, the first over the step's own tokens.
        Has(PROPOSER, "_draft_attn_layer_names"),
        Overridden(
            f"{PROPOSER}.build_per_group_and_layer_attn_metadata",
            "common_attn_metadata, draft_index=",
            "tuple[list[object], dict[str, object]]",
        ),
        Steps(
            f"{PROPOSER}.propose",
            (
                "self.build_per_group_and_layer_attn_metadata(common_attn_metadata)",
                "common_attn_metadata.seq_lens -= num_rejected_tokens_gpu",
                "self._update_positions_dependent_metadata(",
                "self.build_per_group_and_layer_attn_metadata(common_attn_metadata, "
                "draft_index=token_index + 1)",
            ),
        ),
        # The first pass has the tokens of the model's step, those of rejected drafts included.
        Steps(
            f"{PROPOSER}.prepare_inputs_padded",
            (
                "query_start_loc=common_attn_metadata.query_start_loc",
                "seq_lens=common_attn_metadata.seq_lens",
            ),
        ),
    ),
    "worker/generators.py": (
        Overridden(f"{V1_RUNNER}._sample", "logits, spec_decode_metadata", "SamplerOutput"),
        Has(V1_RUNNER, "input_batch requests discard_request_mask"),
        Has("vllm.v1.utils:CpuGpuBuffer", "np"),
        Has("vllm.v1.worker.gpu_input_batch:CachedRequestState", "generator"),
        Has("vllm.v1.worker.gpu_input_batch:InputBatch", "generators req_ids num_reqs"),
        # A request that was preempted returns with the generator of its state.
        Steps(
            "vllm.v1.worker.gpu_input_batch:InputBatch.add_request",
            ("self.generators[req_index] = request.generator",),
        ),
        Steps(
            "vllm.v1.worker.gpu_input_batch:InputBatch._make_sampling_metadata",
            ("generators=self.generators",),
        ),
        # The batch, and which samples are discarded, are one step's from sampling to bookkeeping.
        Steps(
            f"{V1_RUNNER}.sample_tokens",
            ("self._sample(logits, spec_decode_metadata)", "self._bookkeeping_sync("),
        ),
        Steps(
            f"{V1_RUNNER}._bookkeeping_sync",
            (
                "np.nonzero(self.discard_request_mask.np[:num_reqs])[0]",
                "gen = self.input_batch.generators.get(int(i))",
                "gen.set_offset(gen.get_offset() - 4)",
            ),
        ),
    ),
    "worker/v2.py": (
        Exists(f"{V2_STATE}.add_request"),
        Exists(f"{V2_STATE}.remove_request"),
        Exists(f"{V2_STATE}.prepare_attn"),
        Exists(f"{V2_RUNNER}.gather_batch_req_state"),
        Has(
            "vllm.v1.core.sched.output:NewRequestData",
            "req_id prefill_token_ids mm_features sampling_params",
        ),
        Has(
            "vllm.v1.worker.gpu.input_batch:InputBatch",
            "req_ids idx_mapping_np num_computed_tokens_np num_scheduled_tokens "
            "query_start_loc seq_lens num_reqs_after_padding num_tokens_after_padding",
        ),
        Has("vllm.config:CUDAGraphMode", "FULL"),
        Exists("vllm.v1.core.sched.output:SchedulerOutput"),
        Has(V2_RUNNER, "model_state model_config max_num_reqs vllm_config req_states"),
        Overridden(f"{V2_RUNNER}.gather_batch_req_state", "scheduler_output, dummy_run"),
        Has(
            "vllm.v1.worker.gpu.model_runner:BatchReqState",
            "has_prefill idx_mapping_np is_prefilling_np num_computed_prefill_tokens_np "
            "num_scheduled_tokens num_tokens",
        ),
        Has("vllm.config:CompilationConfig", "cudagraph_capture_sizes"),
        Has("vllm.config:ParallelConfig", "data_parallel_size"),
        Has("vllm.v1.worker.gpu.states:RequestState", "num_computed_tokens_np"),
        # A draft model: the first pass gets the model's metadata, the others build their own.
        Has(V2_RUNNER, "speculator"),
        Has(
            f"{V2_DRAFTS}.speculator:DraftModelSpeculator",
            "supports_decode_metadata_update draft_attn_layer_names",
        ),
        Exists(f"{V2_DRAFTS}.speculator:DraftModelSpeculator._configure_decode_metadata_update"),
        Overridden(
            f"{V2_DRAFTS}.speculator:DraftModelSpeculator._build_attn_metadata",
            "...",
            "dict[str, Any] | None",
        ),
        Overridden(f"{V2_SPECULATOR}._prefill", "num_reqs, num_tokens, attn_metadata, ..."),
        Steps(f"{V2_SPECULATOR}.propose", ("self._prefill(num_reqs, ..., attn_metadata,",)),
        Steps(
            f"{V2_SPECULATOR}.propose",
            ("self._fused_multi_step_decode if self.supports_decode_metadata_update",),
        ),
        Steps(
            f"{V2_SPECULATOR}._multi_step_decode",
            ("for step in range(1,", "attn_metadata = self._build_uniform_attn_metadata("),
        ),
        Overridden(f"{V2_STATE}.add_request", "req_index, new_req_data"),
        Overridden(f"{V2_STATE}.remove_request", "req_id"),
        Overridden(
            f"{V2_STATE}.prepare_attn",
            "input_batch, cudagraph_mode, block_tables, ...",
            "dict[str, Any]",
        ),
        # A resumed request is removed first, which frees its slot.
        Steps(
            f"{V2_RUNNER}.add_requests",
            (
                "self._remove_request(req_id)",
                "self.model_state.add_request(req_index, new_req_data)",
            ),
        ),
        # The index of a request's state, by which a batch names it.
        Steps(
            f"{V2_RUNNER}.gather_batch_req_state",
            (
                "self.req_states.req_id_to_index",
                "is_prefilling_np = num_computed_prefill_tokens_np <",
            ),
        ),
        Steps(
            f"{V2_RUNNER}.add_requests",
            ("req_index = self.req_states.req_id_to_index[req_id]", "add_request(req_index,"),
        ),
        Steps(f"{V2_RUNNER}._remove_request", ("self.model_state.remove_request(req_id)",)),
        Steps(
            f"{V2_RUNNER}.finish_requests",
            ("finished_req_ids.union(preempted_req_ids)", "self._remove_request(req_id)"),
        ),
        # The rows that this package reads are gathered before the metadata is built.
        Steps(
            f"{V2_RUNNER}.execute_model",
            (
                "self.finish_requests(scheduler_output)",
                "self.add_requests(scheduler_output)",
                "self.block_tables.apply_staged_writes()",
                "self.gather_batch_req_state(",
                "input_batch = self.prepare_inputs(scheduler_output",
                "self.prepare_attn(input_batch)",
                "self.model_state.prepare_attn(input_batch",
            ),
        ),
        # Dummy batches are marked for capture, or have request ids that were never added.
        Steps(
            "vllm.v1.worker.gpu.cudagraph_utils:prepare_inputs_to_capture",
            ("model_state.prepare_attn(...for_capture=",),
        ),
    ),
    "worker/tp_group.py": (
        Called("vllm.distributed:get_tp_group", "", "GroupCoordinator"),
        Has("vllm.distributed.parallel_state:GroupCoordinator", "device_group rank_in_group"),
    ),
    "inspector/engine.py": (
        Exists("vllm:LLM"),
        Has("vllm:LLM", "llm_engine"),
        Has("vllm.v1.engine.llm_engine:LLMEngine", "engine_core"),
        Called("vllm.v1.engine.core_client:EngineCoreClient.shutdown", ""),
        Called("vllm.distributed:cleanup_dist_env_and_memory", ""),
    ),
    "inspector/cli.py": (
        Called("vllm:LLM.from_engine_args", "engine_args"),
        Called(f"{ENGINE_ARGS}.add_cli_args", "parser"),
        Called(f"{ENGINE_ARGS}.from_cli_args", "args"),
        Has(
            ENGINE_ARGS,
            "additional_config disable_log_stats limit_mm_per_prompt model revision "
            "trust_remote_code mm_processor_kwargs",
        ),
        Called("vllm.plugins:load_general_plugins", ""),
        Exists("vllm.utils.argparse_utils:FlexibleArgumentParser"),
    ),
    "inspector/request.py": (
        Called("vllm:SamplingParams", "temperature=, max_tokens=, extra_args="),
        Called("vllm:LLM.chat", "messages, parameters, use_tqdm=", "list[RequestOutput]"),
        Called("vllm:LLM.get_tokenizer", ""),
        Has("vllm:LLM", "llm_engine"),
        Has("vllm.v1.engine.llm_engine:LLMEngine", "vllm_config"),
        Has("vllm.config:VllmConfig", "cache_config"),
        Has("vllm.config:CacheConfig", "block_size num_gpu_blocks"),
        Has("vllm:RequestOutput", "prompt_token_ids outputs"),
        Has("vllm.outputs:CompletionOutput", "text finish_reason"),
    ),
    "self_check/cli.py": (
        Exists("vllm.platforms:current_platform"),
        Called("vllm.platforms.interface:Platform.is_cuda", ""),
        # Imported once for all engines.
        Exists("vllm.entrypoints.llm"),
        Exists("vllm.v1.engine.core"),
        Exists("vllm.v1.worker.gpu_worker"),
        Exists("vllm.v1.worker.gpu.model_runner"),
        Exists("vllm.model_executor.models.llava"),
    ),
    "self_check/record.py": (
        Exists("vllm:__version__"),
        Exists("vllm.envs:VLLM_CACHE_ROOT"),
        Exists("vllm.platforms:current_platform"),
        Called("vllm.platforms.cuda:NvmlCudaPlatform.get_device_name", "device_id"),
        Called("vllm.platforms.cuda:CudaPlatformBase.device_count", ""),
        Called("vllm.utils.import_utils:import_pynvml", ""),
    ),
    "self_check/model.py": (
        Exists("vllm.config:ModelConfig"),
        Exists("vllm.model_executor.layers.attention:Attention"),
        Has("vllm.model_executor.layers.attention:Attention", "impl head_size"),
        Called("vllm.model_executor.model_loader:register_model_loader", "load_format"),
        Abstract(
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader",
            "download_model load_weights",
        ),
        Overridden(
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader.download_model",
            "model_config",
        ),
        Overridden(
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
            "model, model_config",
        ),
    ),
    "self_check/engines.py": (
        Exists("vllm:LLM"),
        Called("vllm:LLM.generate", "prompts, parameters, use_tqdm=", "list[RequestOutput]"),
        Called("vllm:SamplingParams", "temperature=, max_tokens=, logprobs=, extra_args="),
        Exists("vllm.platforms:current_platform"),
        Called("vllm.platforms.cuda:NvmlCudaPlatform.get_device_capability", ""),
        Called("vllm.platforms.cuda:NvmlCudaPlatform.has_device_capability", "capability"),
        Called(
            "vllm.v1.attention.backends.fa_utils:is_flash_attn_varlen_func_available", "", "bool"
        ),
        Exists(f"{BACKENDS}:AttentionBackendEnum"),
        Has(f"{BACKENDS}:AttentionBackendEnum", "get_class FLASH_ATTN TRITON_ATTN"),
        *(
            row
            for module, prefix in ((FLASH_ATTN, "FlashAttention"), (TRITON_ATTN, "TritonAttention"))
            for row in (
                Called(f"{module}:{prefix}Backend.supports_compute_capability", "capability"),
                Has(f"{module}:{prefix}Metadata", "query_start_loc seq_lens block_table"),
                Has(f"{module}:{prefix}Impl", "scale"),
            )
        ),
    ),
}
