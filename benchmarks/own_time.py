# SPDX-License-Identifier: Apache-2.0
"""How long an engine in this process spends in our code, in its worker and in its scheduler.

Methods of ours start a clock, and vLLM's that they call on in turn (those they override) stop it.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

WORKER, SCHEDULER, HOST = "worker", "scheduler", "vllm"


@contextlib.contextmanager
def wrapped(targets: list[tuple[type, str]], wrap: Callable[[Any], Any]) -> Iterator[None]:
    """Methods replaced by what ``wrap`` makes of them."""
    with contextlib.ExitStack() as stack:
        for cls, name in targets:
            method = getattr(cls, name)
            stack.enter_context(mock.patch.object(cls, name, wrap(method)))
        yield


class Clock:
    """Seconds by whose code runs: that of the innermost method that was wrapped."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((WORKER, SCHEDULER, HOST), 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def reset(self) -> None:
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    @property
    def own(self) -> float:
        return self.seconds[WORKER] + self.seconds[SCHEDULER]

    def _turn(self) -> None:
        """Write down what has run until now."""
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def of(self, whose: str) -> Callable[[Any], Any]:
        """A wrapper of methods that are theirs."""

        def wrap(method: Any) -> Any:
            @functools.wraps(method)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                self._turn()
                self._running.append(whose)
                try:
                    return method(*args, **kwargs)
                finally:
                    self._turn()
                    self._running.pop()

            return wrapper

        return wrap


def overrides(mixed: type, ours: type) -> Iterator[tuple[str, type]]:
    """Methods that ``ours`` overrides in ``mixed``, each with the class whose method it hides."""
    classes = mixed.__mro__
    hidden = classes[classes.index(ours) + 1 :]
    for name, method in vars(ours).items():
        host = next((cls for cls in hidden if name in vars(cls)), None)
        if callable(method) and not name.startswith("__") and host is not None:
            yield name, host


@contextlib.contextmanager
def own_time() -> Iterator[Clock]:
    """A clock that runs in the methods through which vLLM's worker and scheduler call on ours.

    Raises:
        NotImplementedError: on the V2 model runner, where other methods plan the step.
    """
    if torch.cuda.is_available() or os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise NotImplementedError("time in our code is taken on the V1 model runner only")
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
    host: list[tuple[type, str]] = []
    for mixed, ours in (
        (EvictionScheduler, EvictionSchedulerMixin),
        (EvictionBlockManager, EvictionBlockManager),
    ):
        for name, theirs in overrides(mixed, ours):
            scheduler.append((ours, name))
            host.append((theirs, name))

    clock = Clock()
    with (
        wrapped(worker, clock.of(WORKER)),
        wrapped(host, clock.of(HOST)),
        wrapped(scheduler, clock.of(SCHEDULER)),
    ):
        yield clock
