# SPDX-License-Identifier: Apache-2.0
"""Every place where we replace or extend something of vLLM's, and why: one table.

With ``--kv-compress none`` only the first four are in place, and they only add flags, look at one
key of ``additional_config`` and refuse requests that ask for eviction.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vl_cache_vllm.worker.build import EvictedGroup
    from vl_cache_vllm.worker.evictor import Evictor

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
        "validates, refuses what is unsupported, chooses our worker and scheduler classes",
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "wrap",
        "processes that create an engine's config; acts on requests with kv_budget or "
        "kv_policy_options",
        "checks a request's own settings where an error is still an HTTP 400; custom logits "
        "processors could check too, but make V1 copy every sampled token to the host",
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
        "shows the requests to our block manager, trims prefix-cache hits",
    ),
    Hook(
        "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec",
        "extension point",
        "engines with eviction",
        "our block manager and wider block-table rows",
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
)

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vl_cache_vllm.worker.cpu_worker.EvictionCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vl_cache_vllm.worker.gpu_worker.EvictionGPUWorker",
}
_CPU_BACKENDS = {"CPU_ATTN": "vl_cache_vllm.attention.cpu.EvictionCPUAttentionBackend"}
GPU_BACKENDS = {
    "FLASH_ATTN": "vl_cache_vllm.attention.flash.EvictionFlashAttentionBackend",
    "TRITON_ATTN": "vl_cache_vllm.attention.triton.EvictionTritonAttentionBackend",
}
_SCHEDULER = "vl_cache_vllm.core.scheduler.EvictionScheduler"
_ASYNC_SCHEDULER = "vl_cache_vllm.core.scheduler.AsyncEvictionScheduler"


def install() -> None:
    """Add the flags and the start-up check to vLLM's `EngineArgs`, once per process.

    A vLLM that is not supported and has no place for them is left alone.
    """
    from vl_cache_vllm.support import unsupported_version

    try:
        _wrap_engine_args()
    except Exception:  # a foreign vLLM may raise anything, and must start without us
        reason = unsupported_version()
        if reason is None:
            raise
        _tell(f"KV compression is not available, nor are its flags, with {reason}")


def _wrap_engine_args() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vl_cache_vllm import cli

    if getattr(EngineArgs, "_vl_cache_installed", False):
        return
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__  # type: ignore[attr-defined]
    create_engine_config = EngineArgs.create_engine_config

    def add_cli_args_with_ours(*args: Any, **kwargs: Any) -> Any:
        return cli.add_cli_args(add_cli_args(*args, **kwargs))

    def from_cli_args_with_ours(
        cls: type[EngineArgs], args: Any, *others: Any, **kwargs: Any
    ) -> EngineArgs:
        cli.move_flags_to_additional_config(args)
        return from_cli_args(cls, args, *others, **kwargs)

    def create_engine_config_with_ours(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if not _supports_version(self):
            return create_engine_config(self, *args, **kwargs)
        vllm_config = create_engine_config(self, *args, **kwargs)
        enable(vllm_config)
        _check_requests()
        return vllm_config

    EngineArgs.add_cli_args = staticmethod(add_cli_args_with_ours)  # type: ignore[method-assign]
    EngineArgs.from_cli_args = classmethod(from_cli_args_with_ours)  # type: ignore[assignment]
    EngineArgs.create_engine_config = create_engine_config_with_ours  # type: ignore[method-assign]
    EngineArgs._vl_cache_installed = True  # type: ignore[attr-defined]


def _supports_version(settings: Any) -> bool:
    """Whether this vLLM is one of ours; if not, the user is told once.

    Args:
        settings: with vLLM's ``additional_config``.

    Raises:
        ValueError: if it is not and eviction is asked for.
    """
    from vl_cache_vllm.config import get_kv_compress_config
    from vl_cache_vllm.support import unsupported_version

    reason = unsupported_version()
    if reason is None:
        return True
    config = get_kv_compress_config(settings) if hasattr(settings, "additional_config") else None
    if config is not None:
        raise ValueError(f"--kv-compress {config.policy.name} cannot be used with {reason}")
    _tell(f"KV compression is not available with {reason}")
    return False


@functools.cache
def _tell(message: str) -> None:
    """Warn once, in the process that the user started."""
    if multiprocessing.parent_process() is None:
        logging.getLogger("vllm.vl_cache").warning(message)


def _check_requests() -> None:
    """Let the front end refuse a request whose own settings are wrong, once per process."""
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vl_cache_vllm.config import REQUEST_BUDGET, REQUEST_OPTIONS, get_kv_compress_config

    if getattr(InputProcessor, "_vl_cache_installed", False):
        return
    InputProcessor._vl_cache_installed = True  # type: ignore[attr-defined]
    process_inputs = InputProcessor.process_inputs

    def process_inputs_with_ours(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        extra = getattr(params, "extra_args", None) or {}
        if given := [key for key in (REQUEST_BUDGET, REQUEST_OPTIONS) if key in extra]:
            config = get_kv_compress_config(self.vllm_config)
            try:
                if config is None:
                    raise ValueError(
                        f"{' and '.join(given)} cannot be honoured: this server was started "
                        "without --kv-compress"
                    )
                config.for_request(params)
            except ValueError as error:
                _forget_images(self, prompt)
                raise VLLMValidationError(str(error), parameter=given[0]) from error
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    InputProcessor.process_inputs = process_inputs_with_ours  # type: ignore[method-assign]


def _add_metrics() -> None:
    """Let front ends of engines with eviction export its metrics, once per process.

    Engine cores send counts only if the front end that started them takes them out: vLLM's own
    loggers would stumble over them where a finished config was handed to another process.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vl_cache_vllm.config import get_kv_compress_config
    from vl_cache_vllm.core.stats import SEND

    os.environ[SEND] = "1"

    if getattr(StatLoggerManager, "_vl_cache_installed", False):
        return
    StatLoggerManager._vl_cache_installed = True  # type: ignore[attr-defined]
    init = StatLoggerManager.__init__

    def init_with_ours(
        self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any
    ) -> None:
        init(self, vllm_config, *args, **kwargs)
        if get_kv_compress_config(vllm_config) is not None:
            from vl_cache_vllm.metrics import KVCompressStatLogger

            log_lines = kwargs.get("enable_default_loggers", True)
            log_lines = log_lines and kwargs.get("client_count", 1) == 1
            ours = KVCompressStatLogger(vllm_config, self.engine_indexes, log_lines=log_lines)
            self.stat_loggers.insert(0, ours)

    StatLoggerManager.__init__ = init_with_ours  # type: ignore[method-assign]


