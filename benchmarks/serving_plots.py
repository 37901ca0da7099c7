# SPDX-License-Identifier: Apache-2.0
"""The figure of a serving benchmark: throughput against load, and one run over time.

python -m benchmarks.serving_plots RESULTS.json [FIGURE.png]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"stock": "tab:gray", "ours": "tab:blue"}
Rows = dict[str, list[dict[str, Any]]]


def workload(row: dict[str, Any]) -> str:
    """A short name of a row's prompts and answers."""
    return f"{row['prompt_tokens']:,} in, {row['output_len']} out"


def _same(row: dict[str, Any], other: dict[str, Any], *keys: str) -> bool:
    return all(row[key] == other[key] for key in keys)


def _sweep(results: Rows, arm: str) -> list[dict[str, Any]]:
    """The rows of the swept workload, by load."""
    rows = results[arm]
    return [row for row in rows if _same(row, rows[0], "images", "output_len")]


def _draw_load(axes: Any, results: Rows) -> None:
    """Columns: output throughput, time to first token, inter-token latency."""
    columns = (
        ("output_throughput", "output tokens/s", False),
        ("ttft_p50_ms", "time to first token, ms", True),
        ("itl_p50_ms", "inter-token latency, ms", False),
    )
    for axis, (key, label, logarithmic) in zip(axes, columns, strict=True):
        for arm in results:
            rows = _sweep(results, arm)
            loads = range(len(rows))
            axis.plot(loads, [row[key] for row in rows], "o-", color=COLORS[arm], label=arm)
            axis.set_xticks(list(loads), [row["request_rate"] for row in rows])
        axis.set(xlabel="offered load, requests/s (inf: all at once)", ylabel=label + ", median")
        if key == "output_throughput":
            axis.set_ylabel(label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_title(workload(results["ours"][0]), loc="left", fontsize=10)


def _draw_time(axes: Any, results: Rows) -> None:
    """Columns: sequences, KV usage of the sweep's highest load; throughput of all workloads."""
    for arm in results:
        series = _sweep(results, arm)[-1]["series"]
        minutes = [seconds / 60 for seconds in series["seconds"]]
        axes[0].plot(minutes, series["running"], color=COLORS[arm], label=f"{arm}: running")
        axes[0].plot(
            minutes, series["waiting"], color=COLORS[arm], ls=":", lw=1, label=f"{arm}: waiting"
        )
        axes[1].plot(minutes, [100 * usage for usage in series["kv_usage"]], color=COLORS[arm])
    axes[0].set(xlabel="minutes", ylabel="sequences", ylim=(0, None))
    axes[0].set_title("all requests at once", loc="left", fontsize=10)
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="minutes", ylabel="KV cache in use, %", ylim=(0, 105))
    for axis in axes[:2]:
        axis.grid(alpha=0.3)

    highest = [
        row for row in results["ours"] if _same(row, _sweep(results, "ours")[-1], "request_rate")
    ]
    width = 0.8 / len(results)
    for offset, arm in enumerate(results):
        for place, ours in enumerate(highest):
            row = next(
                row
                for row in results[arm]
                if _same(row, ours, "images", "output_len", "request_rate")
            )
            axes[2].bar(place + offset * width, row["output_throughput"], width, color=COLORS[arm])
    names = [workload(row).replace(", ", "\n") for row in highest]
    axes[2].set_xticks([place + width / 2 for place in range(len(highest))], names, fontsize=7)
    axes[2].set(ylabel="output tokens/s, all at once")
    axes[2].grid(alpha=0.3, axis="y")


def draw(results: Rows, path: Path) -> None:
    """Write the figure as PNG."""
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    _draw_load(axes[0], results)
    _draw_time(axes[1], results)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", ncols=len(labels), frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    source = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".png")
    draw(json.loads(source.read_text())["results"], target)


if __name__ == "__main__":
    main()
