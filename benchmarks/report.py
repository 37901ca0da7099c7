# SPDX-License-Identifier: Apache-2.0
"""The results page, from the committed results.

    python -m benchmarks.report [--check]

Writes ``docs/benchmarks.md`` and the README's tables; with ``--check`` it only says whether they
are up to date.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from string import Template
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TEMPLATE = ROOT / "benchmarks" / "report.md"
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
# Of waiting, for a median of who runs meanwhile.
LEAST_SATURATED_SECONDS = 10.0
NOT_MEASURED = "Not measured yet."

Row = dict[str, Any]


def load(name: str) -> Any:
    """A result; None where it has not been measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def load_serving() -> dict[str, Row | None]:
    """The serving results by what they are about."""
    names = {"limited": "serving", "ample": "serving-ample", "early": "serving-early"}
    return {about: load(name) for about, name in names.items()}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pairs(results: dict[str, list[Row]], one: str, other: str) -> Iterator[tuple[Row, Row]]:
    return zip(results[one], results[other], strict=True)


def measured_on(report: Row) -> str:
    """Command, machine and versions of a result."""
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
        f"`{report['command']}`; {processor}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; {versions}."
    )


# --------------------------------------------------------------------------------------------------
# Serving


def lengths(row: Row) -> str:
    """Of a row's prompts and answers."""
    most = "up to " if row.get("ends_early") else ""
    return f"{row['prompt_tokens']:,} in, {most}{row['output_len']} out"


def load_of(row: Row) -> str:
    """The load that was offered."""
    return "all at once" if row["request_rate"] == "inf" else f"{row['request_rate']} requests/s"


def workload(row: Row) -> str:
    return f"{lengths(row)}, {load_of(row)}"


def sweep(rows: list[Row]) -> list[Row]:
    """Those of the workload that was offered at every load, by load; it comes first."""
    first = rows[0]["images"], rows[0]["output_len"]
    return [row for row in rows if (row["images"], row["output_len"]) == first]


def running(row: Row) -> float | None:
    """Sequences that run while others wait, median; None where too few wait for too short."""
    saturated = row.get("saturated", {"seconds": 0})
    return saturated["running"] if saturated["seconds"] >= LEAST_SATURATED_SECONDS else None


def more_running(stock: Row, ours: Row) -> float | None:
    """How many times as many sequences run, where both are saturated."""
    before, after = running(stock), running(ours)
    return after / before if before and after else None


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def throughput_table(results: dict[str, list[Row]]) -> str:
    header = ["workload", "requests", "stock tokens/s", "ours", "ratio", "stock running", "ours"]
    header += ["ratio"]
    header += [
        "stock answering, mean",
        "ours",
        "stock preemptions",
        "ours",
        "stock KV in use, most",
        "ours",
    ]
    return table(
        header,
        (
            [
                workload(ours),
                str(ours["num_prompts"]),
                f"{stock['output_throughput']:.1f}",
                f"{ours['output_throughput']:.1f}",
                f"{ours['output_throughput'] / stock['output_throughput']:.2f}",
                number(running(stock)),
                number(running(ours)),
                number(more_running(stock, ours)),
                f"{stock['mean_answering']:.1f}",
                f"{ours['mean_answering']:.1f}",
                f"{stock['preemptions']:g}",
                f"{ours['preemptions']:g}",
                f"{stock['most_kv_usage']:.0%}",
                f"{ours['most_kv_usage']:.0%}",
            ]
            for stock, ours in pairs(results, "stock", "ours")
        ),
    )


def latency_table(results: dict[str, list[Row]]) -> str:
    header = ["workload"]
    keys = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
    for name in ("TTFT p50, s", "TTFT p99, s", "ITL p50, ms", "ITL p99, ms"):
        header += [f"stock {name}", "ours"]
    rows = []
    for stock, ours in pairs(results, "stock", "ours"):
        cells = [workload(ours)]
        for key in keys:
            for row in (stock, ours):
                is_first = key.startswith("ttft")
                cells.append(f"{row[key] / 1000:.1f}" if is_first else f"{row[key]:.0f}")
        rows.append(cells)
    return table(header, rows)


