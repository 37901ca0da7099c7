# SPDX-License-Identifier: Apache-2.0
"""Soak test: thousands of mixed requests to a server with a small pool, then killed processes.

    python -m checks.soak [--minutes 12] [--seed 0] [--json FILE] [--no-stock]

Phases repeat until the time is over. After each phase no request may be waiting, all blocks must
be free, and one more request must get the whole pool without a preemption. The memory of every
process is recorded. Some requests are sampled: their outputs on the idle server are known and must
be reproduced. Then processes are killed while requests are in flight, and the server is restarted
on the same port; vLLM without eviction gets the same faults. docs/reliability.md describes what is
compared.
"""

import asyncio
import bisect
import itertools
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
from checks.soak.load import DEADLINE_SECONDS, MAX_MODEL_LEN, Client, Load, Request, Response
from testing import tiny_models
from testing.cli import make_parser
from testing.results import write_report
from testing.server import Server, running

BLOCK = 32
POOL_BLOCKS = MAX_MODEL_LEN // BLOCK + 1  # 1: the null block. The longest request needs all others
BASELINE = (
    "--dtype=float32",
    "--enforce-eager",
    f"--max-model-len={MAX_MODEL_LEN}",
    f"--block-size={BLOCK}",
    "--kv-cache-memory-bytes=16M",
    f"--num-gpu-blocks-override={POOL_BLOCKS}",
    "--max-num-batched-tokens=512",
    "--scheduling-policy=priority",
    '--limit-mm-per-prompt={"image": 3}',
    "--shutdown-timeout=80",  # with the default 0, clients of a terminated server may wait forever
)
EVICTION = (*BASELINE, "--kv-compress=vlcache", "--kv-compress-budget=0.25")

IDLE_SECONDS = 60.0
AFTER_RESTART = 8  # sampled requests that a restarted server must reproduce
CACHE_MISS = "Multi-modal cache miss"  # logged by the engine core, with the request's id
ATTEMPTS = 3  # of a request whose images the engine did not have
NEAR_TIE = 1e-3
"""If the two most likely tokens of the idle run are closer than this, this token and the following
ones are not compared: another batch may round differently."""
GROWTH_MB = 20.0
"""Maximum memory growth of a process per 1000 requests, in the second half of the phases."""


