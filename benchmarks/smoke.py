# SPDX-License-Identifier: Apache-2.0
"""First numbers of stock vLLM against eviction, same process, same pool, same requests.

    python -m benchmarks.smoke [--json [FILE]] [--budget 0.1] [--requests 24]

Prints the blocks of a request before and after eviction, the most sequences that ran at once,
output tokens per second, and the share of step time spent in our code. A small model with random
weights on a CPU: it shows that the mechanism works and what it costs, not what a GPU gains.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.own_time import own_time
from testing.results import describe_machine

BLOCK_SIZE = 32
POOL_BLOCKS = 160
OUTPUT_TOKENS = 128
QUESTION = "Describe everything that you can see in the picture, from left to right."


def measure(
    model: Path, kv_compress: dict[str, Any] | None, num_requests: int, trace: Path
) -> dict[str, Any]:
    """One engine over all requests; a warm-up request comes first."""
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
        "most_decoding_sequences": max(decoding),
        "mean_decoding_sequences": round(statistics.mean(decoding), 1),
        "share_of_step_time_in_our_code": round(clock.own / sum(step_seconds), 4),
    }
    if kv_compress is not None:
        record = json.loads(trace.read_text().splitlines()[-1])
        result |= {
            "prompt_tokens": record["prompt_tokens"],
            "blocks_before": record["prompt_blocks"],
            "blocks_after": record["kept_blocks"],
            "kept_tokens_per_layer": record["kept_tokens"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON")
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--requests", type=int, default=24)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from testing import tiny_models

    shape = {"num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "head_size": 64, "image_size": 448}
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("llava", Path(folder) / "llava", **shape)
        trace = Path(folder) / "trace.jsonl"
        settings = {"policy": "vlcache", "budget": args.budget, "trace": {"path": str(trace)}}
        stock = measure(model, None, args.requests, trace)
        ours = measure(model, settings, args.requests, trace)
    result = {
        "command": "python -m benchmarks.smoke " + " ".join(sys.argv[1:]),
        "machine": describe_machine(),
        "model": {"kind": "llava", **shape},
        "pool_blocks": POOL_BLOCKS,
        "block_size": BLOCK_SIZE,
        "requests": args.requests,
        "output_tokens_per_request": OUTPUT_TOKENS,
        "budget": args.budget,
        "stock": stock,
        "ours": ours,
    }
    text = json.dumps(result, indent=2)
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")
    if args.json == "-":
        print(text)
        return
    print(f"{'':38} {'stock':>10} {'ours':>10}")
    for key in stock:
        print(f"{key:38} {stock[key]:>10} {ours[key]:>10}")
    print(
        f"a prompt of {ours['prompt_tokens']} tokens: {ours['blocks_before']} blocks before, "
        f"{ours['blocks_after']} after eviction; tokens kept per layer: "
        f"{ours['kept_tokens_per_layer']}"
    )


if __name__ == "__main__":
    main()
