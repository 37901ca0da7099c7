# SPDX-License-Identifier: Apache-2.0
"""Installs the front-end and start-up hooks of `vl_cache_vllm.hooks` into vLLM's classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vl_cache_vllm.hooks import ASYNC_SCHEDULER, SCHEDULER, WORKERS
from vl_cache_vllm.warn import warn_once

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.input_processor import InputProcessor


def install() -> None:
    """Add the flags and the start-up check to vLLM's `EngineArgs`, once per process.

    A vLLM that is not supported and lacks what we extend serves as if the plugin were absent.
    """
    from vl_cache_vllm.support import unsupported_version

    try:
        _wrap_engine_args()
    except Exception:  # a foreign vLLM may raise anything, and must start without us
        reason = unsupported_version()
        if reason is None:
            raise
        warn_once(f"KV compression is not available, nor are its flags, with {reason}")


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
    warn_once(f"KV compression is not available with {reason}")
    return False


def _check_requests() -> None:
    """Let the front end refuse a request whose own settings are wrong, once per process.

    The front end's cache of images mirrors the engine's, entry by entry and in the same order.
    Processing a prompt changes it, so a request is refused before that wherever vLLM allows it.
    """
    from vllm.entrypoints.common.offline import OfflineInferenceMixin
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    from vl_cache_vllm.config import get_kv_compress_config

    if getattr(InputProcessor, "_vl_cache_installed", False):
        return
    InputProcessor._vl_cache_installed = True  # type: ignore[attr-defined]
    check_model = GenerateBaseServing._check_model
    add_requests = OfflineInferenceMixin._render_and_add_requests
    process_inputs = InputProcessor.process_inputs

    async def check_model_with_ours(self: GenerateBaseServing, request: Any) -> Any:
        error = await check_model(self, request)
        if error is None:
            sampling_params = getattr(request, "sampling_params", None)  # /inference/v1/generate
            extra = (
                getattr(request, "vllm_xargs", None)
                if sampling_params is None
                else sampling_params.extra_args
            )
            _check_settings(self.input_processor.vllm_config, extra)
        return error

    def add_requests_with_ours(
        self: OfflineInferenceMixin, prompts: Any, params: Sequence[Any], **kwargs: Any
    ) -> list[str]:
        for each in params:
            _check_settings(self.llm_engine.vllm_config, getattr(each, "extra_args", None))
        return add_requests(self, prompts, params, **kwargs)

    def process_inputs_with_ours(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            _check_settings(self.vllm_config, getattr(params, "extra_args", None))
        except VLLMValidationError:
            _forget_new_images(self, prompt)
            raise
        try:
            return process_inputs(self, request_id, prompt, params, *args, **kwargs)
        except Exception:
            if get_kv_compress_config(self.vllm_config) is not None:
                _forget_new_images(self, prompt)
            raise

    serving: Any = GenerateBaseServing  # inherits the method
    serving._check_model = check_model_with_ours
    OfflineInferenceMixin._render_and_add_requests = (  # type: ignore[method-assign]
        add_requests_with_ours
    )
    InputProcessor.process_inputs = process_inputs_with_ours  # type: ignore[method-assign]


def _check_settings(vllm_config: VllmConfig, extra: Any) -> None:
    """Refuse a request whose own settings are wrong.

    Args:
        extra: ``SamplingParams.extra_args``, or what a client sent as ``vllm_xargs``.

    Raises:
        VLLMValidationError: over HTTP status 400, with what is wrong.
    """
    from vllm.exceptions import VLLMValidationError

    from vl_cache_vllm.config import REQUEST_SETTINGS, get_kv_compress_config

    if not isinstance(extra, Mapping):  # /v1/chat/completions/batch checks the type later
        return
    if given := [key for key in REQUEST_SETTINGS if key in extra]:
        config = get_kv_compress_config(vllm_config)
        try:
            if config is None:
                raise ValueError(
                    f"{' and '.join(given)} cannot be honoured: this server was started "
                    "without --kv-compress"
                )
            config.with_request_settings(extra)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=given[0]) from error


def _forget_new_images(processor: InputProcessor, prompt: Any) -> None:
    """Take those images of a refused prompt out of the front end's cache that it put there.

    The engine did not get them, so the next request must send them again. Images that were in the
    cache before carry no data, and the engine has them. What the new ones pushed out is also the
    oldest in the engine's cache and leaves that first, so the front end never misses it there.
    """
    from vllm.inputs import split_enc_dec_input

    cache = processor.renderer.mm_processor_cache
    # Only the renderer uses the cache, and notes when; /inference/v1/generate can go without it.
    if cache is None or not isinstance(prompt, dict) or "arrival_time" not in prompt:
        return
    rendered: Any = prompt
    _, decoder_prompt = split_enc_dec_input(rendered)
    if decoder_prompt["type"] != "multimodal":
        return
    for modality, items in decoder_prompt["mm_kwargs"].items():
        for item, mm_hash in zip(items, decoder_prompt["mm_hashes"][modality], strict=True):
            if item is not None:
                cache.invalidate(mm_hash)


def _add_metrics() -> None:
    """Let front ends of engines with eviction export its metrics, once per process.

    An engine core sends statistics only if its front end removes them before vLLM's own loggers
    read them, which would take them for a KV connector's.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    from vl_cache_vllm.config import get_kv_compress_config
    from vl_cache_vllm.messages import SEND_STATS

    os.environ[SEND_STATS] = "1"

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
    reasons = unsupported_reasons(vllm_config, supported_workers=tuple(WORKERS))
    if reasons:
        raise ValueError(
            f"--kv-compress {config.policy.name} cannot be used with this configuration:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    vllm_config.parallel_config.worker_cls = WORKERS[vllm_config.parallel_config.worker_cls]
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER if scheduler_config.async_scheduling else SCHEDULER
    )
    _add_metrics()
    init_logger("vllm.vl_cache").info("KV compression: %s", config)