@dataclass(frozen=True)
class Phase:
    """The number of clients, and the fractions of their requests that are of a special kind."""

    name: str
    clients: int
    sampled: float = 0.15
    leaving: float = 0.02
    bad: float = 0.02
    slow: float = 0.0
    long: float = 0.2
    at_once: bool = False
    """Send ``clients`` requests for each second of the phase, all at once. Otherwise each client
    sends its next request after the previous response, until the time is over."""


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
    """The requests to one server and the checks of its responses."""

    def __init__(self, server: Server, client: Client, load: Load) -> None:
        self.server, self.client, self.load = server, client, load
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.idle: list[Response] = []
        self.phases: list[dict[str, Any]] = []
        self.answered_at: list[float] = []
        self.pauses: list[int] = []
        """For each pause of a slow reader, the responses that other requests received during it."""

    async def metric(self, name: str) -> float:
        return await asyncio.to_thread(self.server.metric, f"vllm:{name}")

    def fail(self, message: str) -> None:
        self.failures.append(message)
        print("FAILED", message, flush=True)

    async def record_idle(self) -> None:
        """Record the responses of the sampled requests while the server is otherwise idle."""
        for request in self.load.samples:
            self.idle.append(await self.client.send(request))
            if self.idle[-1].error:
                self.fail(f"idle run: {self.idle[-1].error}")

    async def run(self, phase: Phase, seconds: float) -> None:
        """Run one phase and the checks after it."""
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
        """Send a request and check its response."""
        self.counts["requests"] += 1
        sampled = request.sample is not None
        preemptions = await self.metric("num_preemptions_total") if sampled else 0.0
        try:
            response = await self._send(request)
        except TimeoutError:
            self.counts["unanswered"] += 1
            self.fail(f"{where}: no response within the deadline: {str(request)[:300]}")
            return
        if response.left:
            self.counts["hung up"] += 1
        elif response.status != request.status or (request.status == 200 and response.error):
            self.counts["wrong"] += 1
            self.fail(f"{where}: {response.status} for {request.status}: {response.error[:300]}")
        elif request.status != 200:
            self.counts["refused"] += 1
        else:
            self.counts["answered"] += 1
            self._check_length(request, response, where)
            if response.pause and response.pause[1] < end:  # later no other request may be running
                first, last = (bisect.bisect(self.answered_at, moment) for moment in response.pause)
                self.pauses.append(last - first)
            self.answered_at.append(time.perf_counter())
            if sampled:
                preempted = await self.metric("num_preemptions_total") != preemptions
                self._compare(request, response, preempted, where)

    async def _send(self, request: Request) -> Response:
        """Send a request, and repeat it if the engine did not have an image of it.

        The two caches of images of vLLM may differ after disconnects, with and without eviction.
        Such a request gets HTTP 500 and may be repeated (docs/reliability.md).
        """
        for _ in range(ATTEMPTS - 1):
            response = await self.client.send(request)
            may_repeat = response.error and response.status in (200, 500)
            if not may_repeat or not self._missed_cache(response):
                return response
            self.counts["repeated"] += 1
        return await self.client.send(request)

    def _missed_cache(self, response: Response) -> bool:
        lines = self.server.log.read_text(errors="replace").splitlines()
        return any(CACHE_MISS in line and response.request_id in line for line in lines)

    def _check_length(self, request: Request, response: Response, where: str) -> None:
        assert isinstance(request.body, dict)
        expected = request.body["max_tokens"] * request.body.get("n", 1)
        if response.completion_tokens not in (0, expected):  # 0: a stream without usage
            self.fail(f"{where}: {response.completion_tokens} of {expected} tokens")

    def _compare(self, request: Request, response: Response, preempted: bool, where: str) -> None:
        """Compare the response of a sampled request with that of the idle run.

        An evicted request that was preempted is prefilled again with its longer text and may keep
        other tokens. The server does not report which request was preempted. Therefore outputs
        that eviction may change are compared only if there was no preemption during the request.
        """
        assert isinstance(request.body, dict) and request.sample is not None
        full_cache = request.body.get("vllm_xargs", {}).get("kv_budget") == 1.0
        text_only = len(request.body["messages"][0]["content"]) == 1
        if preempted and not full_cache and not text_only:
            self.counts["not compared"] += 1
            return
        idle = self.idle[request.sample]
        ties = [i for i, margin in enumerate(idle.margins) if margin < NEAR_TIE]
        length = min([*ties, len(idle.tokens)])
        self.counts["compared"] += 1
        self.counts["compared to the end"] += not ties
        if len(response.tokens) != len(idle.tokens) or (
            response.tokens[:length] != idle.tokens[:length]
        ):
            self.counts["mismatches"] += 1
            self.fail(
                f"{where}: sample {request.sample}: {''.join(response.tokens)!r} for "
                f"{''.join(idle.tokens)!r}"
            )

    async def settle(self, where: str) -> dict[str, Any]:
        """Wait until the server is idle, and check that all blocks are free.

        The usage gauge is exact, because one block is more than 1% of the pool. It is read after a
        request that needs every block, which shows that the scheduler can use all of them.
        """
        try:
            async with asyncio.timeout(IDLE_SECONDS):
                while await self._busy():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            self.fail(f"{where}: not idle after {IDLE_SECONDS:.0f} s")
        before = await self.metric("num_preemptions_total")
        try:
            response = await self.client.send(self.load.whole_pool())
            if response.error or await self.metric("num_preemptions_total") != before:
                self.fail(f"{where}: a request could not get the whole pool: {response.error}")
        except TimeoutError:
            self.fail(f"{where}: a request could not get the whole pool")
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
        """Memory growth of each process in MB per 1000 requests.

        The slope of a linear regression over the second half of the phases. In the first half the
        caches of libraries fill up, without eviction as well. Empty for less than two rounds of
        phases in the second half.
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
    """Repeat all phases until the time is over, at least once."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        await run.settle("start")
        await run.record_idle()
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
            run.fail("no request was answered while a client paused")
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
            "idle": [asdict(response) for response in run.idle],
        }