def _forget_images(processor: Any, prompt: Any) -> None:
    """Of a refused request: the renderer believes that the engine received them.

    As vLLM itself does when the engine reports one missing; the next request sends them.
    """
    cache = processor.renderer.mm_processor_cache
    hashes = prompt.get("mm_hashes") if isinstance(prompt, dict) else None
    if cache is not None and hashes:
        for mm_hash in (h for per_modality in hashes.values() for h in per_modality):
            cache.invalidate(mm_hash)


def enable(vllm_config: VllmConfig) -> None:
    """Switch eviction on in a finished config if it asks for it.

    Raises:
        ValueError: bad settings, or one message with every reason why this engine cannot evict.
    """
    from vllm.logger import init_logger

    from vl_cache_vllm.config import get_kv_compress_config
    from vl_cache_vllm.support import unsupported_reasons

    config = get_kv_compress_config(vllm_config)
    if config is None or not _supports_version(vllm_config):
        return
    reasons = unsupported_reasons(vllm_config, supported_workers=tuple(_WORKERS))
    if reasons:
        raise ValueError(
            f"--kv-compress {config.policy.name} cannot be used with this configuration:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    vllm_config.parallel_config.worker_cls = _WORKERS[vllm_config.parallel_config.worker_cls]
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        _ASYNC_SCHEDULER if scheduler_config.async_scheduling else _SCHEDULER
    )
    _add_metrics()
    init_logger("vllm.vl_cache").info("KV compression: %s", config)


@contextlib.contextmanager
def backends() -> Iterator[None]:
    """Put our attention backends in vLLM's place while a model is built.

    Layers keep the class they were built with; other engines of the process never see ours.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    with contextlib.ExitStack() as undo:
        undo.callback(selector._cached_get_attn_backend.cache_clear)
        is_cpu = current_platform.is_cpu()
        for name, path in (_CPU_BACKENDS if is_cpu else GPU_BACKENDS).items():
            backend = AttentionBackendEnum[name]
            if backend.is_overridden():
                undo.callback(register_backend, backend, backend.get_path())
            undo.callback(backend.clear_override)
            register_backend(backend, path)
        if not is_cpu:
            undo.enter_context(_prefer_ours())
        selector._cached_get_attn_backend.cache_clear()
        yield


@contextlib.contextmanager
def _prefer_ours() -> Iterator[None]:
    """Let vLLM choose among the GPU backends that we have."""
    from vllm.platforms import cuda

    platform: Any = cuda
    priorities = platform._get_backend_priorities

    def ours(*args: Any, **kwargs: Any) -> list[Any]:
        return [backend for backend in priorities(*args, **kwargs) if backend.name in GPU_BACKENDS]

    platform._get_backend_priorities = ours
    try:
        yield
    finally:
        platform._get_backend_priorities = priorities


@contextlib.contextmanager
def profile_run(runner: Any, ours: Callable[..., None]) -> Iterator[None]:
    """Let a model runner's profiling of memory be ``ours(vllms, ...)``."""
    runner.profile_run = functools.partial(ours, runner.profile_run)
    try:
        yield
    finally:
        del runner.profile_run


def attach_v1(runner: Any, worker: Evictor, group: EvictedGroup) -> None:
    """Hook eviction into a V1 model runner."""
    from vl_cache_vllm.worker.v1 import V1Adapter

    adapter = V1Adapter(runner, worker, group)
    runner._build_attention_metadata = adapter.build_attention_metadata


def attach_v2(runner: Any, worker: Evictor, group: EvictedGroup) -> None:
    """Hook eviction into a V2 model runner's model state."""
    from vl_cache_vllm.worker.v2 import V2Adapter

    adapter = V2Adapter(runner, worker, group)
    state = runner.model_state
    state.add_request = adapter.add_request
    state.remove_request = adapter.remove_request
    state.prepare_attn = adapter.prepare_attn
    runner.gather_batch_req_state = adapter.gather_batch_req_state
