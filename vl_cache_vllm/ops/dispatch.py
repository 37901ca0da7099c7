# SPDX-License-Identifier: Apache-2.0
"""Choose the implementation of an operation: torch, C++ (``csrc/``) or Triton (``kernels/``).

The torch function of an operation is its specification. The other implementations have the same
name and take the same arguments. C++ is called from `native`; the Triton launcher is in the file of
``kernels/`` that has the name of the operation's file.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch

from vl_cache_vllm.ops import native

P = ParamSpec("P")
R = TypeVar("R")
Implementation = Literal["torch", "cpp", "triton"]

_forced: Implementation | None = None


def implementation_for(device: torch.device) -> Implementation:
    """The implementation for tensors on ``device``."""
    if _forced is not None:
        return _forced
    if device.type == "cuda":
        return "triton"
    return "cpp" if device.type == "cpu" and native.is_built() else "torch"


@contextlib.contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Use one implementation for all tensors; for tests and benchmarks.

    Triton accepts CPU tensors only in its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        RuntimeError: if C++ is requested but has not been built.
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
    """Decorator: make the torch function of an operation dispatch to all implementations.

    The device is that of the first argument: a tensor, a `PagePool`, or a sequence of what has one.
    """

    @functools.wraps(reference)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else next(iter(kwargs.values()))
        device = (first[0] if isinstance(first, Sequence) else first).device
        implementation = implementation_for(device)
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
