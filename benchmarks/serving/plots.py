# SPDX-License-Identifier: Apache-2.0
"""The figure of a serving benchmark: throughput and latency against load, and one run over time.

python -m benchmarks.serving.plots RESULTS.json [FIGURE.png]
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.report import lengths, load_of, sweep
from testing.results import Row

COLORS = {"stock": "tab:gray", "ours": "tab:blue"}
NAMES = {"stock": "baseline", "ours": "eviction"}
Rows = dict[str, list[Row]]  # by arm


def _draw_load(axes: Any, results: Rows) -> None:
    """Three panels: output throughput, time to first token and inter-token latency."""
    columns = (
        ("output_throughput", "output tokens/s", False),
        ("ttft_p50_ms", "time to first token, ms", True),
        ("itl_p50_ms", "inter-token latency, ms", False),
    )
    for axis, (key, label, logarithmic) in zip(axes, columns, strict=True):
        for arm in results:
            rows = sweep(results[arm])
            loads = range(len(rows))
            axis.plot(loads, [row[key] for row in rows], "o-", color=COLORS[arm], label=NAMES[arm])
            axis.set_xticks(list(loads), [row["request_rate"] for row in rows])
        axis.set(xlabel="offered load, requests/s (inf: all at once)", ylabel=label + ", median")
        if key == "output_throughput":
            axis.set_ylabel(label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_title(lengths(results["ours"][0]), loc="left", fontsize=10)


def _draw_time(axes: Any, results: Rows) -> None:
    """Three panels: sequences and KV usage at the highest load; throughput of all workloads."""
    for arm in results:
        highest = sweep(results[arm])[-1]
        series = highest["series"]
        minutes = [seconds / 60 for seconds in series["seconds"]]
        axes[0].plot(minutes, series["running"], color=COLORS[arm], label=f"{NAMES[arm]}: running")
        label = f"{NAMES[arm]}: waiting"
        axes[0].plot(minutes, series["waiting"], color=COLORS[arm], ls=":", lw=1, label=label)
        axes[1].plot(minutes, [100 * usage for usage in series["kv_usage"]], color=COLORS[arm])
    axes[0].set(xlabel="minutes", ylabel="sequences", ylim=(0, None))
    axes[0].set_title(f"{lengths(highest)}, {load_of(highest)}", loc="left", fontsize=10)
    axes[0].legend(fontsize=8)
    axes[1].set(xlabel="minutes", ylabel="KV cache usage, %", ylim=(0, 105))
    for axis in axes[:2]:
        axis.grid(alpha=0.3)

    width = 0.8 / len(results)
    for offset, (arm, every) in enumerate(results.items()):
        rows = [row for row in every if row["request_rate"] == highest["request_rate"]]
        positions = [position + offset * width for position in range(len(rows))]
        heights = [row["output_throughput"] for row in rows]
        axes[2].bar(positions, heights, width, color=COLORS[arm])
    names = [lengths(row).replace(", ", "\n") for row in rows]
    axes[2].set_xticks([i + width / 2 for i in range(len(rows))], names, fontsize=7)
    axes[2].set(ylabel=f"output tokens/s, {load_of(highest)}")
    axes[2].grid(alpha=0.3, axis="y")


def draw(results: Rows, path: Path) -> None:
    """Write the figure as PNG.

    Args:
        results: rows by arm, as in the JSON of `benchmarks.serving`.
        path: of the file; its folder is created.
    """
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
