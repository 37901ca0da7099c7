# SPDX-License-Identifier: Apache-2.0
"""Generates the results page from the committed results.

    python -m benchmarks.report [--check]

Writes ``docs/benchmarks.md`` from the template ``benchmarks/report.md``. With ``--check`` it writes
nothing and fails if the page is not up to date.

In the results, ``stock`` is vLLM without eviction (the baseline), ``again`` a second baseline,
``ours`` eviction with the given budget and ``whole`` eviction with budget 1.0.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from testing.cli import make_parser
from testing.results import Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "report.md"
PAGE = ROOT / "docs" / "benchmarks.md"
# A median over the saturated phase is reported only if the phase lasts this long.
MIN_SATURATED_SECONDS = 10.0
NOT_MEASURED = "Not measured yet."


def load(name: str) -> Any:
    """A committed result, or None if it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class Results:
    """All results of the page. Serving results are None where they have not been measured."""

    limited: Row | None
    ample: Row | None
    early: Row | None
    offline: Row
    turns: Row
    overhead: Row
    overhead_amx: Row
    host_time: Row
    host_time_before: Row

    @classmethod
    def committed(cls) -> "Results":
        serving = (load(name) for name in ("serving", "serving-ample", "serving-early"))
        others = ("offline", "turns", "overhead", "overhead-amx", "host-time", "host-time-before")
        return cls(*serving, *map(load, others))

    @property
    def serving(self) -> dict[str, Row | None]:
        return {"limited": self.limited, "ample": self.ample, "early": self.early}

    @property
    def swept(self) -> tuple[Row, Row]:
        """Baseline and eviction for the main workload at the highest load, limited pool."""
        assert self.limited is not None
        baseline, eviction = (sweep(self.limited["results"][arm])[-1] for arm in ("stock", "ours"))
        return baseline, eviction


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table. The first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(results: dict[str, list[Row]], one: str, other: str) -> Iterator[tuple[Row, Row]]:
    """The rows of two arms for the same workloads."""
    return zip(results[one], results[other], strict=True)


def measured_on(report: Row) -> str:
    """Command, machine and versions of a result, one sentence a line."""
    machine = report["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}"
        for name in ("vllm", "torch", "transformers", "kvpress", "vl-cache-vllm")
        if name in machine
    )
    if "commit" in machine:
        versions += f" at {machine['commit']}"
    processor = ", ".join(machine[name] for name in ("gpu", "processor") if name in machine)
    return (
        f"Command: `{report['command']}`.\n"
        f"Machine: {processor}, {machine['cores']} cores, {machine['memory_gib']} GiB.\n"
        f"Versions: {versions}."
    )


# --------------------------------------------------------------------------------------------------
# Serving


def lengths(row: Row) -> str:
    """Prompt and output tokens of a workload."""
    bound = "up to " if row.get("ends_early") else ""
    return f"{row['prompt_tokens']:,} in, {bound}{row['output_len']} out"


def load_of(row: Row) -> str:
    """The offered load of a row."""
    return "all at once" if row["request_rate"] == "inf" else f"{row['request_rate']} requests/s"


def workload(row: Row) -> str:
    return f"{lengths(row)}, {load_of(row)}"


def sweep(rows: list[Row]) -> list[Row]:
    """The rows of the workload that was offered at every load, ordered by load."""
    first = rows[0]["images"], rows[0]["output_len"]
    return [row for row in rows if (row["images"], row["output_len"]) == first]


def running(row: Row) -> float | None:
    """Median number of running sequences in the saturated phase; None if it was too short."""
    saturated = row.get("saturated", {"seconds": 0})
    return saturated["running"] if saturated["seconds"] >= MIN_SATURATED_SECONDS else None


def running_ratio(baseline: Row, eviction: Row) -> float | None:
    """Ratio of the running sequences, or None unless both arms are saturated."""
    before, after = running(baseline), running(eviction)
    return after / before if before and after else None


def throughput_ratio(baseline: Row, eviction: Row) -> float:
    return eviction["output_throughput"] / baseline["output_throughput"]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def throughput_table(results: dict[str, list[Row]]) -> str:
    header = ["workload", "requests", "baseline tokens/s", "eviction", "ratio"]
    header += ["baseline running", "eviction", "ratio", "baseline decoding, mean", "eviction"]
    header += ["baseline preemptions", "eviction", "baseline KV usage, max", "eviction"]
    return table(
        header,
        (
            [
                workload(eviction),
                str(eviction["num_prompts"]),
                f"{baseline['output_throughput']:.1f}",
                f"{eviction['output_throughput']:.1f}",
                f"{throughput_ratio(baseline, eviction):.2f}",
                number(running(baseline)),
                number(running(eviction)),
                number(running_ratio(baseline, eviction)),
                f"{baseline['mean_answering']:.1f}",
                f"{eviction['mean_answering']:.1f}",
                f"{baseline['preemptions']:g}",
                f"{eviction['preemptions']:g}",
                f"{baseline['most_kv_usage']:.0%}",
                f"{eviction['most_kv_usage']:.0%}",
            ]
            for baseline, eviction in pairs(results, "stock", "ours")
        ),
    )


