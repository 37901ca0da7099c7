# SPDX-License-Identifier: Apache-2.0
"""Puts our attention backends in vLLM's place while a worker builds its model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vl_cache_vllm.hooks import CPU_BACKENDS, GPU_BACKENDS


@contextlib.contextmanager
def eviction_backends() -> Iterator[None]:
    """Register our attention backends in place of vLLM's while a model is built.

    Layers keep the class they were built with, so other engines of the process never get ours.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(selector._cached_get_attn_backend.cache_clear)
        is_cpu = current_platform.is_cpu()
        for name, path in (CPU_BACKENDS if is_cpu else GPU_BACKENDS).items():
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
    """Restrict vLLM's automatic choice to the GPU backends that we have."""
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
