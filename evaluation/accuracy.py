# SPDX-License-Identifier: Apache-2.0
"""Accuracy of policies at several budgets, measured through vLLM.

    python -m evaluation.accuracy --json benchmarks/results/accuracy.json
    python -m evaluation.accuracy --policies vlcache random vlcache:pooling=31,uniform_mix=0.8 \\
        --budgets 0.05 0.1 1.0 --tasks lookup row
    python -m evaluation.accuracy --model MODEL --data questions.jsonl --score anls
    python -m evaluation.accuracy --bench pretrained --policies vlcache-plus snapkv@0.1

By default the model is the embedded page reader and the data are its held-out pages. The bench
`pretrained` asks a pretrained language model about pages of prose, which reach it as image
embeddings (`evaluation.pretrained`); its tasks are named task/form. Each cell of the results
contains the mean score with its 95% interval and the fraction of the prompt's KV cache
that was kept (`retained`). If the visual tokens of the answer are known, it also contains the kept
fraction of them: averaged over layers and KV heads (`kept_answer`), and counting tokens kept by any
KV head of any layer (`reached_answer`).
"""

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.benches import (
    HYBRID_ENGINE,
    MODEL,
    READERS,
    Bench,
    ImageBench,
    PixelBench,
    PretrainedBench,
    add_case_arguments,
    bench_cases,
    pixel_model,
    pretrained_model,
)
from evaluation.cases import jsonl_cases
from evaluation.scoring import SCORES, interval
from testing.cli import make_parser, set_vllm_environment
from testing.results import to_json, write_report
from vl_cache_vllm.config import REQUEST_BUDGET, REQUEST_OPTIONS, KVCompressConfig
from vl_cache_vllm.policy import POLICIES

DEFAULT_BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.4, 1.0)
DEFAULT_POLICIES = tuple(POLICIES)
WINDOW = "vlcache:post_vision_only=false,max_observation_tokens=32"
# Two observation windows (post-vision queries, last 32 queries) times two kinds of layer budgets
# (from sparsity, uniform).
ABLATION = ("vlcache", "vlcache:uniform_mix=1.0", WINDOW, WINDOW + ",uniform_mix=1.0")
# Batches of requests for the engine: their ends leave it partly idle, their traces fill the disk.
BATCH = 1000
# Where the full cache scores less, a lost answer may be the model's fault rather than the policy's.
RELIABLE = 0.9
PRETRAINED_DEFAULTS = dict(
    budgets=[0.05, 0.1, 0.2, 1.0],
    dtype="bfloat16",
    max_model_len=4096,
    max_num_seqs=48,
    kv_cache_mib=4096,
    max_images=9,
)


@dataclass
class Cell:
    """The results of one policy at one budget on one task: one entry for each case."""

    scores: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    kept_answer: list[float] = field(default_factory=list)
    reached_answer: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        score, low, high = interval(self.scores, self.groups)
        result = {"score": score, "low": low, "high": high, "samples": len(self.scores)}
        for name in ("retained", "cached", "kept_answer", "reached_answer"):
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


