# SPDX-License-Identifier: Apache-2.0
"""What eviction cannot do yet, found in the finished config, before anything is loaded.

What only the model's layers or the allocated cache can show (attention sinks, ALiBi, cache groups,
page layout) is refused by the worker with the same kind of message.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from vl_cache_vllm.hooks import GPU_BACKENDS, SUPPORTED_VLLM
from vl_cache_vllm.self_check.record import missing_check

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

TRY_GPU = "VL_CACHE_VLLM_TRY_GPU"
"""Environment variable that lets an engine start on a GPU without a check; for developers."""

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
_OTHER_ATTENTION = {"chunked_attention"}


def unsupported_version() -> str | None:
    """Why this vLLM is not supported; None if it is."""
    import vllm

    low, high = SUPPORTED_VLLM
    try:
        supported = low <= Version(Version(vllm.__version__).base_version) < high
    except InvalidVersion:  # vLLM calls itself "dev" where its build wrote no version
        supported = False
    if supported:
        return None
    return f"vLLM {vllm.__version__}: this version of vl-cache-vllm supports >={low},<{high}"


def unsupported_reasons(vllm_config: VllmConfig, supported_workers: tuple[str, ...]) -> list[str]:
    """All reasons why this engine cannot evict, with what to change where that helps; or none."""
    from vllm import envs
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    reasons = []

    def refuse(condition: object, reason: str) -> None:
        if condition:
            reasons.append(reason)

    refuse(
        parallel.worker_cls not in supported_workers,
        f"worker {parallel.worker_cls}: supported are vLLM's CPU and CUDA workers; a custom "
        "--worker-cls cannot be combined with eviction",
    )
    refuse(
        vllm_config.scheduler_config.scheduler_cls is not None,
        f"scheduler {vllm_config.scheduler_config.scheduler_cls}: remove --scheduler-cls, "
        "eviction brings its own subclass of vLLM's scheduler",
    )
    for phase in ("decode", "prefill"):
        size = getattr(parallel, f"{phase}_context_parallel_size")
        refuse(size > 1, f"context parallelism: remove --{phase}-context-parallel-size {size}")
    refuse(parallel.enable_dbo, "micro-batching: remove --enable-dbo")
    refuse(
        parallel.ubatch_size > 1 and not parallel.enable_dbo,
        f"micro-batching: remove --ubatch-size {parallel.ubatch_size}",
    )
    reasons += _connector_reasons(vllm_config)
    reasons += _draft_reasons(vllm_config)
    speculative = vllm_config.speculative_config
    refuse(
        speculative is not None and vllm_config.model_config.is_hybrid,
        "speculative decoding with layers of linear attention or state spaces: remove "
        "--speculative-config",
    )
    refuse(
        speculative is not None and vllm_config.model_config.use_mla,
        "speculative decoding with multi-head latent attention: remove --speculative-config",
    )
    refuse(
        vllm_config.model_config.use_mla and is_quantized_kv_cache(cache.cache_dtype),
        f"KV cache type {cache.cache_dtype} with multi-head latent attention: use "
        "--kv-cache-dtype auto",
    )
    refuse(
        vllm_config.model_config.use_mla and _other_latent_kernels(vllm_config),
        "vLLM's AMX kernels of multi-head latent attention: use --attention-backend CPU_MLA",
    )
    refuse(
        is_quantized_kv_cache(cache.cache_dtype) and cache.cache_dtype not in _FP8,
        f"KV cache type {cache.cache_dtype}: use --kv-cache-dtype auto, {', '.join(_FP8)}",
    )
    refuse(
        cache.kv_sharing_fast_prefill,
        "layers that skip the prefill, whose attention is not observed: remove "
        "--kv-sharing-fast-prefill",
    )
    refuse(
        vllm_config.attention_config.hisparse_config is not None,
        "HiSparse: remove the attention config's hisparse_config",
    )
    refuse(
        envs.VLLM_USE_RUST_FRONTEND,
        "vLLM's Rust front end, which knows no plugins: unset VLLM_USE_RUST_FRONTEND",
    )
    refuse(vllm_config.is_mm_encoder_only, "encoder-only serving: remove --mm-encoder-only")
    if parallel.worker_cls.endswith("gpu_worker.Worker"):
        reasons += _gpu_reasons(vllm_config)
    hybrid_cache = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return reasons + _model_reasons(vllm_config.model_config, hybrid_cache)


def _connector_reasons(vllm_config: VllmConfig) -> list[str]:
    from vl_cache_vllm.core.connectors import (
        BOUNDS_HITS,
        LMCACHE,
        RAN_WITH_MLA,
        SUPPORTED,
        configured_connectors,
        lmcache_version,
    )

    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return []
    offloads = vllm_config.cache_config.kv_offloading_size is not None
    flag = "--kv-offloading-size" if offloads else "--kv-transfer-config"
    parts = configured_connectors(transfer)
    names = {str(part.get("kv_connector")) for part in parts}
    options = {
        key
        for part in parts
        for key, value in (part.get("kv_connector_extra_config") or {}).items()
        if value
    }
    unknown = sorted(names - SUPPORTED.keys())
    model = vllm_config.model_config
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    checks = (
        (
            bool(unknown),
            f"KV connector {', '.join(unknown)}: use {', '.join(sorted(SUPPORTED))} or a "
            f"MultiConnector of them, or remove {flag}",
        ),
        (
            any(part.get("kv_connector_module_path") for part in parts),
            "KV connectors of your own: remove kv_connector_module_path from --kv-transfer-config",
        ),
        (
            "LMCacheMPConnector" in names and transfer.kv_connector == "MultiConnector",
            "LMCacheMPConnector in a MultiConnector: use it alone",
        ),
        (
            "LMCacheMPConnector" in names and lmcache_version() != LMCACHE,
            f"LMCache {lmcache_version() or '(not installed)'}: install lmcache {LMCACHE}, which "
            "eviction was tested with",
        ),
        *(
            (
                option in options,
                f"LMCache's {option}, which eviction was not tested with: remove it from "
                "--kv-transfer-config",
            )
            for option in (
                "lmcache.mp.lazy_offload",
                "lmcache.mp.save_decode_cache",
                "lmcache.mp.transfer_intermediate_tensors",
            )
        ),
        (
            "bidirectional_kv_xfer" in options,
            "KV transfer from decoding servers, whose caches are evicted: remove "
            "bidirectional_kv_xfer from --kv-transfer-config",
        ),
        (
            transfer.kv_connector != BOUNDS_HITS
            and (model.is_hybrid or {"full_attention", "sliding_attention"} <= layer_types),
            f"{transfer.kv_connector} with a model whose layers do not all have full attention: "
            f"use {BOUNDS_HITS} (--kv-offloading-backend native, without "
            f"VLLM_USE_SIMPLE_KV_OFFLOAD), or remove {flag}",
        ),
        (
            model.use_mla and transfer.kv_connector not in RAN_WITH_MLA,
            f"{transfer.kv_connector} with multi-head latent attention: use "
            f"{' or '.join(sorted(RAN_WITH_MLA))}, or remove {flag}",
        ),
        (
            "ExampleConnector" in names and vllm_config.scheduler_config.enable_chunked_prefill,
            "ExampleConnector with prefills of several steps, which it stores and loads in part: "
            "add --no-enable-chunked-prefill",
        ),
    )
    return [reason for condition, reason in checks if condition]


def _draft_reasons(vllm_config: VllmConfig) -> list[str]:
    """Why drafts of a model cannot be used; n-grams need no model."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if speculative is None or speculative.method == "ngram":
        return []
    if speculative.method not in ("eagle3", "mtp"):
        return [
            f"drafts of the kind {speculative.method}: use eagle3, mtp or ngram in "
            "--speculative-config, or remove it"
        ]
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    parallel = vllm_config.parallel_config
    own = speculative.draft_tensor_parallel_size or parallel.tensor_parallel_size
    checks = (
        (
            not parallel.worker_cls.endswith("CPUWorker"),
            "drafts of a model, on a GPU: use ngram in --speculative-config, or remove it",
        ),
        (
            {"full_attention", "sliding_attention"} <= layer_types,
            "drafts of a model whose layers do not all have full attention: remove "
            "--speculative-config",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "drafts of a model on several pipeline stages: remove --speculative-config",
        ),
        (
            own != parallel.tensor_parallel_size,
            f"a draft model on {own} of {parallel.tensor_parallel_size} workers: remove "
            "draft_tensor_parallel_size from --speculative-config",
        ),
        (
            speculative.use_multi_module_mtp(),
            "several MTP modules: remove --speculative-config",
        ),
        (
            speculative.parallel_drafting,
            "drafts of several tokens in one pass: remove parallel_drafting from "
            "--speculative-config",
        ),
        (
            speculative.disable_padded_drafter_batch,
            "draft batches without padding: remove disable_padded_drafter_batch from "
            "--speculative-config",
        ),
    )
    return [reason for condition, reason in checks if condition]


