# SPDX-License-Identifier: Apache-2.0
"""A quick comparison of vLLM without and with eviction: one process, one pool, equal requests.

    python -m benchmarks.smoke [--json [FILE]] [--budget 0.1] [--requests 24]

Prints the blocks of a request before and after eviction, the maximum number of decoding sequences,
output tokens per second and the fraction of step time spent in this package's code. The model is
small and has random weights. On a CPU this shows that the mechanism works and what it costs, not
the gain on a GPU.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.own_time import own_time
from testing.cli import make_parser, set_vllm_environment
from testing.results import make_report, to_json

BLOCK_SIZE = 32
POOL_BLOCKS = 160
OUTPUT_TOKENS = 128
QUESTION = "Describe everything that you can see in the picture, from left to right."


def measure(
    model: Path, kv_compress: dict[str, Any] | None, num_requests: int, trace: Path
) -> dict[str, Any]:
    """Run one engine over all requests, after a warm-up request."""
    from testing import engine as harness

    requests = [
        harness.image_request("llava", QUESTION, [seed]) for seed in range(num_requests + 1)
    ]
    params = harness.greedy(OUTPUT_TOKENS, logprobs=None)
    with (
        own_time() as clock,
        harness.engine(
            model,
            kv_compress,
            num_gpu_blocks_override=POOL_BLOCKS,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
        ) as llm,
    ):
        llm.generate([requests.pop()], params, use_tqdm=False)
        clock.reset()
        decoding: list[int] = []
        step_seconds: list[float] = []
        tokens = 0
        for i, request in enumerate(requests):
            llm.llm_engine.add_request(str(i), request, params)
        start = time.perf_counter()
        while llm.llm_engine.has_unfinished_requests():
            step_start = time.perf_counter()
            outputs = llm.llm_engine.step()
            step_seconds.append(time.perf_counter() - step_start)
            decoding.append(sum(r.num_output_tokens > 0 for r in harness.scheduler(llm).running))
            tokens += sum(len(o.outputs[0].token_ids) for o in outputs if o.finished)
        elapsed = time.perf_counter() - start
    result = {
        "output_tokens_per_second": round(tokens / elapsed, 1),
        "seconds": round(elapsed, 2),
        "steps": len(step_seconds),
        "step_milliseconds_median": round(1000 * statistics.median(step_seconds), 2),
        "max_decoding_sequences": max(decoding),
        "mean_decoding_sequences": round(statistics.mean(decoding), 1),
        "fraction_of_step_time_in_own_code": round(clock.own / sum(step_seconds), 4),
    }
    if kv_compress is not None:
        record = json.loads(trace.read_text().splitlines()[-1])
        result |= {
            "prompt_tokens": record["tokens"],
            "blocks_before": record["blocks"],
            "blocks_after": record["kept_blocks"],
            "kept_tokens_per_layer": record["kept_tokens"],
        }
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write JSON; by default print it"
    )
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--requests", type=int, default=24)
    options = parser.parse_args(arguments)
    set_vllm_environment()
    from testing import tiny_models

    shape = {"num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "head_size": 64, "image_size": 448}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("llava", Path(folder) / "llava", **shape)
        trace = Path(folder) / "trace.jsonl"
        settings = {"policy": "vlcache", "budget": options.budget, "trace": {"path": str(trace)}}
        baseline = measure(model, None, options.requests, trace)
        eviction = measure(model, settings, options.requests, trace)
    report = make_report(
        "benchmarks.smoke",
        arguments,
        model={"kind": "llava", **shape},
        pool_blocks=POOL_BLOCKS,
        block_size=BLOCK_SIZE,
        requests=options.requests,
        output_tokens_per_request=OUTPUT_TOKENS,
        budget=options.budget,
        stock=baseline,
        ours=eviction,
    )
    if options.json and options.json != "-":
        Path(options.json).write_text(to_json(report) + "\n")
    if options.json == "-":
        print(to_json(report))
        return
    print(f"{'':38} {'baseline':>10} {'eviction':>10}")
    for key in baseline:
        print(f"{key:38} {baseline[key]:>10} {eviction[key]:>10}")
    print(
        f"prompt of {eviction['prompt_tokens']} tokens: {eviction['blocks_before']} blocks before "
        f"eviction, {eviction['blocks_after']} after; tokens kept per layer: "
        f"{eviction['kept_tokens_per_layer']}"
    )


if __name__ == "__main__":
    main()