def headline(results: dict[str, list[Row]]) -> str:
    """The README's table: the swept workload at the highest load."""
    stock, ours = (sweep(results[arm])[-1] for arm in ("stock", "ours"))
    forms = (
        ("output tokens per second", lambda row: f"{row['output_throughput']:.1f}"),
        ("sequences running, median while others wait", lambda row: number(running(row))),
        ("sequences answering, mean of the whole run", lambda row: f"{row['mean_answering']:.1f}"),
        ("time to first token, median", lambda row: f"{row['ttft_p50_ms'] / 1000:.1f} s"),
        ("inter-token latency, median", lambda row: f"{row['itl_p50_ms']:.1f} ms"),
        ("preemptions", lambda row: f"{row['preemptions']:g}"),
    )
    rows = ([name, form(stock), form(ours)] for name, form in forms)
    return table([workload(ours), "stock", "evicted"], rows)


# --------------------------------------------------------------------------------------------------
# One batch

TIMES = ("prefill", "decode", "end_to_end")


def ratio_of(stock: Row, ours: Row, name: str) -> float:
    """How many times faster ours is, median of the repeats: the two of one lie seconds apart."""
    return statistics.median(_ratios(stock, ours, name))


def ratio_range(stock: Row, ours: Row, name: str) -> str:
    """The lowest and the highest ratio of the repeats."""
    ratios = _ratios(stock, ours, name)
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _ratios(stock: Row, ours: Row, name: str) -> list[float]:
    both = zip(stock["repeats"][name], ours["repeats"][name], strict=True)
    return [one / other for one, other in both]


def decode_bound(stock: Row, ours: Row) -> float:
    """How many times fewer bytes a decode step reads."""
    return stock["decode_bytes"] / ours["decode_bytes"]


def batch_table(results: dict[str, list[Row]]) -> str:
    header = ["prompt tokens", "batch", "stock prefill, ms", "ours", "ratio", "stock decode, ms"]
    header += ["ours", "ratio", "of the repeats", "bound", "end to end, ratio", "of the repeats"]
    return table(
        header,
        (
            [
                f"{stock['prompt_tokens']:,}",
                str(stock["batch"]),
                f"{stock['prefill']:.0f}",
                f"{ours['prefill']:.0f}",
                f"{ratio_of(stock, ours, 'prefill'):.2f}",
                f"{stock['decode']:.1f}",
                f"{ours['decode']:.1f}",
                f"{ratio_of(stock, ours, 'decode'):.2f}",
                ratio_range(stock, ours, "decode"),
                f"{decode_bound(stock, ours):.2f}",
                f"{ratio_of(stock, ours, 'end_to_end'):.2f}",
                ratio_range(stock, ours, "end_to_end"),
            ]
            for stock, ours in pairs(results, "stock", "ours")
        ),
    )


def whole_table(results: dict[str, list[Row]]) -> str:
    header = ["prompt tokens", "batch"]
    for name in TIMES:
        header += [name.replace("_", " "), "of the repeats"]
    rows = []
    for stock, whole in pairs(results, "stock", "whole"):
        cells = [f"{stock['prompt_tokens']:,}", str(stock["batch"])]
        for name in TIMES:
            cells += [f"{ratio_of(stock, whole, name):.3f}", ratio_range(stock, whole, name)]
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
    for place, first in enumerate(results["stock"]):
        cells = [f"{first['prompt_tokens']:,}", str(first["batch"])]
        for name in engines:
            row = results[name][place]
            cells.append(f"{row['prefill']:.0f}, {row['decode']:.1f}, {row['end_to_end']:.0f} ms")
        rows.append(cells)
    return table(header, rows)


# --------------------------------------------------------------------------------------------------
# Steps in turns

ARMS = {"again": "stock, once more", "whole": "nothing evicted", "ours": "evicted"}


