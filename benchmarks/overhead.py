# SPDX-License-Identifier: Apache-2.0
"""What eviction itself costs: the share of prefill and decode steps that is spent in our code.

    python -m benchmarks.overhead [--images 1 2 4 8] [--batch 8] [--budget 0.1 1.0] [--json FILE]

One image is 1,024 visual tokens; the question after them has 64 observed tokens. Every prompt is
read in one step. At budget 1.0 nothing is evicted. Our code is that in the worker and in the
scheduler, without what it calls of vLLM's. ``--torch`` measures the torch operations in
place of the C++ ones, ``--stock`` stock vLLM's steps, too.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks import shape
from benchmarks.own_time import SCHEDULER, Clock, own_time
from testing.results import write_report

QUESTION = "Describe everything that you can see in it."  # 64 tokens with the template's
DECODE_STEPS = 24
REPEATS = 3


def steps_of(llm: Any, requests: list[Any], params: Any, clock: Clock) -> dict[str, list]:
    """Seconds of each step, of our code in it and of that in the scheduler.

    Prefills one by one, then decoding together.
    """
    engine = llm.llm_engine
    found: dict[str, list] = {"prefill": [], "decode": []}

    def step(kind: str) -> None:
        clock.reset()
        began = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - began
        found[kind].append((whole, clock.own, clock.seconds[SCHEDULER]))

    for number, request in enumerate(requests):
        engine.add_request(str(number), request, params)
        step("prefill")
    for _ in range(DECODE_STEPS):
        step("decode")
    engine.abort_request([str(number) for number in range(len(requests))])
    engine.step()
    return found


def measure(model: Path, settings: dict[str, Any] | None, options: Any) -> list[dict[str, Any]]:
    """One engine; medians of each number of images and batch."""
    from testing import engine as harness

    params = harness.greedy(DECODE_STEPS + 8, logprobs=None)
    rows = []
    with (
        own_time() as clock,
        harness.engine(
            model,
            settings,
            dtype="bfloat16",
            load_format="dummy",
            enforce_eager=False,
            enable_prefix_caching=False,
            max_model_len=16384,
            max_num_batched_tokens=16384,
            kv_cache_memory_bytes=2 << 30,
            limit_mm_per_prompt={"image": max(options.images)},
        ) as llm,
    ):
        for images in options.images:
            for batch in (1, options.batch):
                if images * batch > 16:  # the cache and the patience end
                    continue
                requests = [harness.image_request("llava", QUESTION, range(images))] * batch
                steps_of(llm, requests[:1], params, clock)  # compiled and warm
                runs = [steps_of(llm, requests, params, clock) for _ in range(REPEATS)]
                for kind in ("prefill", "decode"):
                    if kind == "prefill" and batch > 1:  # earlier requests decode in it
                        continue
                    steps = [step for run in runs for step in run[kind]]
                    whole, own, scheduler = map(statistics.median, zip(*steps, strict=True))
                    rows.append(
                        {
                            "step": kind,
                            "budget": settings and settings["budget"],
                            "visual_tokens": images * shape.VISUAL_TOKENS,
                            "batch": batch,
                            "milliseconds": round(1000 * whole, 2),
                            "own_milliseconds": round(1000 * own, 3),
                            "scheduler_milliseconds": round(1000 * scheduler, 3),
                        }
                    )
                    print(settings and settings["policy"], rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--torch", action="store_true", help="without the C++ operators")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--stock", action="store_true", help="also without eviction")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    from vl_cache_vllm.ops import dispatch

    with tempfile.TemporaryDirectory() as folder, dispatch.use("torch" if options.torch else "cpp"):
        model = shape.build(Path(folder) / "model")
        rows = [
            row
            for budget in options.budget
            for row in measure(model, {"policy": "vlcache", "budget": budget}, options)
        ]
        stock = measure(model, None, options) if options.stock else []
    for row in rows:
        row["own_share"] = round(row["own_milliseconds"] / row["milliseconds"], 4)
        for other in stock:
            if all(row[key] == other[key] for key in ("step", "visual_tokens", "batch")):
                row["stock_milliseconds"] = other["milliseconds"]
    if options.json:
        write_report(options.json, "benchmarks.overhead", sys.argv[1:], rows=rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
