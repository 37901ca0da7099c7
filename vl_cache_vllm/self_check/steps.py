# SPDX-License-Identifier: Apache-2.0
"""Runs a function in a process of its own, with a time limit.

A kernel that hangs or faults takes its process with it: what it left of the device's context is
gone with the process, and the next step starts afresh. A process is forked unless this one has
initialised CUDA, so that the modules that are imported here need not be imported again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")

SECONDS_TO_END = 5
"""How long a process may take to end after it sent its result."""
SECONDS_TO_TELL = 2
"""How long a process at its time limit may take to tell where it is."""


class StepError(RuntimeError):
    """A step raised, crashed, or was stopped at its time limit."""


def run_step(function: Callable[..., T], *args: Any, seconds: float) -> T:
    """The result of ``function(*args)``, from another process.

    Args:
        function: of a module; its result can be pickled.
        args: can be pickled.
        seconds: time limit. At its end the process is killed with its children.

    Raises:
        StepError: with the traceback, the signal or the limit.
    """
    context: Any = multiprocessing.get_context("fork" if forks_can_use_cuda() else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="stack.") as stack:
        process = context.Process(target=_child, args=(theirs, stack.name, function, args))
        process.start()
        theirs.close()
        try:
            if not ours.poll(max(0.0, seconds)):
                where = _stack(process.pid, Path(stack.name))
                raise StepError(f"stopped after its time limit of {seconds:.0f} s in {where}")
            succeeded, result = ours.recv()
        except EOFError:
            process.join(SECONDS_TO_END)
            raise StepError(f"its process ended with {_ending(process.exitcode)}") from None
        finally:
            ours.close()
            _end(process)
    if not succeeded:
        raise StepError(result)
    return result


def forks_can_use_cuda() -> bool:
    """Whether nothing in this process has initialised CUDA, which forked processes could not use.

    CUDA opens a device file when it is initialised, and torch knows in a forked process whether it
    had called CUDA before. Reading names of GPUs through NVML does no harm.
    """
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("/dev/nvidia-uvm"):
                return False
    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(child, 0)[1] == 0


def _child(
    connection: Connection, stack: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setsid()
    with open(stack, "w") as file:
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        try:
            outcome: tuple[bool, Any] = True, function(*args)
        except BaseException as error:  # SystemExit too: engines raise it
            lines = traceback.format_exception(error)
            outcome = False, "".join(lines[-3:]).strip()
        connection.send(outcome)
        faulthandler.unregister(signal.SIGUSR1)
    connection.close()


def _stack(pid: int, file: Path) -> str:
    """Where a process is: its innermost Python frames, which it writes when it gets the signal."""
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + SECONDS_TO_TELL
    while not (lines := file.read_text().splitlines()[1:]) and time.monotonic() < deadline:
        time.sleep(0.05)
    frames = re.findall(r'File ".*?([^/"]*)", line (\d+) in (\w+)', "\n".join(lines))
    return " < ".join(f"{name} ({file}:{line})" for file, line, name in frames[:10]) or "no frame"


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _end(process: Any) -> None:
    """Let a process end, or kill it; then kill what it started."""
    process.join(SECONDS_TO_END if process.exitcode is None and not process.is_alive() else 0.5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join()
