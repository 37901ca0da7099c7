# SPDX-License-Identifier: Apache-2.0
"""Transfers between host and device that do not synchronise, and timing of device work."""

import platform
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch

PIN_MEMORY = "microsoft" not in " ".join(platform.uname()).lower()
"""Whether copies go through pinned memory: not on WSL, as in vLLM."""


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy integers of the host to a device, int64; asynchronous on a GPU."""
    numbers = torch.from_numpy(np.array(values, np.int64))
    if device.type == "cpu":
        return numbers
    return pinned(numbers).to(device, non_blocking=True)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, or the tensor itself where vLLM does not pin memory (WSL)."""
    return tensor.pin_memory() if PIN_MEMORY else tensor


class Fetched:
    """Asynchronous copy of a tensor to the host; `wait` blocks until it has completed."""

    def __init__(self, values: torch.Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if values.device.type == "cpu":
            self._values = values.clone()
            return
        self._values = torch.empty_like(values, device="cpu", pin_memory=PIN_MEMORY)
        self._values.copy_(values, non_blocking=True)
        self._ready = torch.cuda.Event()
        self._ready.record()

    def wait(self) -> torch.Tensor:
        """The values on the CPU; blocks until the device has copied them."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._values


class Stopwatch:
    """Total time that a device spends in blocks of code: ``with stopwatch: ...``.

    On a GPU it is the time between two events of the current stream, including the time in which
    the device waits for the host inside a block.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._began = 0.0
        self._events: list[torch.cuda.Event] = []  # begin, end, begin, end, ...
        self._shared: list[tuple[Stopwatch, float]] = []

    def __enter__(self) -> None:
        if self._is_cuda:
            self._record()
        else:
            self._began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_cuda:
            self._record()
        else:
            self._seconds += time.perf_counter() - self._began

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def share(self, other: "Stopwatch", fraction: float) -> None:
        """Count a fraction of the time of another one as well, also of its later blocks."""
        self._shared.append((other, fraction))

    def seconds(self) -> float:
        """Seconds in all blocks so far; synchronises with the device."""
        if self._events:
            self._events[-1].synchronize()
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        own = self._seconds + sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return own + sum(fraction * other.seconds() for other, fraction in self._shared)
