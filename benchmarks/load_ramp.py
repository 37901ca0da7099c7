# SPDX-License-Identifier: Apache-2.0
"""From an idle engine to an overloaded one and back, in one run: what eviction under load changes.

    python -m benchmarks.load_ramp [--rates 0.1 1 0.1] [--seconds 40 40 60] [--json OUT]

Every engine gets the same requests at the same times: about 1,100 prompt tokens of one image, and
outputs of exactly the requested length. It has room for the full cache of three of them. The
engines run one after the other in this process:

- "stock": vLLM without eviction
- "always": evicts prompts
- "pressure": evicts while blocks are scarce, running requests too

With ``--json`` a plot is drawn beside the file. The model is small and has random weights, so only
speeds and blocks have a meaning.
"""

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.long_outputs import BLOCK_SIZE, BUDGET, FULL_REQUESTS, IMAGE_SIZE, QUESTION, SHAPE
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, make_report, to_json

POLICY = {"policy": "vlcache-plus", "budget": BUDGET}
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "always": POLICY,
    "pressure": {**POLICY, "when": "pressure"},
}
BIN = 10  # seconds of the plot's bars


def arrivals(rates: Sequence[float], seconds: Sequence[float], seed: int = 0) -> list[float]:
    """Times of a Poisson process whose rate changes after each phase.

    Args:
        rates: requests per second of each phase.
        seconds: how long each phase lasts.
        seed: of the random numbers.
    """
    rng = random.Random(seed)
    times, start = [], 0.0
    for rate, length in zip(rates, seconds, strict=True):
        now = start + rng.expovariate(rate)
        while now < start + length:
            times.append(now)
            now += rng.expovariate(rate)
        start += length
    return times