def _other_latent_kernels(vllm_config: VllmConfig) -> bool:
    """Whether vLLM's CPU platform chooses its AMX kernels for latent attention."""
    import torch
    from vllm.platforms import current_platform

    backend = vllm_config.attention_config.backend
    is_chosen = backend is not None and backend.name == "CPU_MLA"
    return current_platform.is_cpu() and torch.cpu._is_amx_tile_supported() and not is_chosen


def _gpu_reasons(vllm_config: VllmConfig) -> list[str]:
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    attention = vllm_config.attention_config
    backend = attention.backend_per_kind.get("full_attention") or attention.backend
    cache_dtype = vllm_config.cache_config.cache_dtype
    is_nvidia = current_platform.is_cuda()
    unchecked = missing_check() if is_nvidia and os.environ.get(TRY_GPU) != "1" else None
    checks = (
        (unchecked is not None, unchecked or ""),
        (not is_nvidia, "GPUs that are not NVIDIA's"),
        (
            not vllm_config.use_v2_model_runner,
            "the V1 model runner on a GPU: unset VLLM_USE_V2_MODEL_RUNNER",
        ),
        (
            backend is not None and backend.name not in GPU_BACKENDS,
            f"attention backend {backend and backend.name}: use --attention-backend "
            + " or ".join(GPU_BACKENDS),
        ),
        (
            is_quantized_kv_cache(cache_dtype),
            f"KV cache type {cache_dtype} on a GPU: use --kv-cache-dtype auto",
        ),
        (
            vllm_config.model_config.is_mm_prefix_lm,
            "models that attend in both directions inside images, on a GPU",
        ),
        (
            vllm_config.model_config.use_mla,
            "models with multi-head latent attention (MLA), on a GPU",
        ),
        (
            vllm_config.model_config.is_hybrid,
            "models with state-space or linear-attention layers, on a GPU",
        ),
    )
    return [reason for condition, reason in checks if condition]