async def after_restart(server: Server, load: Load, idle: list[dict[str, Any]]) -> list[str]:
    """Failures of a restarted server: it must reproduce the responses of the idle run."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        run.idle = [Response(**response) for response in idle]
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
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the phases, then inject each fault into a restarted server.

    Args:
        model: path of the checkpoint.
        logs: folder for the logs of the servers.
        minutes: duration of the phases.
        seed: of the request generator.
        phase_seconds: duration of one phase.
        faults: names in `FAULTS`.
        stock: also inject the faults into vLLM without eviction.
        more: further arguments of the evicting servers.
    """
    load = Load(model, seed)
    outcomes: dict[str, Any] = {}
    report: dict[str, Any] = {}
    idle: list[dict[str, Any]] = []
    port = None
    for fault in faults:
        with running(model, logs / f"{fault}.log", *EVICTION, *more, port=port) as server:
            port = server.port
            if not report:
                report = asyncio.run(soak(server, load, 60 * minutes, phase_seconds))
                idle = report.pop("idle")
            else:
                report["failures"] += asyncio.run(after_restart(server, load, idle))
            outcomes[fault] = {"eviction": asdict(asyncio.run(inject(server, fault, load)))}
    for fault in faults if stock else ():
        with running(model, logs / f"stock {fault}.log", *BASELINE, port=port) as server:
            if fault == faults[0]:
                report["failures"] += asyncio.run(refusals(server, load))
            outcomes[fault]["stock"] = asdict(asyncio.run(inject(server, fault, load)))
    report["faults"] = outcomes
    report["failures"] += fault_failures(outcomes)
    return report


async def refusals(server: Server, load: Load) -> list[str]:
    """Failures of vLLM without eviction: it must refuse the same requests with the same status."""
    async with Client(server) as client:
        run = Soak(server, client, load)
        for request in load.bad_requests(eviction=False).values():
            await run.ask(request, "stock")
        return run.failures


def fault_failures(faults: dict[str, Any]) -> list[str]:
    """Differences from vLLM without eviction after a fault, and what the server left behind."""
    failures = []
    for name, outcomes in faults.items():
        eviction, baseline = outcomes["eviction"], outcomes.get("stock")
        if baseline is not None and eviction != baseline:
            failures.append(f"{name}: {eviction}, baseline {baseline}")
        if eviction["unanswered"] or eviction["exit_code"] != 0 or eviction["left_processes"]:
            failures.append(f"{name}: {eviction}")
    return failures


def markdown(report: dict[str, Any]) -> str:
    """The first table of docs/reliability.md."""
    counts = report["counts"]
    growth = report["memory_growth_mb_per_1000_requests"]
    rows: dict[str, int | str] = {
        "requests": counts["requests"],
        "completed": counts["answered"],
        "refused with the expected status": counts["refused"],
        "cancelled by the client": counts["hung up"],
        f"without a response in {DEADLINE_SECONDS:.0f} s": counts.get("unanswered", 0),
        "evictions": counts["evicted"],
        "preemptions": counts["preemptions"],
        "blocks leaked": report["blocks_leaked"],
        "outputs compared with an idle server": counts["compared"],
        "mismatches": counts["mismatches"],
        "repeated because vLLM's caches of images differed": counts.get("repeated", 0),
        "injected faults, all with the same outcome as the baseline": len(report["faults"]),
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
        "| | streams in flight | others in flight | exit code | processes left | /dev/shm |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for fault, outcomes in report["faults"].items():
        for server, outcome in outcomes.items():
            ends = (", ".join(outcome["in_flight"][kind]) for kind in ("streamed", "whole"))
            left = len(outcome["left_processes"]), outcome["left_shared_memory"]
            name = "baseline" if server == "stock" else server
            cells = (f"{fault}, {name}", *ends, outcome["exit_code"], *left)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=12.0, help="for the phases; faults take about four more")
    add("--seed", type=int, default=0, help="of the request generator")
    add(
        "--no-stock",
        action="store_true",
        help="do not inject the faults into vLLM without eviction",
    )
    add("--logs", type=Path, metavar="FOLDER", help="keep the logs of the servers here")
    options = parser.parse_args(arguments)
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