def measure(
    model: Path, settings: dict[str, Any] | None, times: Sequence[float], output_len: int
) -> dict[str, list[Row]]:
    """Run one engine over all requests.

    Returns:
        ``requests`` in order of arrival, and ``samples`` of the engine, one a second.
    """
    from testing import engine as harness

    prompt_tokens = (IMAGE_SIZE // 14) ** 2 + 80
    pool_blocks = FULL_REQUESTS * -(-(prompt_tokens + output_len) // BLOCK_SIZE) + 1
    prompts = [harness.image_request("llava", QUESTION, [n]) for n in range(len(times) + 1)]
    params = harness.greedy(output_len, logprobs=None)
    params.ignore_eos = True
    requests: list[Row] = [{"arrival": round(when, 2), "kept_all": True} for when in times]
    samples: list[Row] = []
    with harness.engine(
        model,
        settings,
        num_gpu_blocks_override=pool_blocks,
        max_model_len=prompt_tokens + output_len + BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    ) as llm:
        llm.generate([prompts.pop()], harness.greedy(8, logprobs=None), use_tqdm=False)
        scheduler = harness.scheduler(llm)
        engine = llm.llm_engine
        preemptions: dict[str, int] = {}
        start = time.perf_counter()
        coming = iter(enumerate(times))
        upcoming = next(coming, None)
        while upcoming is not None or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while upcoming is not None and upcoming[1] <= now:
                number = upcoming[0]
                engine.add_request(str(number), prompts[number], params)
                upcoming = next(coming, None)
            if not engine.has_unfinished_requests():
                assert upcoming is not None
                time.sleep(upcoming[1] - now)
                continue
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                row = requests[int(output.request_id)]
                row.setdefault("ttft", round(now - row["arrival"], 2))
                if output.finished:
                    row["latency"] = round(now - row["arrival"], 2)
            for request in scheduler.requests.values():
                preemptions[request.request_id] = request.num_preemptions
            if settings is not None:
                for request_id in harness.manager(llm)._evicted:
                    requests[int(request_id.split("-")[0])]["kept_all"] = False
            if now >= len(samples):
                samples.append(
                    {
                        "second": round(now, 1),
                        "running": len(scheduler.running),
                        "waiting": len(scheduler.waiting),
                        "kv_usage": round(scheduler.kv_cache_manager.usage, 3),
                        "preemptions": sum(preemptions.values()),
                    }
                )
    return {"requests": requests, "samples": samples}


def bins(rows: Sequence[Row]) -> Iterator[tuple[float, list[Row]]]:
    """The middle of each bin of arrivals, and its requests."""
    for number, group in itertools.groupby(rows, lambda row: int(row["arrival"] // BIN)):
        yield BIN * (number + 0.5), list(group)


def means(rows: Sequence[Row], value: str) -> tuple[list[float], list[float]]:
    """The middles of the bins of arrivals, and the means of a value in them."""
    found = [(x, statistics.mean(row[value] for row in group)) for x, group in bins(rows)]
    return [x for x, _ in found], [y for _, y in found]


def plot(results: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Draw one panel for each of: load, share with the full cache, latency, preemptions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, panels = pyplot.subplots(4, 1, figsize=(7.2, 8.4), sharex=True)
    load, kept, latency, preempted = panels
    rows = next(iter(results.values()))["requests"]
    counts = [(x, len(group)) for x, group in bins(rows)]
    load.bar([x for x, _ in counts], [n / BIN for _, n in counts], BIN * 0.9, color="0.85")
    load.set_ylabel("requests per second\n(bars)")
    running = load.twinx()
    running.set_ylabel("running")
    for name, result in results.items():
        seconds = [sample["second"] for sample in result["samples"]]
        running.plot(seconds, [sample["running"] for sample in result["samples"]], label=name)
        kept.plot(*means(result["requests"], "kept_all"), marker="o", ms=3)
        latency.plot(*means(result["requests"], "latency"), marker="o", ms=3)
        preempted.plot(seconds, [sample["preemptions"] for sample in result["samples"]])
    running.legend(loc="upper right", frameon=False)
    kept.yaxis.set_major_formatter(PercentFormatter(1.0))
    kept.set_ylabel("requests that\nkept everything")
    latency.set_ylabel("latency by arrival,\nseconds")
    preempted.set_ylabel("preemptions so far")
    preempted.set_ylim(0, max(1, *(r["samples"][-1]["preemptions"] for r in results.values())))
    preempted.set_xlabel("seconds")
    for axis in panels:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(
    results: dict[str, dict[str, list[Row]]], rates: Sequence[float], seconds: Sequence[float]
) -> str:
    """The results by phase of arrival as a Markdown table."""
    lines = [
        "| engine | requests per second | kept everything | latency p50, p99 | preemptions |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ends = list(itertools.accumulate(seconds))
    for name, result in results.items():
        total = result["samples"][-1]["preemptions"]
        for number, (rate, end) in enumerate(zip(rates, ends, strict=True)):
            rows = [r for r in result["requests"] if end - seconds[number] <= r["arrival"] < end]
            latencies = sorted(row["latency"] for row in rows)
            kept = statistics.mean(row["kept_all"] for row in rows)
            last = str(total) if number == len(ends) - 1 else ""
            lines.append(
                f"| {name} | {rate:g} | {kept:.0%} | {statistics.median(latencies):.1f}, "
                f"{latencies[int(0.99 * (len(latencies) - 1))]:.1f} s | {last} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[0.1, 1.0, 0.1], help="of each phase")
    add("--seconds", type=float, nargs="+", default=[40, 40, 60], help="length of each phase")
    add("--output-len", type=int, default=256)
    add("--arms", nargs="+", default=[*ARMS], choices=[*ARMS])
    options = parser.parse_args(arguments)
    if len(options.rates) != len(options.seconds):
        parser.error("give as many --rates as --seconds")
    set_vllm_environment()
    from testing import tiny_models

    times = arrivals(options.rates, options.seconds)
    results: dict[str, dict[str, list[Row]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("llava", Path(folder) / "llava", image_size=IMAGE_SIZE, **SHAPE)
        for name in options.arms:
            results[name] = measure(model, ARMS[name], times, options.output_len)
    if options.json:
        report = make_report(
            "benchmarks.load_ramp",
            arguments,
            model={"kind": "llava", "image_size": IMAGE_SIZE, **SHAPE},
            block_size=BLOCK_SIZE,
            budget=BUDGET,
            output_len=options.output_len,
            rates=options.rates,
            seconds=options.seconds,
            results=results,
        )
        options.json.write_text(to_json(report) + "\n")
        plot(results, options.json.with_suffix(".png"))
    print(table(results, options.rates, options.seconds))


if __name__ == "__main__":
    main()