def turns_table(rows: list[Row]) -> str:
    header = ["step", "visual tokens", "batch", "beside stock", "stock, ms", "ms", "stock / this"]
    return table(
        [*header, "95 % interval", "steps"],
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


def in_turns(
    turns: Row, engine: str, step: str, least: float, visual_tokens: int = 0
) -> tuple[str, bool | str]:
    """What is said of rows whose ratios must all reach one, and the verdict."""
    rows = [
        row
        for row in turns["rows"]
        if (row["engine"], row["step"]) == (engine, step) and row["visual_tokens"] >= visual_tokens
    ]
    median, low = min(row["ratio"] for row in rows), min(row["interval"][0] for row in rows)
    said = f"{median:.3f}x at least, {low:.3f}x at an interval's lower end"
    return said, reached(median, low, least)


# --------------------------------------------------------------------------------------------------
# Our share of a step


def share(row: Row) -> float:
    """Of a step's time what is spent in our code."""
    return row["own_milliseconds"] / row["milliseconds"]


def overhead_table(rows: list[Row]) -> str:
    own = ["our code", "of this in the scheduler", "share"]
    return table(
        ["step", "budget", "visual tokens", "batch", "ms", *own],
        (
            [
                row["step"],
                f"{row['budget']:g}",
                f"{row['visual_tokens']:,}",
                str(row["batch"]),
                f"{row['milliseconds']:.1f}",
                f"{row['own_milliseconds']:.2f}",
                f"{row['scheduler_milliseconds']:.2f}",
                f"{share(row):.1%}",
            ]
            for row in rows
        ),
    )


# --------------------------------------------------------------------------------------------------
# Goals and losses


def verdict(met: bool | str | None) -> str:
    if isinstance(met, str):
        return met
    if met is None:
        return ""
    return "met" if met else "**missed**"


def reached(median: float, worst: float, least: float) -> bool | str:
    """Whether a ratio is reached.

    A median that reaches it while the worst does not resolves nothing: the noise is larger.
    """
    return worst >= least or ("medians only" if median >= least else False)


def at_least(ratios: list[list[float]], least: float) -> tuple[str, bool | str]:
    """What is said of rows' repeats that must all reach a ratio, and the verdict."""
    median, worst = min(map(statistics.median, ratios)), min(map(min, ratios))
    said = f"{median:.2f}x at least, {worst:.2f}x in the worst repeat"
    return said, reached(median, worst, least)


def goals(serving: Row, ample: Row | None, offline: Row, turns: Row, overhead: Row) -> str:
    """Each goal with what was measured; the comparison decides, not the writer."""
    shares = {
        step: max(share(row) for row in overhead["rows"] if row["step"] == step)
        for step in ("prefill", "decode")
    }
    idle = max(share(row) for row in overhead["rows"] if row["budget"] == 1.0)
    stock, ours = (sweep(serving["results"][arm])[-1] for arm in ("stock", "ours"))
    sequences = more_running(stock, ours)
    throughput = ours["output_throughput"] / stock["output_throughput"]
    lowest = ample and min(
        ours["output_throughput"] / stock["output_throughput"]
        for stock, ours in pairs(ample["results"], "stock", "ours")
    )
    rows = list(pairs(offline["results"], "stock", "ours"))
    long = [(stock, ours) for stock, ours in rows if stock["prompt_tokens"] >= 2000]
    of_bound = min(
        ratio_of(stock, ours, "decode") / decode_bound(stock, ours) for stock, ours in long
    )
    whole = [
        ratio_of(stock, whole, "end_to_end")
        for stock, whole in pairs(offline["results"], "stock", "whole")
    ]
    apart = max(abs(1 - ratio) for ratio in whole)
    found = (
        (
            f"limited pool, long answers ({workload(ours)}): at least 4x running sequences",
            f"{sequences:.1f}x" if sequences else NOT_MEASURED,
            sequences and sequences >= 4,
        ),
        ("the same: at least 1.8x output throughput", f"{throughput:.2f}x", throughput >= 1.8),
        (
            "ample pool: never below 0.98x of stock's output throughput",
            f"{lowest:.2f}x at least" if lowest else NOT_MEASURED,
            lowest and lowest >= 0.98,
        ),
        (
            "one batch, end to end: never below 0.98x of stock",
            *at_least([_ratios(stock, ours, "end_to_end") for stock, ours in rows], 0.98),
        ),
        (
            "decode at equal batch, prompts of 2K tokens and more: faster than stock",
            *in_turns(turns, "ours", "decode", 1.0, visual_tokens=2000),
        ),
        (
            "the same, whole batches: within 15 % of the bound by bytes",
            f"{of_bound:.0%} of it at least",
            of_bound >= 0.85,
        ),
        (
            "nothing evicted (budget 1.0): within 1 % of stock, end to end",
            f"{apart:.1%} apart at most",
            apart <= 0.01,
        ),
        *(
            (
                f"the same, {step} steps in turns: 1 % slower at most",
                *in_turns(turns, "whole", step, 0.99),
            )
            for step in ("prefill", "decode")
        ),
        (
            "the same, by the time spent in our code: within 1 %",
            f"{idle:.1%} of a step at most",
            idle <= 0.01,
        ),
        *(
            (
                f"our share of a {step} step: at most {most:.0%}",
                f"{shares[step]:.1%} at most",
                shares[step] <= most,
            )
            for step, most in (("prefill", 0.03), ("decode", 0.02))
        ),
    )
    return table(
        ["goal", "measured", ""], ([goal, said, verdict(met)] for goal, said, met in found)
    )


def losses(reports: dict[str, Row | None], offline: Row, turns: Row) -> str:
    """Every case in which stock vLLM is ahead, or nothing is gained."""
    found = []
    for about, report in reports.items():
        pool = "ample" if about == "ample" else "limited"
        for stock, ours in pairs(report["results"], "stock", "ours") if report else ():
            for name, key, unit in (
                ("output throughput", "output_throughput", "tokens/s"),
                *(
                    (f"{name.upper()} {percentile}", f"{name}_{percentile}_ms", "ms")
                    for name in ("ttft", "tpot", "itl", "e2el")
                    for percentile in ("p50", "p99")
                ),
            ):
                worse, better = sorted((ours[key], stock[key]), reverse=unit == "ms")
                if ours[key] == worse != better:
                    found.append(
                        f"- {pool} pool, {workload(ours)}: {name} {worse:.0f} against "
                        f"{better:.0f} {unit}"
                    )
    for engine, how in (("ours", ""), ("whole", ", nothing evicted")):
        for stock, ours in pairs(offline["results"], "stock", engine):
            for name in TIMES:
                ratio = ratio_of(stock, ours, name)
                if ratio < 1:
                    found.append(
                        f"- one batch of {stock['batch']}, {stock['prompt_tokens']:,} tokens{how}: "
                        f"{name.replace('_', ' ')} {1 / ratio:.2f} times stock's"
                    )
    for row in turns["rows"]:
        if row["engine"] in ("ours", "whole") and row["interval"][1] < 1:
            which = f"batch {row['batch']}, {row['visual_tokens']:,} visual tokens"
            found.append(
                f"- {which}, {ARMS[row['engine']]}: {row['step']} in turns "
                f"{1 / row['ratio']:.2f} times stock's"
            )
    return "\n".join(found) or "- none"


def page() -> str:
    """The page's text: the template with the tables."""
    reports = load_serving()
    serving, offline, overhead = reports["limited"], load("offline"), load("overhead")
    turns = load("turns")
    sections = {}
    for about, report in reports.items():
        sections[f"{about}_machine"] = measured_on(report) if report else NOT_MEASURED
        sections[f"{about}_throughput"] = throughput_table(report["results"]) if report else ""
        sections[f"{about}_latency"] = latency_table(report["results"]) if report else ""
    return Template(TEMPLATE.read_text()).substitute(
        policy=serving["policy"],
        budget=serving["budget"],
        goals=goals(serving, reports["ample"], offline, turns, overhead),
        blocks=serving["results"]["stock"][0]["num_blocks"],
        **sections,
        output_len=offline["output_len"],
        repeats=offline["repeats"],
        peer_repeats=offline["peer_repeats"],
        offline_machine=measured_on(offline),
        batch=batch_table(offline["results"]),
        whole=whole_table(offline["results"]),
        peers=peers_table(offline["results"]),
        turns=turns_table(turns["rows"]),
        turns_machine=measured_on(turns),
        overhead=overhead_table(overhead["rows"]),
        overhead_machine=measured_on(overhead),
        losses=losses(reports, offline, turns),
    )


def readme() -> str:
    """The README's text with its tables: each stands between comments that name it."""
    text = README.read_text()
    for name, rows in (
        ("headline", headline(load("serving")["results"])),
        ("overhead", overhead_table(load("overhead")["rows"])),
    ):
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = before + start + rows + end + rest.partition(end)[2]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for path, text in ((PAGE, page()), (README, readme())):
        if check and path.read_text() != text:
            sys.exit(f"{path.name} is not what the results say")
        path.write_text(text)


if __name__ == "__main__":
    main()
