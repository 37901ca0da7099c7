# SPDX-License-Identifier: Apache-2.0
"""Kills processes of a busy server and records how it ends and what it leaves behind."""

import asyncio
import contextlib
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from checks.soak.load import Client, Load, Request, Response
from testing.server import Server

SHARED_MEMORY = Path("/dev/shm")
EXIT_SECONDS = 90.0
NUM_IN_FLIGHT = 8

FAULTS: dict[str, tuple[str, signal.Signals]] = {
    "worker killed": ("worker", signal.SIGKILL),
    "engine core killed": ("engine core", signal.SIGKILL),
    "server terminated": ("API server", signal.SIGTERM),
}
"""The process that receives a signal, and the signal."""


@dataclass(frozen=True)
class FaultOutcome:
    """How a server ended after a fault. It must be equal without and with eviction."""

    in_flight: dict[str, list[str]]
    """How streamed and complete responses ended that were in flight."""
    unanswered: int
    """Requests without a response before the deadline."""
    exit_code: int | None
    left_processes: list[str]
    left_shared_memory: int
    """Files in /dev/shm that its processes had open and that were not removed."""


def processes(server: Server) -> dict[str, psutil.Process]:
    """The processes of a server, by role."""
    root = psutil.Process(server.process.pid)
    found = {"API server": root}
    for child in root.children(recursive=True):
        name = child.name()
        if name.startswith("VLLM::"):
            kind = "engine core" if "EngineCore" in name else "worker"
            assert kind not in found, "expected one process of each role"
            found[kind] = child
    assert len(found) == 3, found
    return found


async def inject(server: Server, fault: str, load: Load) -> FaultOutcome:
    """Send the signal while requests are in flight, and wait until the server has exited."""
    victim, number = FAULTS[fault]
    kinds = processes(server)
    tree = [kinds["API server"], *kinds["API server"].children(recursive=True)]
    names = {process.pid: process.name() for process in tree}
    shared_memory = {path for process in tree for path in _shared_memory(process)}
    async with Client(server, deadline=EXIT_SECONDS) as client:
        requests = [_long(load, streamed=i % 2 == 0) for i in range(NUM_IN_FLIGHT)]
        tasks = [asyncio.create_task(client.send(request)) for request in requests]
        while await asyncio.to_thread(_num_in_flight, server) < NUM_IN_FLIGHT:
            if any(task.done() for task in tasks):
                break  # on a busy machine the first may end before the last starts
            await asyncio.sleep(0.1)
        in_flight_now = [not task.done() for task in tasks]
        kinds[victim].send_signal(number)
        responses = await asyncio.gather(*tasks, return_exceptions=True)
    ends: dict[str, set[str]] = {"streamed": set(), "whole": set()}
    for request, response, counts in zip(requests, responses, in_flight_now, strict=True):
        if counts and isinstance(response, Response):
            ends["streamed" if request.streams else "whole"].add(_end(response))
    with contextlib.suppress(subprocess.TimeoutExpired):
        await asyncio.to_thread(server.process.wait, EXIT_SECONDS)
    _, alive = await asyncio.to_thread(psutil.wait_procs, tree, timeout=10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return FaultOutcome(
        in_flight={kind: sorted(seen) for kind, seen in ends.items()},
        unanswered=sum(isinstance(response, BaseException) for response in responses),
        exit_code=server.process.poll(),
        left_processes=sorted(names[process.pid] for process in alive),
        left_shared_memory=sum(path.exists() for path in shared_memory),
    )


def _num_in_flight(server: Server) -> float:
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(server.metric(gauge) for gauge in gauges)


def _long(load: Load, streamed: bool) -> Request:
    """A request that is still decoding when the signal arrives."""
    return Request(load.chat(load.text(20), 1, max_tokens=600, stream=streamed))


def _end(response: Response) -> str:
    """How a response ended."""
    if not response.error:
        return f"finished: {response.finish_reason}"
    if response.status not in (0, 200):
        return f"HTTP {response.status}"
    closed = response.error.partition(":")[0].endswith(("Error", "Disconnected"))
    return "connection closed" if closed else "error in the stream"


def _shared_memory(process: psutil.Process) -> set[Path]:
    """The files in /dev/shm that a process has mapped."""
    try:
        maps = process.memory_maps()
    except psutil.Error:
        return set()
    return {Path(m.path) for m in maps if Path(m.path).parent == SHARED_MEMORY}
