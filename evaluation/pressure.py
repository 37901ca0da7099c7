# SPDX-License-Identifier: Apache-2.0
"""``--kv-compress-when`` at growing load: what it keeps of accuracy and of capacity.

    python -m evaluation.pressure [--json OUT] [--concurrency 1 2 4 8 16 32] [--requests 200]

So many clients ask the embedded page reader, each its next question when its last is answered, in
a small block pool: stock vLLM, then eviction always and under pressure. Every question is about
other pages (tuning split, all tasks), so that nothing is shared. Of each: the score, the share of
requests that were evicted, requests and output tokens per second, the median time to an answer,
and the most sequences that decoded at once.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluation.accuracy import MODEL, parse_policy
from evaluation.cases import Case, page_reader_cases
from evaluation.scoring import SCORES
from testing.results import write_report

MODES = ("stock", "always", "pressure")
TASKS = ("lookup", "row", "which", "hop", "dump")


def serve(llm: Any, cases: Iterator[Case], clients: int, num_requests: int) -> dict[str, float]:
    """Answer so many cases with so many clients; the figures of a table's row."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler

    def num_evicted() -> int:
        stats = getattr(scheduler, "eviction_stats", None)
        return stats.evicted if stats else 0

    evicted_before = num_evicted()
    tokenizer = llm.get_tokenizer()
    asked: dict[str, tuple[Case, float]] = {}
    scores: list[float] = []
    seconds: list[float] = []
    tokens = most = 0
    ids = map(str, itertools.count())
    start = time.perf_counter()
    while len(scores) < num_requests:
        while len(asked) < min(clients, num_requests - len(scores)):
            case, request_id = next(cases), next(ids)
            content = [{"type": "image"} for _ in case.load_images()]
            content.append({"type": "text", "text": case.question})
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            engine.add_request(
                request_id,
                {"prompt": prompt, "multi_modal_data": {"image": case.load_images()}},
                SamplingParams(temperature=0, max_tokens=case.max_tokens),
            )
            asked[request_id] = case, time.perf_counter()
        for output in engine.step():
            if not output.finished:
                continue
            case, began = asked.pop(output.request_id)
            seconds.append(time.perf_counter() - began)
            answer = output.outputs[0]
            tokens += len(answer.token_ids)
            score = SCORES["characters" if case.task == "dump" else "exact"]
            scores.append(score(answer.text, case.answers))
        most = max(most, sum(r.num_output_tokens > 0 for r in scheduler.running))
    elapsed = time.perf_counter() - start
    evicted = num_evicted() - evicted_before
    return {
        "score": statistics.mean(scores),
        "evicted": evicted / num_requests,
        "requests_per_second": num_requests / elapsed,
        "output_tokens_per_second": tokens / elapsed,
        "median_seconds": statistics.median(seconds),
        "most_decoding": most,
    }


def questions(count: int) -> list[Case]:
    """So many cases, equally of all tasks, each of another document."""
    by_group: dict[str, dict[str, Case]] = {}
    for case in page_reader_cases("tune", TASKS, 4 * count):
        by_group.setdefault(case.group, {}).setdefault(case.task, case)
    asked: Counter[str] = Counter()
    chosen = []
    for possible in itertools.islice(by_group.values(), count):
        task = min(possible, key=lambda task: asked[task])
        asked[task] += 1
        chosen.append(possible[task])
    return chosen


def measure(options: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by mode and number of clients."""
    from testing.engine import running_llm

    cases = questions(options.requests)
    for case in cases:
        case.load_images()  # drawn before the clock starts
    results: dict[str, dict[str, dict[str, float]]] = {}
    for mode in MODES:
        settings = None
        if mode != "stock":
            settings = parse_policy(options.policy) | {"budget": options.budget, "when": mode}
        with running_llm(
            model=str(MODEL),
            dtype="auto",
            enforce_eager=True,
            block_size=options.block_size,
            max_num_seqs=max(options.concurrency),
            limit_mm_per_prompt={"image": 4},
            mm_processor_cache_gb=0,  # or the first row alone would pay for the images
            kv_cache_memory_bytes=64 << 20,
            num_gpu_blocks_override=options.pool_blocks,
            additional_config={"kv_compress": settings} if settings else {},
        ) as llm:
            serve(llm, iter(cases), 4, min(8, options.requests))  # warm-up
            results[mode] = {}
            for clients in options.concurrency:
                llm.reset_prefix_cache()
                figures = serve(llm, itertools.cycle(cases), clients, options.requests)
                results[mode][str(clients)] = figures
                print(row(mode, clients, figures), flush=True)
    return results


def row(mode: str, clients: int, figures: dict[str, float]) -> str:
    return (
        f"{mode:<10}{clients:>8}{100 * figures['score']:>8.1f}{figures['evicted']:>9.0%}"
        f"{figures['requests_per_second']:>9.1f}{figures['output_tokens_per_second']:>9.0f}"
        f"{1000 * figures['median_seconds']:>9.0f}{figures['most_decoding']:>9}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--policy", default="vlcache-plus", metavar="NAME[:KEY=VALUE,...]")
    add("--budget", type=float, default=0.1)
    add("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="clients")
    add("--requests", type=int, default=200, help="of each row")
    add("--pool-blocks", type=int, default=200)
    add("--block-size", type=int, default=32)
    add("--json", type=Path, metavar="OUT", help="write the results here")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(
        f"{'':<10}{'clients':>8}{'score':>8}{'evicted':>9}{'req/s':>9}{'tok/s':>9}{'ms':>9}"
        f"{'decoding':>9}"
    )
    results = measure(options)
    if options.json:
        write_report(options.json, "evaluation.pressure", arguments, results=results)


if __name__ == "__main__":
    main()