def _model_reasons(model: ModelConfig, hybrid_cache: bool) -> list[str]:
    layer_types = set(getattr(model.hf_text_config, "layer_types", None) or ())
    other = sorted(layer_types & _OTHER_ATTENTION)
    full_beside_window = {"full_attention", "sliding_attention"} <= layer_types
    window = None if full_beside_window else model.get_sliding_window()
    checks = (
        (
            model.runner_type != "generate",
            f"{model.runner_type} models: there is no decoding to save cache for",
        ),
        (not model.supports_multimodal_inputs, _text_only_reason(model)),
        (model.is_encoder_decoder, "encoder-decoder models (cross attention)"),
        (model.is_attention_free, "models without attention layers"),
        (bool(other), f"layers that are not full attention: {', '.join(other)}"),
        (
            window is not None,
            f"no layers of full attention, but a sliding window of {window} tokens "
            "(--disable-sliding-window may help)",
        ),
        (
            full_beside_window and not hybrid_cache,
            "sliding-window layers beside those of full attention, in one cache: remove "
            "--disable-hybrid-kv-cache-manager",
        ),
        (model.uses_alibi, "ALiBi position biases"),
        (
            model.rswa_window is not None,
            "generated tokens that attend to the prompt and to a window (R-SWA)",
        ),
    )
    return [reason for condition, reason in checks if condition]


def _text_only_reason(model: ModelConfig) -> str:
    """Why a server that vLLM takes for text-only takes no images; meaningless for others."""
    multimodal = model.multimodal_config
    if multimodal is None:
        return (
            "a text-only model: only vision-language models are supported; --kv-compress-text "
            "evicts text-only prompts of such a model"
        )
    if multimodal.language_model_only:
        return "text-only serving of a vision-language model: remove --language-model-only"
    limits = {name: multimodal.get_limit_per_prompt(name) for name in multimodal.limit_per_prompt}
    if limits:
        return (
            "text-only serving of a vision-language model: allow at least one image or video in "
            f"--limit-mm-per-prompt, now {json.dumps(limits)}"
        )
    return "text-only serving of a vision-language model that vLLM has no image processor for"