def split_budget(text: str) -> tuple[str, float | None]:
    """A policy and its own budget, from ``policy`` or ``policy@budget``.

    Raises:
        ValueError: if the budget is not one.
    """
    policy, sign, budget = text.partition("@")
    try:
        return policy, _budget(budget) if sign else None
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _engine_arguments(
    bench: Bench, settings: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    arguments: dict[str, Any] = dict(
        model=bench.model,
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
    return arguments | bench.engine


def run(
    bench: Bench,
    cases: Sequence[Any],
    settings: dict[str, Any] | None,
    requests: Sequence[dict[str, Any]],
    options: argparse.Namespace,
) -> list[dict[str, Cell]]:
    """Run all cases with all settings of requests on one engine.

    The requests of a case follow each other, so that they share the prefill of the pages.

    Args:
        bench: of the cases.
        cases: the questions.
        settings: of KV compression; None stands for vLLM without eviction.
        requests: ``extra_args`` of the requests for each case; ``[{}]`` without eviction.
        options: of the command line.

    Returns:
        For each of ``requests``, cells by name.
    """
    # vLLM reads environment variables when it is imported, so `measure` sets them first.
    from vllm import SamplingParams

    from testing.engine import running_llm

    results: list[dict[str, Cell]] = [defaultdict(Cell) for _ in requests]
    jobs = [(case, i) for case in cases for i in range(len(requests))]
    with contextlib.ExitStack() as stack:
        trace = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "trace.jsonl"
        trace.touch()
        if settings is not None:
            settings = settings | {"trace": {"path": str(trace), "positions": True}}
        llm = stack.enter_context(running_llm(**_engine_arguments(bench, settings, options)))
        progress = tqdm(total=len(jobs), disable=options.quiet or None)
        for first in range(0, len(jobs), BATCH):
            batch = jobs[first : first + BATCH]
            sampling = [
                SamplingParams(
                    temperature=0, max_tokens=case.max_tokens, extra_args=requests[i] or None
                )
                for case, i in batch
            ]
            outputs = bench.outputs(llm, [case for case, _ in batch], sampling)
            answers = {
                output.request_id: bench.answer(case, output, llm)
                for (case, _), output in zip(batch, outputs, strict=True)
            }
            kept = dict(_read_kept(trace, answers))
            os.truncate(trace, 0)  # kept positions of all requests would take gigabytes
            for (case, i), output in zip(batch, outputs, strict=True):
                cell = results[i][case.cell]
                cell.scores.append(bench.score(case, output.outputs[0].text))
                cell.groups.append(case.group)
                prompt = len(output.prompt_token_ids or [])
                cell.cached.append((output.num_cached_tokens or 0) / prompt)
                retained, fractions = kept.get(output.request_id, (1.0, None))
                cell.retained.append(retained)
                if fractions is not None:
                    cell.kept_answer.append(fractions[0])
                    cell.reached_answer.append(fractions[1])
            progress.update(len(batch))
        progress.close()
    return results


def _read_kept(
    trace: Path, answers: dict[str, list[int]]
) -> Iterator[tuple[str, tuple[float, tuple[float, float] | None]]]:
    """For each evicted request: its id, and the kept fractions of its blocks and of its answer.

    Args:
        trace: the trace file. In it, a random suffix follows the ids of `LLM`.
        answers: prompt positions of the answers by request id; empty if unknown.
    """
    with trace.open() as lines:
        for line in lines:
            record = json.loads(line)
            if record["eviction"] > 1:  # of a request that is evicted again while it decodes
                continue
            request_id = record["request_id"].split("-")[0]
            positions = answers[request_id]
            kept = _kept_fraction(record, positions) if positions else None
            yield request_id, (record["kept_blocks"] / record["blocks"], kept)


def _kept_fraction(record: dict[str, Any], positions: Sequence[int]) -> tuple[float, float]:
    """Kept fraction of positions: the mean over layers and heads, and that kept by any head."""
    wanted = set(positions)
    tail = {position for position in wanted if position >= record["evicted_tokens"]}
    found = set(tail)
    fractions = []
    for layer in record["kept_positions"]:
        for head in layer:
            here = wanted.intersection(head) | tail
            found |= here
            fractions.append(len(here) / len(wanted))
    return sum(fractions) / len(fractions), len(found) / len(wanted)


def engines(policies: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Group policies into engines, so that the settings of a policy share the prefill of pages.

    Returns:
        For each engine its settings, and the ``kv_policy_options`` of each policy's requests.
        A policy with settings that no request may change has an engine of its own.
    """
    result: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for policy in policies:
        settings = parse_policy(policy)
        plain = {"policy": settings["policy"]}
        changes = {key: value for key, value in settings.items() if key != "policy"}
        config = KVCompressConfig.from_dict(plain)
        assert config is not None
        try:
            config.with_request_settings({REQUEST_OPTIONS: changes})
        except ValueError:
            result.append((settings, {policy: {}}))
            continue
        shared = next((options for engine, options in result if engine == plain), None)
        if shared is None:
            result.append((plain, {policy: changes}))
        else:
            shared[policy] = changes
    return result


def answered(cases: Sequence[Any], full: dict[str, Cell]) -> list[Any]:
    """The cases that the full cache answers right.

    Args:
        cases: all cases.
        full: the results of the full cache, by cell, in the order of the cases.
    """
    scores = {name: iter(cell.scores) for name, cell in full.items()}
    return [case for case in cases if next(scores[case.cell]) == 1.0]


def measure(options: argparse.Namespace, bench: Bench, cases: Sequence[Any]) -> dict[str, Any]:
    """Results of all policies: ``{policy: {budget: {cell: summary}}}``, the full cache first.

    A policy with budgets of its own is measured at these only. If the bench `counts_answered`, the
    policies get only the cases that the full cache answers.
    """
    offline = "1" if options.data is None else "0"
    set_vllm_environment(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE=offline)
    budgets = sorted({b for b in options.budgets if b < 1.0})
    jobs: list[tuple[dict[str, Any] | None, list[tuple[str, float, dict[str, Any]]]]] = []
    if 1.0 in options.budgets:
        jobs.append((None, [("full cache", 1.0, {})]))
    wanted: dict[str, list[float]] = defaultdict(list)
    for policy, budget in map(split_budget, options.policies):
        wanted[policy] += budgets if budget is None else [budget]
    for settings, changes in engines([policy for policy in wanted if wanted[policy]]):
        requests = [
            (policy, budget, {REQUEST_BUDGET: budget, REQUEST_OPTIONS: change})
            for policy, change in changes.items()
            for budget in wanted[policy]
        ]
        jobs.append((settings, requests))
    results: dict[str, Any] = {}
    for number, (settings, requests) in enumerate(jobs, 1):
        began = time.perf_counter()
        measured = run(bench, cases, settings, [extra for *_, extra in requests], options)
        if settings is None and bench.counts_answered:
            cases = answered(cases, measured[0])
        print(f"[{number}/{len(jobs)}] {time.perf_counter() - began:.0f} s")
        for (policy, budget, _), cells in zip(requests, measured, strict=True):
            summaries = {name: cell.summary() for name, cell in cells.items()}
            results.setdefault(policy, {})[str(budget)] = summaries
            scores = "  ".join(f"{name} {cell['score']:.3f}" for name, cell in summaries.items())
            print(f"  {policy} {budget:>4.0%}: {scores}", flush=True)
        if options.json:  # after each engine, because a run takes hours
            write(options, results)
    return results


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results to ``--json``."""
    split = options.split if options.data is None else str(options.data.name)
    write_report(
        options.json,
        "evaluation.accuracy",
        options.arguments,
        bench=options.bench,
        split=split,
        results=results,
    )


def merge(options: argparse.Namespace) -> dict[str, Any]:
    """The merged results of several result files; also written to ``--json``.

    Raises:
        ValueError: if the files belong to different benches, splits or data.
    """
    reports = [json.loads(path.read_text()) for path in options.report]
    if len({(report.get("bench"), report.get("split")) for report in reports}) > 1:
        raise ValueError(
            "--report: the files have different benches, splits or data and cannot be merged"
        )
    results: dict[str, Any] = {}
    for report in reports:
        for policy, cells in report["results"].items():
            earlier = results.get(policy, {})
            budgets = earlier | {b: earlier.get(b, {}) | by_task for b, by_task in cells.items()}
            results[policy] = dict(sorted(budgets.items(), key=lambda item: float(item[0])))
    if options.json:
        commands: list[str] = []
        for report in reports:  # which may be merged ones themselves
            own = report["command"]
            commands += [own] if isinstance(own, str) else own
        parts = {"command": commands, "results": results}
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


def is_reliable(results: dict[str, Any], cell: str) -> bool:
    """Whether the full cache reaches `RELIABLE` in a cell."""
    return results["full cache"]["1.0"][cell]["score"] >= RELIABLE


def markdown(results: dict[str, Any], budget: float) -> str:
    """Markdown tables of one budget: scores in percent, the full cache first.

    Each form of the pretrained bench has a table of its own. In them, an asterisk marks the cells
    that the model answers less often than `RELIABLE` with its full cache.
    """
    cells = next(iter(next(iter(results.values())).values()))
    forms: dict[str, list[str]] = defaultdict(list)
    for cell in cells:
        forms[cell.partition("/")[2]].append(cell)
    tables = []
    for form, names in forms.items():
        heads = [
            name.partition("/")[0] + (" *" if form and not is_reliable(results, name) else "")
            for name in names
        ]
        lines = [
            f"| {form} | ".replace("  ", " ") + " | ".join(heads) + " |",
            "| --- |" + " ---: |" * len(names),
        ]
        for policy, by_budget in results.items():
            found = by_budget.get("1.0" if policy == "full cache" else str(budget))
            if found and all(name in found for name in names):
                scores = " | ".join(f"{100 * found[name]['score']:.1f}" for name in names)
                lines.append(f"| {policy} | {scores} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot the score against the budget: a panel for each task, a line for each policy.

    The shaded areas are 95% intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    tasks = list(next(iter(next(iter(results.values())).values())))
    columns = min(6, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 3.4 * rows), sharey=True, squeeze=False
    )
    axes = panels.flatten()
    for unused in axes[len(tasks) :]:
        unused.set_axis_off()
    full = results.get("full cache", {}).get("1.0", {})
    budgets = sorted({float(b) for p, cells in results.items() if p != "full cache" for b in cells})
    for axis, task in zip(axes[: len(tasks)], tasks, strict=True):
        for policy, cells in results.items():
            if policy == "full cache":
                continue
            points = sorted((float(b), c[task]) for b, c in cells.items() if task in c)
            x = [b for b, _ in points]
            (line,) = axis.plot(x, [c["score"] for _, c in points], marker="o", ms=3, label=policy)
            low, high = ([c[side] for _, c in points] for side in ("low", "high"))
            axis.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        if task in full:
            # Policies that were asked fewer cases were asked those that the full cache answers.
            samples = {
                c[task]["samples"] for p in results.values() for c in p.values() if task in c
            }
            height = full[task]["score"] if len(samples) == 1 else 1.0
            axis.axhline(height, color="black", ls="--", lw=1, label="full cache")
        axis.set(title=task, xscale="log", xlabel="budget", ylim=(-0.02, 1.02))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_xticks(budgets)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("score")
    handles, labels = axes[0].get_legend_handles_labels()
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
    add(
        "--policies",
        nargs="+",
        default=list(DEFAULT_POLICIES),
        metavar="NAME[:KEY=VALUE,...][@BUDGET]",
        help="policies with their settings; with @BUDGET, measured at this budget only",
    )
    add(
        "--ablation",
        action="store_true",
        help="add the 2x2 ablation: observation windows x layer budgets",
    )
    add("--budgets", nargs="+", type=_budget, default=list(DEFAULT_BUDGETS))
    add_case_arguments(parser, split="test")
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
    if options.bench not in READERS:
        parser.set_defaults(**PRETRAINED_DEFAULTS)
        options = parser.parse_args(arguments)
    options.arguments = arguments
    try:
        results = merge(options) if options.report else measure(options, *_bench(parser, options))
    except ValueError as error:
        if options.report:
            parser.error(str(error))
        raise
    print(table(results) if options.markdown is None else markdown(results, options.markdown))
    if options.json or options.plot:
        plot(results, options.plot or options.json.with_suffix(".png"))


def _bench(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[Bench, Sequence[Any]]:
    """The bench of the command line with its cases."""
    if options.ablation:
        options.policies += [p for p in ABLATION if p not in options.policies]
    try:
        for policy in options.policies:
            parse_policy(split_budget(policy)[0])
        if options.bench != "page-reader":
            if options.data is not None or options.score is not None or options.model != MODEL:
                raise ValueError(f"--bench {options.bench} has its own model, data and scores")
            if options.bench in READERS:
                model = str(READERS[options.bench])
                return ImageBench(model, engine=HYBRID_ENGINE), bench_cases(options)
            if 1.0 not in options.budgets:
                raise ValueError(f"--bench {options.bench} needs budget 1.0: it chooses the cases")
            if options.bench == "pretrained-pixels":
                return PixelBench(pixel_model()), bench_cases(options)
            return PretrainedBench(pretrained_model()), bench_cases(options)
        bench = ImageBench(str(options.model), options.score)
        if options.data is not None:
            return bench, jsonl_cases(options.data, options.max_tokens)
        if options.model != MODEL:
            raise ValueError("--model needs --data: the built-in tasks are for the page reader")
        return bench, bench_cases(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
