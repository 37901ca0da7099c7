# SPDX-License-Identifier: Apache-2.0
"""Installs the front-end and start-up hooks of `vl_cache_vllm.hooks` into vLLM's classes."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
from typing import TYPE_CHECKING, Any

from vl_cache_vllm.hooks import ASYNC_SCHEDULER, SCHEDULER, WORKERS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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
                config.for_request(extra)
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
    init_logger("vllm.vl_cache").info(
        "KV compression: %s", ", ".join(f"{k}={v}" for k, v in config.to_dict().items())
    )
