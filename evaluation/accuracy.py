# SPDX-License-Identifier: Apache-2.0
"""Accuracy of policies at several budgets, measured through vLLM.

    python -m evaluation.accuracy --json benchmarks/results/accuracy.json
    python -m evaluation.accuracy --policies vlcache random vlcache:pooling=31,uniform_mix=0.8 \\
        --budgets 0.05 0.1 1.0 --tasks lookup row
    python -m evaluation.accuracy --model MODEL --data questions.jsonl --score anls

By default the model is the embedded page reader and the data are its held-out pages. Each cell of
the results contains the mean score with its 95% interval and the fraction of the prompt's KV cache
that was kept (`retained`). If the visual tokens of the answer are known, it also contains the kept
fraction of them: averaged over layers and KV heads (`kept_answer`), and counting tokens kept by any
KV head of any layer (`reached_answer`).
"""

import argparse
import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.cases import SPLITS, Case, answer_positions, jsonl_cases, page_reader_cases
from evaluation.scoring import SCORES, interval
from testing.cli import make_parser, set_vllm_environment
from testing.results import to_json, write_report
from training.pages import TASKS
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.policy import POLICIES

MODEL = Path(__file__).parent.parent / "models" / "page-reader"
DEFAULT_BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)
DEFAULT_POLICIES = tuple(POLICIES)
WINDOW = "vlcache:post_vision_only=false,max_observation_tokens=32"
# Two observation windows (post-vision queries, last 32 queries) times two kinds of layer budgets
# (from sparsity, uniform).
ABLATION = ("vlcache", "vlcache:uniform_mix=1.0", WINDOW, WINDOW + ",uniform_mix=1.0")


@dataclass
class Cell:
    """The results of one policy at one budget on one task: one entry for each case."""

    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)
    kept_answer: list[float] = field(default_factory=list)
    reached_answer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        score, low, high = interval(self.scores, self.groups)
        result = {"score": score, "low": low, "high": high, "samples": len(self.scores)}
        for name in ("retained", "kept_answer", "reached_answer"):
            values = getattr(self, name)
            if values:
                result[name] = sum(values) / len(values)
        return {k: round(v, 4) for k, v in result.items()}


def parse_policy(text: str) -> dict[str, Any]:
    """Settings of `KVCompressConfig` from ``name`` or ``name:setting=value,...``.

    Raises:
        ValueError: for settings that are not valid.
    """
    name, _, values = text.partition(":")
    settings: dict[str, Any] = {"policy": name}
    for item in filter(None, values.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise ValueError(f"{text!r}: expected setting=value, got {item!r}")
        group, _, key = key.rpartition(".")
        target = settings.setdefault(group, {}) if group else settings
        try:
            target[key] = json.loads(value)
        except json.JSONDecodeError:
            target[key] = value
    if name == "none":
        raise ValueError("the full cache is measured with budget 1.0, not as a policy")
    KVCompressConfig.from_dict(settings)
    return settings


def _engine_arguments(
    model: str, settings: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(
        model=model,
        dtype=options.dtype,
        enforce_eager=True,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        limit_mm_per_prompt={"image": options.max_images},
        kv_cache_memory_bytes=options.kv_cache_mib << 20,
        additional_config={"kv_compress": settings} if settings else {},
    )
    if options.max_model_len:
        arguments["max_model_len"] = options.max_model_len
    return arguments


def run(
    model: str,
    cases: Sequence[Case],
    settings: dict[str, Any] | None,
    budgets: Sequence[float],
    options: argparse.Namespace,
) -> dict[float, dict[str, Cell]]:
    """Run all cases at all budgets with one engine.

    The budgets of a case follow each other, so that they share the prefill of the pages.

    Args:
        model: path or name.
        cases: the questions.
        settings: of KV compression; None stands for vLLM without eviction.
        budgets: of the requests.
        options: of the command line.

    Returns:
        Cells by budget and task.
    """
    # vLLM reads environment variables when it is imported, so `measure` sets them first.
    from vllm import SamplingParams

    from testing.engine import read_trace, running_llm

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trace = folder / "trace.jsonl"
        if settings is not None:
            settings = settings | {"trace": {"path": str(trace), "positions": True}}
        llm = stack.enter_context(running_llm(**_engine_arguments(model, settings, options)))
        jobs = [(case, budget) for case in cases for budget in budgets]
        outputs = llm.chat(
            [_conversation(case) for case, _ in jobs],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=case.max_tokens,
                    extra_args=None if settings is None else {"kv_budget": budget},
                )
                for case, budget in jobs
            ],
            use_tqdm=not options.quiet,
            chat_template_content_format="openai",
        )
        traces: dict[str, dict[str, Any]] = {}
        if settings is not None and trace.exists():
            traces = {key.split("-")[0]: record for key, record in read_trace(trace).items()}
        image_token = getattr(llm.model_config.hf_config, "image_token_index", None)
    cells: dict[float, dict[str, Cell]] = {budget: defaultdict(Cell) for budget in budgets}
    for (case, budget), output in zip(jobs, outputs, strict=True):
        cell = cells[budget][case.task]
        name = options.score or ("characters" if case.task == "dump" else "exact")
        cell.scores.append(SCORES[name](output.outputs[0].text, case.answers))
        cell.groups.append(case.group)
        record = traces.get(output.request_id)
        cell.retained.append(_retained(record))
        if record is not None and case.answer_cells and image_token is not None:
            positions = answer_positions(
                case.answer_cells, output.prompt_token_ids, image_token, len(case.load_images())
            )
            kept, reached = _kept_fraction(record, positions)
            cell.kept_answer.append(kept)
            cell.reached_answer.append(reached)
    return cells


