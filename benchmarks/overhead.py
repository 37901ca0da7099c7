# SPDX-License-Identifier: Apache-2.0
"""The overhead of eviction: the fraction of prefill and decode steps spent in this package's code.

    python -m benchmarks.overhead [--images 1 2 4 8] [--batch 8] [--budget 0.1 1.0] [--policy NAME]

An image has 1,024 visual tokens, and the observation window has 64 tokens. Each prompt is
prefilled in one step. With budget 1.0 nothing is evicted. The time includes this package's code in
the worker and in the scheduler, without the vLLM methods that it calls. ``--torch`` uses the torch
operations instead of the C++ ones. ``--stock`` also measures the steps of vLLM without eviction.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import shape
from benchmarks.own_time import SCHEDULER, Clock, own_time
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

QUESTION = "Describe everything that you can see in it."  # 64 tokens with the chat template
DECODE_STEPS = 24
REPEATS = 3
MAX_IMAGES = 16  # per batch: the KV cache holds no more


def steps_of(llm: Any, requests: list[Any], params: Any, clock: Clock) -> dict[str, list]:
    """Prefill the requests one by one, then decode them together.

    Returns:
        For ``prefill`` and ``decode``, a tuple for each step: seconds of the step, of this
        package's code in it, and of the part of that in the scheduler.
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


def measure(model: Path, settings: dict[str, Any] | None, options: Any) -> list[Row]:
    """Medians of one engine for each number of images and batch size."""
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
            for batch in sorted({1, options.batch}):
                if images * batch > MAX_IMAGES:
                    continue
                requests = [harness.image_request("llava", QUESTION, range(images))] * batch
                steps_of(llm, requests[:1], params, clock)  # warm-up and compilation
                runs = [steps_of(llm, requests, params, clock) for _ in range(REPEATS)]
                for kind in ("prefill", "decode"):
                    if kind == "prefill" and batch > 1:  # earlier requests decode in the same steps
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 2, 4, 8], help="images per prompt"
    )
    parser.add_argument("--batch", type=int, default=8, help="in addition to batches of 1")
    parser.add_argument("--policy", default="vlcache")
    parser.add_argument("--torch", action="store_true", help="use the torch operations")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--stock", action="store_true", help="also measure vLLM without eviction")
    options = parser.parse_args(arguments)
    set_vllm_environment()
    from vl_cache_vllm.ops import dispatch

    with tempfile.TemporaryDirectory() as folder, dispatch.use("torch" if options.torch else "cpp"):
        model = shape.build(Path(folder) / "model")
        rows = []
        for budget in options.budget:
            # The timed prefill contains the eviction, whatever the policy.
            settings = {"policy": options.policy, "budget": budget, "evict_after": 0}
            rows += measure(model, settings, options)
        stock = measure(model, None, options) if options.stock else []
    for row in rows:
        row["own_share"] = round(row["own_milliseconds"] / row["milliseconds"], 4)
        for other in stock:
            if all(row[key] == other[key] for key in ("step", "visual_tokens", "batch")):
                row["stock_milliseconds"] = other["milliseconds"]
    if options.json:
        write_report(options.json, "benchmarks.overhead", arguments, rows=rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
