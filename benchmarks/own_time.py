# SPDX-License-Identifier: Apache-2.0
"""Time that an engine in this process spends in this package's code, in worker and scheduler.

A clock runs in the methods of this package. It stops while they call the vLLM methods that they
override.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

WORKER, SCHEDULER, VLLM = "worker", "scheduler", "vllm"


@contextlib.contextmanager
def wrapped(targets: list[tuple[type, str]], wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Replace methods by ``wrap(method)``, and restore them on exit."""
    with contextlib.ExitStack() as stack:
        for cls, name in targets:
            method = getattr(cls, name)
            stack.enter_context(mock.patch.object(cls, name, wrap(method)))
        yield


class Clock:
    """Seconds by category. Time counts for the category of the innermost wrapped method."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((WORKER, SCHEDULER, VLLM), 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    @property
    def own(self) -> float:
        """Seconds in this package's code since the last reset."""
        return self.seconds[WORKER] + self.seconds[SCHEDULER]

    def _switch(self) -> None:
        """Add the time since the last switch to the running category."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def of(self, category: str) -> Callable[[Any], Any]:
        """A wrapper for the methods of a category."""

        def wrap(method: Any) -> Any:
            @functools.wraps(method)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self._switch()
                self._running.append(category)
                try:
                    return method(*args, **kwargs)
                finally:
                    self._switch()
                    self._running.pop()

            return wrapper

        return wrap


def overrides(cls: type, mixin: type) -> Iterator[tuple[str, type]]:
    """Methods of ``mixin`` that override one of its successors in the MRO of ``cls``.

    Yields:
        The name of the method, and the class whose method it overrides.
    """
    successors = cls.__mro__[cls.__mro__.index(mixin) + 1 :]
    for name, method in vars(mixin).items():
        base = next((other for other in successors if name in vars(other)), None)
        if callable(method) and not name.startswith("__") and base is not None:
            yield name, base


@contextlib.contextmanager
def own_time() -> Iterator[Clock]:
    """A clock that runs in the methods through which vLLM's worker and scheduler call this package.

    Raises:
        NotImplementedError: for the V2 model runner, which plans steps in other methods.
    """
    if torch.cuda.is_available() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise NotImplementedError("own_time supports the V1 model runner only")
    from vl_cache_vllm.attention.per_layer import PerLayerAttentionMixin
    from vl_cache_vllm.core.block_manager import EvictionBlockManager
    from vl_cache_vllm.core.scheduler import EvictionScheduler, EvictionSchedulerMixin
    from vl_cache_vllm.worker.evictor import Evictor
    from vl_cache_vllm.worker.v1 import V1Adapter

    worker: list[tuple[type, str]] = [
        (V1Adapter, "_attach"),
        (Evictor, "layer_done"),
        (PerLayerAttentionMixin, "_layer_view"),
    ]
    scheduler: list[tuple[type, str]] = []
    vllm: list[tuple[type, str]] = []
    for cls, mixin in (
        (EvictionScheduler, EvictionSchedulerMixin),
        (EvictionBlockManager, EvictionBlockManager),
    ):
        for name, base in overrides(cls, mixin):
            scheduler.append((mixin, name))
            vllm.append((base, name))

    clock = Clock()
    with (
        wrapped(worker, clock.of(WORKER)),
        wrapped(vllm, clock.of(VLLM)),
        wrapped(scheduler, clock.of(SCHEDULER)),
    ):
        yield clock