def _conversation(case: Case) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [
        {"type": "image_pil", "image_pil": image} for image in case.load_images()
    ]
    content.append({"type": "text", "text": case.question})
    return [{"role": "user", "content": content}]


def _retained(record: dict[str, Any] | None) -> float:
    """Fraction of a prompt's blocks that was kept; 1 for a request that was not evicted."""
    return 1.0 if record is None else record["kept_blocks"] / record["prompt_blocks"]


def _kept_fraction(record: dict[str, Any], positions: Sequence[int]) -> tuple[float, float]:
    """Kept fraction of positions: the mean over layers and heads, and that kept by any head."""
    wanted = set(positions)
    found: set[int] = set()
    fractions = []
    for layer in record["kept_positions"]:
        for head in layer:
            here = wanted.intersection(head)
            found |= here
            fractions.append(len(here) / len(wanted))
    return sum(fractions) / len(fractions), len(found) / len(wanted)


def measure(options: argparse.Namespace, cases: Sequence[Case]) -> dict[str, Any]:
    """Results of all policies: ``{policy: {budget: {task: summary}}}``, the full cache first."""
    offline = "1" if options.model == MODEL else "0"
    set_vllm_environment(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE=offline)
    results: dict[str, Any] = {}
    budgets = sorted({b for b in options.budgets if b < 1.0})
    jobs: list[tuple[str, Sequence[float]]] = [("full cache", (1.0,))] * (1.0 in options.budgets)
    jobs += [(policy, budgets) for policy in options.policies if budgets]
    for number, (policy, job_budgets) in enumerate(jobs, 1):
        settings = None if policy == "full cache" else parse_policy(policy)
        began = time.perf_counter()
        cells = run(str(options.model), cases, settings, job_budgets, options)
        results[policy] = {
            str(budget): {task: cell.summary() for task, cell in by_task.items()}
            for budget, by_task in cells.items()
        }
        print(f"[{number}/{len(jobs)}] {policy} ({time.perf_counter() - began:.0f} s)")
        for budget, by_task in results[policy].items():
            scores = "  ".join(f"{task} {cell['score']:.3f}" for task, cell in by_task.items())
            print(f"  {float(budget):>4.0%}: {scores}", flush=True)
        if options.json:  # after each policy, because a run takes hours
            write(options, results)
    return results


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results to ``--json``."""
    split = options.split if options.data is None else str(options.data.name)
    write_report(
        options.json, "evaluation.accuracy", options.arguments, split=split, results=results
    )


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """The merged results of several result files; also written to ``--json``.

    Raises:
        ValueError: if the files belong to different splits or data.
    """
    reports = [json.loads(path.read_text()) for path in options.report]
    if len({report.get("split") for report in reports}) > 1:
        raise ValueError("--report: the files have different splits or data and cannot be merged")
    results: dict[str, Any] = {}
    for report in reports:
        for policy, cells in report["results"].items():
            budgets = results.setdefault(policy, {}) | cells
            results[policy] = dict(sorted(budgets.items(), key=lambda item: float(item[0])))
    if options.json:
        parts = {"command": [r["command"] for r in reports], "results": results}
        options.json.write_text(to_json(reports[0] | parts) + "\n")
    return results


def table(results: dict[str, Any]) -> str:
    """A text table for each task: score in percent ± half the interval, by policy and budget."""
    tasks = list(next(iter(next(iter(results.values())).values())))
    budgets = sorted({float(b) for cells in results.values() for b in cells})
    lines = []
    for task in tasks:
        lines += [f"\n{task}", f"{'policy':<44}" + "".join(f"{b:>16.0%}" for b in budgets)]
        for policy, cells in results.items():
            row = f"{policy:<44}"
            for budget in budgets:
                cell = cells.get(str(budget), {}).get(task)
                text = "-"
                if cell:
                    spread = 50 * (cell["high"] - cell["low"])
                    text = f"{100 * cell['score']:.1f} ±{spread:.1f}"
                row += f"{text:>16}"
            lines.append(row)
    return "\n".join(lines)


def markdown(results: dict[str, Any], budget: float) -> str:
    """A Markdown table of one budget: scores in percent, the full cache first."""
    tasks = list(next(iter(next(iter(results.values())).values())))
    lines = ["| | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
    for policy, cells in results.items():
        cell = cells.get("1.0" if policy == "full cache" else str(budget))
        if cell:
            scores = " | ".join(f"{100 * cell[task]['score']:.1f}" for task in tasks)
            lines.append(f"| {policy} | {scores} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the score against the budget: a panel for each task, a line for each policy.

    The shaded areas are 95% intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    tasks = list(next(iter(next(iter(results.values())).values())))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(3.2 * len(tasks), 3.4), sharey=True, squeeze=False
    )
    full = results.get("full cache", {}).get("1.0", {})
    budgets = sorted({float(b) for p, cells in results.items() if p != "full cache" for b in cells})
    for axis, task in zip(axes[0], tasks, strict=True):
        for policy, cells in results.items():
            if policy == "full cache":
                continue
            points = sorted((float(b), c[task]) for b, c in cells.items() if task in c)
            x = [b for b, _ in points]
            (line,) = axis.plot(x, [c["score"] for _, c in points], marker="o", ms=3, label=policy)
            low, high = ([c[side] for _, c in points] for side in ("low", "high"))
            axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        if task in full:
            axis.axhline(full[task]["score"], color="black", ls="--", lw=1, label="full cache")
        axis.set(title=task, xscale="log", xlabel="budget", ylim=(-0.02, 1.02))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xticks(budgets)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("score")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(4, len(labels)), frameon=False)
    figure.tight_layout(rect=(0, 0.09 + 0.06 * ((len(labels) - 1) // 4), 1, 1))
    figure.savefig(path, dpi=120)


def _budget(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(
            f"{text} is not a budget: a budget is a fraction of the KV cache above 0, at most 1"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--policies", nargs="+", default=list(DEFAULT_POLICIES), metavar="NAME[:KEY=VALUE,...]")
    add(
        "--ablation",
        action="store_true",
        help="add the 2x2 ablation: observation windows x layer budgets",
    )
    add("--budgets", nargs="+", type=_budget, default=list(DEFAULT_BUDGETS))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="of the page reader")
    add("--samples", type=int, default=500, help="cases per task of the page reader")
    add("--split", choices=SPLITS, default="test", help="tune: to choose settings; test: to report")
    add("--model", type=Path, default=MODEL, help="path or name of a model that vLLM serves")
    add("--data", type=Path, help='JSONL of {"images": [...], "question": ..., "answers": [...]}')
    add("--max-tokens", type=int, default=64, help="maximum output tokens for --data")
    add("--score", choices=sorted(SCORES), help="default: exact; characters for dumps")
    add("--plot", type=Path, metavar="FILE", help="default: the --json file with suffix .png")
    add(
        "--report",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing: merge and report earlier result files",
    )
    add(
        "--markdown",
        type=_budget,
        metavar="BUDGET",
        help="print the table of this budget as Markdown",
    )
    add("--dtype", default="auto")
    add("--block-size", type=int, default=32)
    add("--max-num-seqs", type=int, default=16)
    add("--max-model-len", type=int)
    add("--max-images", type=int, default=4)
    add("--kv-cache-mib", type=int, default=512)
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = arguments
    try:
        results = merge(options) if options.report else measure(options, _cases(parser, options))
    except ValueError as error:
        if options.report:
            parser.error(str(error))
        raise
    print(table(results) if options.markdown is None else markdown(results, options.markdown))
    if options.json or options.plot:
        plot(results, options.plot or options.json.with_suffix(".png"))


def _cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    if options.ablation:
        options.policies += [p for p in ABLATION if p not in options.policies]
    try:
        for policy in options.policies:
            parse_policy(policy)
        if options.data is not None:
            return jsonl_cases(options.data, options.max_tokens)
        if options.model != MODEL:
            raise ValueError("--model needs --data: the built-in tasks are for the page reader")
        return page_reader_cases(options.split, options.tasks, options.samples)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