def latency_table(results: dict[str, list[Row]]) -> str:
    header = ["workload"]
    keys = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    for name in ("TTFT p50, s", "TTFT p99, s", "ITL p50, ms", "ITL p99, ms"):
        header += [f"baseline {name}", "eviction"]
    rows = []
    for baseline, eviction in pairs(results, "stock", "ours"):
        cells = [workload(eviction)]
        for key in keys:
            for row in (baseline, eviction):
                is_first = key.startswith("ttft")
                cells.append(f"{row[key] / 1000:.1f}" if is_first else f"{row[key]:.0f}")
        rows.append(cells)
    return table(header, rows)


def headline(results: Results) -> str:
    """The summary table: the main workload at the highest load, limited pool."""
    forms: tuple[tuple[str, Callable[[Row], str]], ...] = (
        ("output tokens per second", lambda row: f"{row['output_throughput']:.1f}"),
        ("running sequences, median of the saturated phase", lambda row: number(running(row))),
        ("decoding sequences, mean of the whole run", lambda row: f"{row['mean_answering']:.1f}"),
        ("time to first token, median", lambda row: f"{row['ttft_p50_ms'] / 1000:.1f} s"),
        ("inter-token latency, median", lambda row: f"{row['itl_p50_ms']:.1f} ms"),
        ("preemptions", lambda row: f"{row['preemptions']:g}"),
    )
    baseline, eviction = results.swept
    rows = ([name, form(baseline), form(eviction)] for name, form in forms)
    return table([workload(eviction), "baseline", "eviction"], rows)


# --------------------------------------------------------------------------------------------------
# One batch

TIMES = ("prefill", "decode", "end_to_end")


def repeat_ratios(baseline: Row, other: Row, name: str) -> list[float]:
    """Speed-up of each repeat. The two times of one repeat were measured seconds apart."""
    both = zip(baseline["repeats"][name], other["repeats"][name], strict=True)
    return [one / two for one, two in both]


def ratio_of(baseline: Row, other: Row, name: str) -> float:
    """Median of `repeat_ratios`."""
    return statistics.median(repeat_ratios(baseline, other, name))


def ratio_range(baseline: Row, other: Row, name: str) -> str:
    """Range of `repeat_ratios`."""
    ratios = repeat_ratios(baseline, other, name)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def decode_bound(baseline: Row, other: Row) -> float:
    """The bandwidth bound of a decode step's speed-up: the ratio of the bytes read."""
    return baseline["decode_bytes"] / other["decode_bytes"]


def batch_table(results: dict[str, list[Row]]) -> str:
    header = ["prompt tokens", "batch", "baseline prefill, ms", "eviction", "ratio"]
    header += ["baseline decode, ms", "eviction", "ratio", "range", "bound"]
    header += ["end to end, ratio", "range"]
    return table(
        header,
        (
            [
                f"{baseline['prompt_tokens']:,}",
                str(baseline["batch"]),
                f"{baseline['prefill']:.0f}",
                f"{eviction['prefill']:.0f}",
                f"{ratio_of(baseline, eviction, 'prefill'):.2f}",
                f"{baseline['decode']:.1f}",
                f"{eviction['decode']:.1f}",
                f"{ratio_of(baseline, eviction, 'decode'):.2f}",
                ratio_range(baseline, eviction, "decode"),
                f"{decode_bound(baseline, eviction):.2f}",
                f"{ratio_of(baseline, eviction, 'end_to_end'):.2f}",
                ratio_range(baseline, eviction, "end_to_end"),
            ]
            for baseline, eviction in pairs(results, "stock", "ours")
        ),
    )


def full_budget_table(results: dict[str, list[Row]]) -> str:
    """The overhead of the plugin in whole batches when nothing is evicted."""
    header = ["prompt tokens", "batch"]
    for name in TIMES:
        header += [name.replace("_", " "), "range"]
    rows = []
    for baseline, full in pairs(results, "stock", "whole"):
        cells = [f"{baseline['prompt_tokens']:,}", str(baseline["batch"])]
        for name in TIMES:
            cells += [f"{ratio_of(baseline, full, name):.3f}", ratio_range(baseline, full, name)]
        rows.append(cells)
    return table(header, rows)


