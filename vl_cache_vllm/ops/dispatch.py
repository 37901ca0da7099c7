# SPDX-License-Identifier: Apache-2.0
"""Who serves an operation: torch, the C++ of ``csrc/`` or the Triton of ``kernels/``.

The torch function of an operation is its specification. The others take the same arguments and
have its name: C++ in `native`, Triton in the file of ``kernels/`` that is named as its own.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from vl_cache_vllm.ops import native

P = ParamSpec("P")
R = TypeVar("R")
Implementation = Literal["torch", "cpp", "triton"]

_forced: Implementation | None = None


def implementation_for(device: torch.device) -> Implementation:
    """What serves tensors of a device."""
    if _forced is not None:
        return _forced
    if device.type == "cuda":
        return "triton"
    return "cpp" if device.type == "cpu" and native.is_built() else "torch"


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Let one implementation serve all tensors; for tests and benchmarks.

    Triton serves tensors of the CPU only under its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        RuntimeError: if C++ shall serve but has not been built.
    """
    global _forced
    if implementation == "cpp" and not native.is_built():
        raise RuntimeError("the C++ operators have not been built")
    before, _forced = _forced, implementation
    try:
        yield
    finally:
        _forced = before


def operation(reference: Callable[P, R]) -> Callable[P, R]:
    """An operation by its torch function, whose first argument tells the device."""

    @functools.wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(kwargs.values()))
        implementation = implementation_for(first.device)
        return _find(reference, implementation)(*args, **kwargs)

    return run


@functools.cache
def _find(reference: Callable[P, R], implementation: Implementation) -> Callable[P, R]:
    name, file = reference.__name__, reference.__module__.rpartition(".")[2]
    if implementation == "triton":
        return getattr(importlib.import_module(f"vl_cache_vllm.kernels.{file}"), name)
    if implementation == "cpp" and name in native.OPERATIONS:
        return getattr(native, name)
    return reference
