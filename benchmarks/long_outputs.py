# SPDX-License-Identifier: Apache-2.0
"""Long outputs in a pool that limits vLLM: evict prompts, running requests, or answers as well.

    python -m benchmarks.long_outputs [--output-len 2048 4096] [--requests 12] [--every 256]

Every engine gets the same requests at once: about 1,100 prompt tokens of one image, and outputs of
exactly the requested length. It has room for the full cache of three of them. The engines run one
after the other in this process, each after a warm-up request:

- "stock": vLLM without eviction
- "always": evicts prompts
- "pressure": evicts while blocks are scarce, running requests too
- "pressure-every": the same, and evicts answers again and again

The model is small and has random weights, so only speeds and blocks have a meaning.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, make_report, to_json

BLOCK_SIZE = 32
IMAGE_SIZE = 448  # 1,024 visual tokens
FULL_REQUESTS = 3  # whose full caches fill the pool
BUDGET = 0.1
QUESTION = "Describe everything that you can see in the picture, from left to right."
SHAPE = {"num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "head_size": 64}


def arms(every: int) -> dict[str, dict[str, Any] | None]:
    """Settings of each engine; None: vLLM without eviction."""
    base = {"policy": "vlcache-plus", "budget": BUDGET}
    pressure = {**base, "when": "pressure"}
    return {
        "stock": None,
        "always": base,
        "pressure": pressure,
        "pressure-every": {**pressure, "every": every},
    }


def measure(
    model: Path, settings: dict[str, Any] | None, output_len: int, num_requests: int
) -> Row:
    """Run one engine over all requests."""
    from testing import engine as harness

    prompt_tokens = (IMAGE_SIZE // 14) ** 2 + 80
    pool_blocks = FULL_REQUESTS * -(-(prompt_tokens + output_len) // BLOCK_SIZE) + 1
    requests = [harness.image_request("llava", QUESTION, [n]) for n in range(num_requests + 1)]
    params = harness.greedy(output_len, logprobs=None)
    params.ignore_eos = True
    with harness.engine(
        model,
        settings,
        num_gpu_blocks_override=pool_blocks,
        max_model_len=prompt_tokens + output_len + BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    ) as llm:
        warm_up = harness.greedy(8, logprobs=None)
        llm.generate([requests.pop()], warm_up, use_tqdm=False)
        scheduler = harness.scheduler(llm)
        last: dict[str, float] = {}  # when each request got its latest token
        generated: dict[str, int] = {}
        gaps: list[float] = []
        preemptions: dict[str, int] = {}
        running: list[int] = []  # in each step
        usage = 0.0
        # Durations of steps, which delay every request of the batch, without and with an eviction.
        steps: dict[bool, list[float]] = {False: [], True: []}
        evictions = 0
        for number, request in enumerate(requests):
            llm.llm_engine.add_request(str(number), request, params)
        start = time.perf_counter()
        while llm.llm_engine.has_unfinished_requests():
            began = time.perf_counter()
            outputs = llm.llm_engine.step()
            now = time.perf_counter()
            if settings is not None:
                before, evictions = evictions, scheduler.eviction_stats.evictions.total()
                if all(len(output.outputs[0].token_ids) > 1 for output in outputs):  # no prefill
                    steps[evictions > before].append(now - began)
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                if count > generated.get(output.request_id, 0):
                    if output.request_id in last:
                        gaps.append(now - last[output.request_id])
                    last[output.request_id], generated[output.request_id] = now, count
            running.append(len(scheduler.running))
            usage = max(usage, scheduler.kv_cache_manager.usage)
            for one in scheduler.requests.values():
                preemptions[one.request_id] = one.num_preemptions
        seconds = time.perf_counter() - start
        assert sum(generated.values()) == num_requests * output_len
        percentiles = statistics.quantiles(gaps, n=100)
        row: Row = {
            "output_len": output_len,
            "requests": num_requests,
            "pool_blocks": pool_blocks,
            "seconds": round(seconds, 1),
            "output_throughput": round(num_requests * output_len / seconds, 1),
            "running": round(statistics.mean(running), 2),
            "most_running": max(running),
            "preemptions": sum(preemptions.values()),
            "itl_p50_ms": round(1000 * percentiles[49], 1),
            "itl_p99_ms": round(1000 * percentiles[98], 1),
            "most_kv_usage": round(usage, 3),
        }
        if settings is not None:
            stats = harness.eviction_stats(llm)
            row["evictions"] = {name: stats.evictions[name] for name in sorted(stats.evictions)}
            for name, durations in zip(
                ("step_p50_ms", "eviction_step_p50_ms"), steps.values(), strict=True
            ):
                row[name] = round(1000 * statistics.median(durations), 1) if durations else None
        return row


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| output tokens | engine | tokens/s | running | preemptions | evictions | ITL p50, p99 |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, row in rows:
        evictions = ", ".join(f"{n} {trigger}" for trigger, n in row.get("evictions", {}).items())
        lines.append(
            f"| {row['output_len']:,} | {name} | {row['output_throughput']:.1f} "
            f"| {row['running']:.1f} | {row['preemptions']} | {evictions or '-'} "
            f"| {row['itl_p50_ms']:.0f}, {row['itl_p99_ms']:.0f} ms |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = make_parser(__doc__)
    parser.add_argument("--output-len", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--every", type=int, default=256, help="generated tokens between evictions")
    parser.add_argument("--arms", nargs="+", default=[*arms(1)], choices=[*arms(1)])
    options = parser.parse_args(arguments)
    set_vllm_environment()
    from testing import tiny_models

    rows: list[tuple[str, Row]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("llava", Path(folder) / "llava", image_size=IMAGE_SIZE, **SHAPE)
        for output_len in options.output_len:
            for name in options.arms:
                row = measure(model, arms(options.every)[name], output_len, options.requests)
                rows.append((name, row))
                print(f"{name}: {row}", flush=True)
                if options.json:
                    results: dict[str, list[Row]] = {}
                    for arm, one in rows:
                        results.setdefault(arm, []).append(one)
                    report = make_report(
                        "benchmarks.long_outputs",
                        arguments,
                        model={"kind": "llava", "image_size": IMAGE_SIZE, **SHAPE},
                        block_size=BLOCK_SIZE,
                        budget=BUDGET,
                        every=options.every,
                        results=results,
                    )
                    options.json.write_text(to_json(report) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
