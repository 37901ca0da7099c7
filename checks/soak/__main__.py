# SPDX-License-Identifier: Apache-2.0
"""Thousands of mixed requests against a real server in a small pool, then processes killed.

    python -m checks.soak [--minutes 12] [--seed 0] [--json OUT] [--no-stock]

Phases repeat until the time is up. Each ends with the checks: nobody waits, every block is back,
one more request gets the whole pool without a preemption, memory of every process is noted. Some
requests are sampled: their answers are known from when the server was quiet and must be the same.
Then processes are killed while it answers, of stock vLLM too, and the server is started again on
the same port. docs/reliability.md tells what is compared and what is not.
"""

import argparse
import asyncio
import bisect
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from checks.soak.faults import FAULTS, inject, processes
from checks.soak.load import DEADLINE_SECONDS, MAX_MODEL_LEN, Answer, Client, Load, Request
from testing import tiny_models
from testing.results import write_report
from testing.server import Server, running

BLOCK = 32
POOL_BLOCKS = MAX_MODEL_LEN // BLOCK + 1  # and the null block: the longest request needs them all
STOCK = (
    "--dtype=float32",
    "--enforce-eager",
    f"--max-model-len={MAX_MODEL_LEN}",
    f"--block-size={BLOCK}",
    "--kv-cache-memory-bytes=16M",
    f"--num-gpu-blocks-override={POOL_BLOCKS}",
    "--max-num-batched-tokens=512",
    "--scheduling-policy=priority",
    '--limit-mm-per-prompt={"image": 3}',
    "--shutdown-timeout=80",  # by default, 0, a terminated server may leave its clients waiting
)
EVICTION = (*STOCK, "--kv-compress=vlcache", "--kv-compress-budget=0.25")

IDLE_SECONDS = 60.0
AFTER_RESTART = 8  # sampled requests that a fresh server must answer alike
NEAR_TIE = 1e-3
"""A token is not compared, nor are those after it, where the quiet run's two most likely ones were
closer than this: another batch may round to the other one."""
GROWTH_MB = 20.0
"""Memory of a process may grow by so much per 1000 requests, in the later half of the phases."""


@dataclass(frozen=True)
class Phase:
    """Clients, and the shares of their requests that are not ordinary."""

    name: str
    clients: int
    sampled: float = 0.15
    leaving: float = 0.02
    bad: float = 0.02
    slow: float = 0.0
    long: float = 0.2
    at_once: bool = False
    """One request a client, all at once, ``clients`` times the seconds of a phase; otherwise each
    client sends its next one until the time is up."""


PHASES = (
    Phase("steady", 8),
    Phase("burst", 10, at_once=True),
    Phase("hang-ups", 16, leaving=0.6),
    Phase("bad requests", 8, bad=0.6),
    Phase("long", 16, long=0.9),
    Phase("slow readers", 12, slow=0.2),
    Phase("few clients", 2, sampled=0.7),
)