def peers_table(results: dict[str, list[Row]]) -> str:
    engines = [name for name in ("hf", "snapkv", "stock", "ours") if name in results]
    names = {
        "hf": "transformers",
        "snapkv": "transformers + kvpress SnapKV",
        "stock": "vLLM",
        "ours": "vLLM + vlcache",
    }
    header = ["prompt tokens", "batch"]
    header += [f"{names[name]}: prefill, decode, end to end" for name in engines]
    rows = []
    for index, first in enumerate(results["stock"]):
        cells = [f"{first['prompt_tokens']:,}", str(first["batch"])]
        for name in engines:
            row = results[name][index]
            cells.append(f"{row['prefill']:.0f}, {row['decode']:.1f}, {row['end_to_end']:.0f} ms")
        rows.append(cells)
    return table(header, rows)


# --------------------------------------------------------------------------------------------------
# Interleaved steps

ARMS = {"again": "second baseline (A/A)", "whole": "budget 1.0", "ours": "eviction"}


def turns_table(rows: list[Row]) -> str:
    header = ["step", "visual tokens", "batch", "engine", "baseline, ms", "engine, ms"]
    return table(
        [*header, "baseline / engine", "95% interval", "steps"],
        (
            [
                row["step"],
                f"{row['visual_tokens']:,}",
                str(row["batch"]),
                ARMS[row["engine"]],
                f"{row['stock_milliseconds']:.1f}",
                f"{row['milliseconds']:.1f}",
                f"{row['ratio']:.3f}",
                "{:.3f} to {:.3f}".format(*row["interval"]),
                str(row["steps"]),
            ]
            for row in rows
        ),
    )


# --------------------------------------------------------------------------------------------------
# Time in this package's code


def own_share(row: Row) -> float:
    """Fraction of a step's time that is spent in this package's code."""
    return row["own_milliseconds"] / row["milliseconds"]


def overhead_table(rows: list[Row]) -> str:
    own = ["own code, ms", "of which scheduler", "fraction of the step"]
    return table(
        ["step", "budget", "visual tokens", "batch", "step, ms", *own],
        (
            [
                row["step"],
                f"{row['budget']:g}",
                f"{row['visual_tokens']:,}",
                str(row["batch"]),
                f"{row['milliseconds']:.1f}",
                f"{row['own_milliseconds']:.2f}",
                f"{row['scheduler_milliseconds']:.2f}",
                f"{own_share(row):.1%}",
            ]
            for row in rows
        ),
    )


def host_time_table(now: list[Row], before: list[Row]) -> str:
    def milliseconds(row: Row) -> list[str]:
        return [f"{row[name] / 1000:.3f}" for name in ("baseline_us", "overhead_us")]

    names = ("part", "running", "changed")
    former = {tuple(row[name] for name in names): row["overhead_us"] / 1000 for row in before}
    return table(
        [
            "part",
            "running requests",
            "batch",
            "baseline, ms",
            "overhead, ms",
            "overhead before, ms",
        ],
        (
            [
                row["part"],
                str(row["running"]),
                "changed" if row["changed"] else "unchanged",
                *milliseconds(row),
                f"{former[tuple(row[name] for name in names)]:.3f}",
            ]
            for row in now
        ),
    )


# --------------------------------------------------------------------------------------------------
# Goals

Verdict = bool | str | None  # met or not, a remark, or not measured
Measured = tuple[str, Verdict]  # the measured value as text


def reached(median: float, worst: float, limit: float) -> bool | str:
    """Whether a ratio reaches its limit.

    If the median reaches it but the worst value does not, the noise is larger than the difference.
    """
    return worst >= limit or ("medians only" if median >= limit else False)


def lowest(ratios: list[list[float]], limit: float) -> Measured:
    """Compare the lowest median and the lowest repeat of several rows with a limit."""
    median, worst = min(map(statistics.median, ratios)), min(map(min, ratios))
    return f"lowest median {median:.2f}x, lowest repeat {worst:.2f}x", reached(median, worst, limit)


def serving_running(results: Results, limit: float) -> Measured:
    ratio = running_ratio(*results.swept)
    return (NOT_MEASURED, None) if ratio is None else (f"{ratio:.1f}x", ratio >= limit)