class Soak:
    """What one server was asked and how it answered."""

    def __init__(self, server: Server, client: Client, load: Load) -> None:
        self.server, self.client, self.load = server, client, load
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.quiet: list[Answer] = []
        self.phases: list[dict[str, Any]] = []
        self.answered_at: list[float] = []
        self.pauses: list[int] = []
        """Of each slow reader's pause: requests of others that were answered in it."""

    async def metric(self, name: str) -> float:
        return await asyncio.to_thread(self.server.metric, f"vllm:{name}")

    def fail(self, message: str) -> None:
        self.failures.append(message)
        print("FAILED", message, flush=True)

    async def listen(self) -> None:
        """Answers of the sampled requests while nothing else runs."""
        for request in self.load.samples:
            self.quiet.append(await self.client.send(request))
            if self.quiet[-1].error:
                self.fail(f"quiet run: {self.quiet[-1].error}")

    async def run(self, phase: Phase, seconds: float) -> None:
        """One phase and the checks after it."""
        began = time.perf_counter()
        before = Counter(self.counts)
        evicted, preempted = await self._decisions()
        end = began + seconds

        async def one_client() -> None:
            while True:
                await self.ask(self.draw(phase), phase.name, end)
                if phase.at_once or time.perf_counter() >= end:
                    return

        clients = phase.clients * (round(seconds) if phase.at_once else 1)
        await asyncio.gather(*(one_client() for _ in range(clients)))
        record: dict[str, Any] = {"phase": phase.name, **(self.counts - before)}
        now_evicted, now_preempted = await self._decisions()
        record |= {"evicted": now_evicted - evicted, "preemptions": now_preempted - preempted}
        record |= await self.settle(phase.name)
        record["seconds"] = round(time.perf_counter() - began, 1)
        self.phases.append(record)
        print(record, flush=True)

    async def _decisions(self) -> tuple[int, int]:
        evicted = await self.metric("kv_compress_evicted_requests_total")
        return int(evicted), int(await self.metric("num_preemptions_total"))

    def draw(self, phase: Phase) -> Request:
        """The generator's next request."""
        load = self.load
        kinds = (load.sampled, load.leaving, load.bad, load.slow, partial(load.good, phase.long))
        shares = (phase.sampled, phase.leaving, phase.bad, phase.slow)
        return load.rng.choices(kinds, (*shares, 1 - sum(shares)))[0]()

    async def ask(self, request: Request, where: str, end: float = 0.0) -> None:
        """Send a request and check what came back."""
        self.counts["requests"] += 1
        sampled = request.sample is not None
        preemptions = await self.metric("num_preemptions_total") if sampled else 0.0
        try:
            answer = await self.client.send(request)
        except TimeoutError:
            self.counts["unanswered"] += 1
            self.fail(f"{where}: no answer within the deadline: {str(request)[:300]}")
            return
        if answer.left:
            self.counts["hung up"] += 1
        elif answer.status != request.status or (request.status == 200 and answer.error):
            self.counts["wrong"] += 1
            self.fail(f"{where}: {answer.status} for {request.status}: {answer.error[:300]}")
        elif request.status != 200:
            self.counts["refused"] += 1
        else:
            self.counts["answered"] += 1
            self._check_length(request, answer, where)
            if answer.pause and answer.pause[1] < end:  # later there may be nobody else
                first, last = (bisect.bisect(self.answered_at, moment) for moment in answer.pause)
                self.pauses.append(last - first)
            self.answered_at.append(time.perf_counter())
            if sampled:
                preempted = await self.metric("num_preemptions_total") != preemptions
                self._compare(request, answer, preempted, where)

    def _check_length(self, request: Request, answer: Answer, where: str) -> None:
        assert isinstance(request.body, dict)
        expected = request.body["max_tokens"] * request.body.get("n", 1)
        if answer.completion_tokens not in (0, expected):  # 0: streamed without usage
            self.fail(f"{where}: {answer.completion_tokens} of {expected} tokens")

    def _compare(self, request: Request, answer: Answer, preempted: bool, where: str) -> None:
        """A sampled answer with the quiet one.

        An evicted request that was preempted starts over with its longer text and may keep other
        tokens. Who was preempted is not told; so answers that eviction may touch are compared
        only if the server preempted nobody between their first and last byte.
        """
        assert isinstance(request.body, dict) and request.sample is not None
        whole = request.body.get("vllm_xargs", {}).get("kv_budget") == 1.0
        text_only = len(request.body["messages"][0]["content"]) == 1
        if preempted and not whole and not text_only:
            self.counts["not compared"] += 1
            return
        quiet = self.quiet[request.sample]
        ties = [i for i, margin in enumerate(quiet.margins) if margin < NEAR_TIE]
        length = min([*ties, len(quiet.tokens)])
        self.counts["compared"] += 1
        self.counts["compared to the end"] += not ties
        if len(answer.tokens) != len(quiet.tokens) or (
            answer.tokens[:length] != quiet.tokens[:length]
        ):
            self.counts["mismatches"] += 1
            self.fail(
                f"{where}: sample {request.sample}: {''.join(answer.tokens)!r} for "
                f"{''.join(quiet.tokens)!r}"
            )

    async def settle(self, where: str) -> dict[str, Any]:
        """Wait until the server is idle; then the pool must be whole.

        The gauge of used blocks is exact (one block is more than 1 % here). It is read after a
        request that needs every block, which shows that the scheduler can use them all.
        """
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while await self._busy():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self.fail(f"{where}: not idle after {IDLE_SECONDS:.0f} s")
        before = await self.metric("num_preemptions_total")
        try:
            answer = await self.client.send(self.load.whole_pool())
            if answer.error or await self.metric("num_preemptions_total") != before:
                self.fail(f"{where}: the whole pool was not to be had: {answer.error}")
        except TimeoutError:
            self.fail(f"{where}: the whole pool was not to be had")
        leaked = round(await self.metric("kv_cache_usage_perc") * (POOL_BLOCKS - 1))
        held = int(await self.metric("kv_compress_blocks_held"))
        if leaked or held:
            self.fail(f"{where}: {leaked} blocks in use, {held} held by evicted requests")
        memory = {
            kind: round(process.memory_info().rss / 2**20, 1)
            for kind, process in processes(self.server).items()
        }
        return {"blocks_leaked": leaked, "memory_mb": memory}

    async def _busy(self) -> bool:
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            if await self.metric(gauge):
                return True
        return False

    def growth(self) -> dict[str, float]:
        """MB per 1000 requests of every process: a straight line through the later half of phases.

        Empty where that is less than two rounds. In the earlier half the worker fills the caches
        of its libraries, in stock vLLM as much.
        """
        later = self.phases[len(self.phases) // 2 :]
        if len(later) < 2 * len(PHASES):
            return {}
        asked = list(itertools.accumulate(record["requests"] / 1000 for record in later))
        growth = {}
        for kind in later[0]["memory_mb"]:
            megabytes = [record["memory_mb"][kind] for record in later]
            growth[kind] = round(statistics.linear_regression(asked, megabytes).slope, 2)
        return growth


async def soak(server: Server, load: Load, seconds: float, phase_seconds: float) -> dict[str, Any]:
    """All phases, again and again until the time is up, at least once."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        await run.settle("start")
        await run.listen()
        end = time.perf_counter() + seconds
        for phase in itertools.cycle(PHASES):
            await run.run(phase, phase_seconds)
            if time.perf_counter() >= end and len(run.phases) >= len(PHASES):
                break
        growth = run.growth()
        for kind, megabytes in growth.items():
            if megabytes > GROWTH_MB:
                run.fail(f"memory of the {kind} grows by {megabytes} MB per 1000 requests")
        if run.pauses and not any(run.pauses):
            run.fail("nobody was answered while a client did not read")
        for what in ("evicted", "preemptions"):
            run.counts[what] = sum(record[what] for record in run.phases)
        for what in ("evicted", "preemptions", "hung up", "refused", "compared"):
            if not run.counts[what]:
                run.fail(f"{what}: none")
        leaked = max(record["blocks_leaked"] for record in run.phases)
        return {
            "counts": {**run.counts, "mismatches": run.counts["mismatches"]},
            "blocks_leaked": leaked,
            "slow_reader_pauses": len(run.pauses),
            "memory_growth_mb_per_1000_requests": growth,
            "phases": run.phases,
            "failures": run.failures,
            "quiet": [asdict(answer) for answer in run.quiet],
        }


async def after_restart(server: Server, load: Load, quiet: list[dict[str, Any]]) -> list[str]:
    """A fresh server must answer the sampled requests as the first one did when it was quiet."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        run.quiet = [Answer(**answer) for answer in quiet]
        for request in load.samples[:AFTER_RESTART]:
            await run.ask(request, "after a restart")
        await run.settle("after a restart")
        return run.failures


def measure(
    model: Path,
    logs: Path,
    *,
    minutes: float,
    seed: int,
    phase_seconds: float = 20.0,
    faults: Sequence[str] = tuple(FAULTS),
    stock: bool = False,
) -> dict[str, Any]:
    """The phases, then each fault on a fresh server; with ``stock`` also without eviction."""
    load = Load(model, seed)
    outcomes: dict[str, Any] = {}
    report: dict[str, Any] = {}
    quiet: list[dict[str, Any]] = []
    port = None
    for fault in faults:
        with running(model, logs / f"{fault}.log", *EVICTION, port=port) as server:
            port = server.port
            if not report:
                report = asyncio.run(soak(server, load, 60 * minutes, phase_seconds))
                quiet = report.pop("quiet")
            else:
                report["failures"] += asyncio.run(after_restart(server, load, quiet))
            outcomes[fault] = {"eviction": asdict(asyncio.run(inject(server, fault, load)))}
    for fault in faults if stock else ():
        with running(model, logs / f"stock {fault}.log", *STOCK, port=port) as server:
            if fault == faults[0]:
                report["failures"] += asyncio.run(refusals(server, load))
            outcomes[fault]["stock"] = asdict(asyncio.run(inject(server, fault, load)))
    report["faults"] = outcomes
    report["failures"] += fault_failures(outcomes)
    return report


async def refusals(server: Server, load: Load) -> list[str]:
    """Stock vLLM must refuse the same requests with the same status."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        for request in load.bad_requests(ours=False).values():
            await run.ask(request, "stock")
        return run.failures


def fault_failures(faults: dict[str, Any]) -> list[str]:
    """What a server did about a fault that stock vLLM does not, or left behind."""
    failures = []
    for name, outcomes in faults.items():
        ours, stock = outcomes["eviction"], outcomes.get("stock")
        if stock is not None and ours != stock:
            failures.append(f"{name}: {ours}, stock {stock}")
        if ours["unanswered"] or ours["exit_code"] != 0 or ours["left_processes"]:
            failures.append(f"{name}: {ours}")
    return failures


def markdown(report: dict[str, Any]) -> str:
    """The table of README.md and docs/reliability.md."""
    counts = report["counts"]
    growth = report["memory_growth_mb_per_1000_requests"]
    rows: dict[str, int | str] = {
        "requests": counts["requests"],
        "answered in full": counts["answered"],
        "refused with the status that is right for them": counts["refused"],
        "given up by their client": counts["hung up"],
        f"without an answer in {DEADLINE_SECONDS:.0f} s": counts.get("unanswered", 0),
        "evictions": counts["evicted"],
        "preemptions": counts["preemptions"],
        "blocks leaked": report["blocks_leaked"],
        "answers compared with a quiet server's": counts["compared"],
        "mismatches": counts["mismatches"],
        "faults injected, each with stock vLLM's outcome": len(report["faults"]),
    }
    for kind, megabytes in growth.items():
        rows[f"memory of the {kind}, MB per 1000 requests"] = f"{megabytes:+.1f}"
    lines = ["| | |", "| --- | ---: |"]
    for name, value in rows.items():
        number = f"{value:,}" if isinstance(value, int) else value
        lines.append(f"| {name} | {number} |")
    return "\n".join(lines)


def faults_markdown(report: dict[str, Any]) -> str:
    """The second table of docs/reliability.md."""
    lines = [
        "| | streams under way | whole answers under way | exit code | processes left | /dev/shm |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for fault, outcomes in report["faults"].items():
        for server, outcome in outcomes.items():
            ends = (", ".join(outcome["in_flight"][kind]) for kind in ("streamed", "whole"))
            left = len(outcome["left_processes"]), outcome["left_shared_memory"]
            cells = (f"{fault}, {server}", *ends, outcome["exit_code"], *left)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=12.0, help="of the phases; faults take some four more")
    add("--seed", type=int, default=0)
    add("--no-stock", action="store_true", help="do not inject the faults into stock vLLM too")
    add("--logs", type=Path, metavar="DIR", help="keep the servers' logs here")
    add("--json", type=Path, metavar="OUT", help="write the results here")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_models.build("llava", Path(scratch) / "llava", image_size=112)
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        report = measure(
            model, logs, minutes=options.minutes, seed=options.seed, stock=not options.no_stock
        )
    print(markdown(report), faults_markdown(report), sep="\n\n")
    if options.json:
        write_report(options.json, "checks.soak", arguments, **report)
    if report["failures"]:
        sys.exit("\n".join(report["failures"]))


if __name__ == "__main__":
    main()