def serving_throughput(results: Results, limit: float) -> Measured:
    ratio = throughput_ratio(*results.swept)
    return f"{ratio:.2f}x", ratio >= limit


def ample_throughput(results: Results, limit: float) -> Measured:
    if results.ample is None:
        return NOT_MEASURED, None
    rows = pairs(results.ample["results"], "stock", "ours")
    ratio = min(throughput_ratio(*row) for row in rows)
    return f"lowest {ratio:.2f}x", ratio >= limit


def batch_end_to_end(results: Results, limit: float) -> Measured:
    rows = pairs(results.offline["results"], "stock", "ours")
    return lowest([repeat_ratios(*row, "end_to_end") for row in rows], limit)


def batch_decode_of_bound(results: Results, limit: float) -> Measured:
    rows = pairs(results.offline["results"], "stock", "ours")
    long = [row for row in rows if row[0]["prompt_tokens"] >= 2000]
    fraction = min(ratio_of(*row, "decode") / decode_bound(*row) for row in long)
    return f"lowest {fraction:.0%}", fraction >= limit


def batch_full_budget(results: Results, limit: float) -> Measured:
    rows = pairs(results.offline["results"], "stock", "whole")
    difference = max(abs(1 - ratio_of(*row, "end_to_end")) for row in rows)
    return f"largest difference {difference:.1%}", difference <= limit


def interleaved(
    results: Results, limit: float, *, engine: str, step: str, visual_tokens: int = 0
) -> Measured:
    """The lowest ratio of an engine's interleaved steps, for prompts of at least this length."""
    rows = [
        row
        for row in results.turns["rows"]
        if (row["engine"], row["step"]) == (engine, step) and row["visual_tokens"] >= visual_tokens
    ]
    median, low = min(row["ratio"] for row in rows), min(row["interval"][0] for row in rows)
    text = f"lowest median {median:.3f}x, lowest interval bound {low:.3f}x"
    return text, reached(median, low, limit)


def own_code(
    results: Results, limit: float, *, step: str | None = None, budget: float | None = None
) -> Measured:
    """The highest fraction of a step that is spent in this package's code, on any processor."""
    share = max(
        own_share(row)
        for row in results.overhead["rows"] + results.overhead_amx["rows"]
        if step in (None, row["step"]) and budget in (None, row["budget"])
    )
    return f"highest {share:.1%}", share <= limit


def added_host_time(results: Results, limit: float, *, running: int) -> Measured:
    """Milliseconds that a decode step costs more, in scheduler and worker, if nothing changes."""
    added = sum(
        row["overhead_us"] / 1000
        for row in results.host_time["rows"]
        if row["part"] in ("scheduler", "worker")
        and row["running"] == running
        and not row["changed"]
    )
    return f"{added:.2f} ms", added <= limit


@dataclass(frozen=True)
class Goal:
    """A goal with its limit. ``text`` may contain ``{limit}`` and ``{swept}``, the workload."""

    text: str
    measure: Callable[[Results, float], Measured]
    limit: float


GOALS = (
    Goal("limited pool, {swept}: at least {limit:g}x the running sequences", serving_running, 4.0),
    Goal(
        "limited pool, {swept}: at least {limit:g}x the output throughput", serving_throughput, 1.8
    ),
    Goal("ample pool: at least {limit:g}x the output throughput", ample_throughput, 0.98),
    Goal("one batch, end to end: at least {limit:g}x the speed", batch_end_to_end, 0.98),
    Goal(
        "interleaved decode steps, prompts of at least 2K tokens: faster than the baseline",
        partial(interleaved, engine="ours", step="decode", visual_tokens=2000),
        1.0,
    ),
    Goal(
        "one batch, decode, prompts of at least 2K tokens: at least {limit:.0%} of the bound",
        batch_decode_of_bound,
        0.85,
    ),
    Goal("budget 1.0, one batch, end to end: within {limit:.0%}", batch_full_budget, 0.01),
    Goal(
        "budget 1.0, interleaved prefill steps: at least {limit:g}x the speed",
        partial(interleaved, engine="whole", step="prefill"),
        0.99,
    ),
    Goal(
        "budget 1.0, interleaved decode steps: at least {limit:g}x the speed",
        partial(interleaved, engine="whole", step="decode"),
        0.99,
    ),
    Goal("budget 1.0: own code at most {limit:.0%} of a step", partial(own_code, budget=1.0), 0.01),
    Goal("own code at most {limit:.0%} of a prefill step", partial(own_code, step="prefill"), 0.03),
    Goal("own code at most {limit:.0%} of a decode step", partial(own_code, step="decode"), 0.02),
    Goal(
        "256 requests that decode: at most {limit:g} ms of host time a step",
        partial(added_host_time, running=256),
        0.3,
    ),
)


def verdict(met: Verdict) -> str:
    if met is None or isinstance(met, str):
        return met or ""
    return "met" if met else "**missed**"


def goals(results: Results) -> str:
    """Each goal with the measured value and the verdict."""
    swept = workload(results.swept[1])
    rows = []
    for goal in GOALS:
        measured, met = goal.measure(results, goal.limit)
        rows.append([goal.text.format(limit=goal.limit, swept=swept), measured, verdict(met)])
    return table(["goal", "measured", ""], rows)


# --------------------------------------------------------------------------------------------------
# Losses


def serving_losses(about: str, results: dict[str, list[Row]]) -> Iterator[str]:
    pool = "ample" if about == "ample" else "limited"
    measures = [("output throughput", "output_throughput", "tokens/s")]
    for name in ("ttft", "tpot", "itl", "e2el"):
        for percentile in ("p50", "p99"):
            measures.append((f"{name.upper()} {percentile}", f"{name}_{percentile}_ms", "ms"))
    for baseline, eviction in pairs(results, "stock", "ours"):
        for name, key, unit in measures:
            worse, better = sorted((eviction[key], baseline[key]), reverse=unit == "ms")
            if eviction[key] == worse != better:
                yield (
                    f"{pool} pool, {workload(eviction)}: {name} {worse:.0f} {unit}, "
                    f"baseline {better:.0f} {unit}"
                )


def batch_losses(results: dict[str, list[Row]]) -> Iterator[str]:
    for engine in ("ours", "whole"):
        for baseline, other in pairs(results, "stock", engine):
            for name in TIMES:
                ratio = ratio_of(baseline, other, name)
                if ratio < 1:
                    which = f"batch {baseline['batch']}, {baseline['prompt_tokens']:,} tokens"
                    time = f"{name.replace('_', ' ')} {1 / ratio:.2f}x"
                    yield f"one batch, {which}, {ARMS[engine]}: {time} the baseline's time"


def interleaved_losses(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row["engine"] in ("ours", "whole") and row["interval"][1] < 1:
            which = f"batch {row['batch']}, {row['visual_tokens']:,} visual tokens"
            time = f"{row['step']} {1 / row['ratio']:.2f}x"
            yield f"interleaved, {which}, {ARMS[row['engine']]}: {time} the baseline's time"


def losses(results: Results) -> str:
    """A list of all cases in which the baseline is faster."""
    found: list[str] = []
    for about, report in results.serving.items():
        if report:
            found += serving_losses(about, report["results"])
    found += batch_losses(results.offline["results"])
    found += interleaved_losses(results.turns["rows"])
    return "\n".join(f"- {line}" for line in found or ["none"])


# --------------------------------------------------------------------------------------------------
# The page


def page() -> str:
    """The text of the page: the template with its tables."""
    results = Results.committed()
    serving, offline = results.limited, results.offline
    assert serving is not None
    sections = {}
    for about, report in results.serving.items():
        sections[f"{about}_machine"] = measured_on(report) if report else NOT_MEASURED
        sections[f"{about}_throughput"] = throughput_table(report["results"]) if report else ""
        sections[f"{about}_latency"] = latency_table(report["results"]) if report else ""
    return Template(TEMPLATE.read_text()).substitute(
        policy=serving["policy"],
        budget=serving["budget"],
        headline=headline(results),
        goals=goals(results),
        blocks=serving["results"]["stock"][0]["num_blocks"],
        **sections,
        output_len=offline["output_len"],
        repeats=offline["repeats"],
        peer_repeats=offline["peer_repeats"],
        offline_machine=measured_on(offline),
        batch=batch_table(offline["results"]),
        full_budget=full_budget_table(offline["results"]),
        peers=peers_table(offline["results"]),
        turns=turns_table(results.turns["rows"]),
        turns_machine=measured_on(results.turns),
        overhead=overhead_table(results.overhead["rows"]),
        overhead_machine=measured_on(results.overhead),
        overhead_amx=overhead_table(results.overhead_amx["rows"]),
        overhead_amx_machine=measured_on(results.overhead_amx),
        host_time=host_time_table(results.host_time["rows"], results.host_time_before["rows"]),
        host_time_machine=measured_on(results.host_time),
        losses=losses(results),
    )


def main() -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("--check", action="store_true", help="only check that it is up to date")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is not up to date: run python -m benchmarks.report")


if __name__ == "__main__":
    main()
