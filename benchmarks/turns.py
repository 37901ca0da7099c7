# SPDX-License-Identifier: Apache-2.0
"""Steps of stock vLLM and of ours in turns: differences smaller than a machine's moods.

    python -m benchmarks.turns [--images 1 2 4] [--batch 1 8] [--decode-steps 400] [--json FILE]

The engines, all in this process, where they share their threads:

    stock   vLLM
    again   stock vLLM once more: what this method can tell apart
    whole   vLLM with --kv-compress POLICY and budget 1.0, where nothing is evicted
    ours    the same with a budget

All hold the same requests, and each does a step before any does its next one, in an order that is
drawn anew for each step. A ratio is stock's time over another engine's of the same step; reported
are the medians of these ratios with their 95 % intervals, by order statistics. Whole batches, with
their bounds, are `benchmarks.offline`'s; what is spent in our code, `benchmarks.overhead`'s.
"""

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import offline, shape
from testing.results import write_report

STOCK, OTHERS = "stock", ("again", "whole", "ours")

Row = dict[str, Any]
Times = dict[str, list[float]]  # of each engine, seconds of its steps


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Between which the median lies with 95 % confidence; of fewer than six values, their range."""
    ordered = sorted(values)
    middle, reach = (len(ordered) - 1) / 2, 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(middle - reach))
    return ordered[low], ordered[len(ordered) - 1 - low]


def compare(times: Times, **which: Any) -> list[Row]:
    """Rows of the engines other than stock vLLM, the first one, from times of the same steps."""
    rows = []
    for engine in list(times)[1:]:
        ratios = [s / t for s, t in zip(times[STOCK], times[engine], strict=True)]
        low, high = interval(ratios)
        row = {
            **which,
            "engine": engine,
            "stock_milliseconds": round(1000 * statistics.median(times[STOCK]), 3),
            "milliseconds": round(1000 * statistics.median(times[engine]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "interval": [round(low, 4), round(high, 4)],
            "steps": len(ratios),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


class Turns:
    """Engines that do the same steps, one after the other."""

    def __init__(self, engines: dict[str, Any]) -> None:
        self._engines = engines
        self._order = random.Random(0)

    def _step(self, times: Times) -> None:
        for name in self._order.sample(list(self._engines), len(self._engines)):
            began = time.perf_counter()
            self._engines[name].step()
            times[name].append(time.perf_counter() - began)

    def no_times(self) -> Times:
        return {name: [] for name in self._engines}

    def run(self, requests: Sequence[Any], params: Any, decode_steps: int) -> tuple[Times, Times]:
        """Of prefills, one by one, and of decode steps of all requests together."""
        prefill, decode = self.no_times(), self.no_times()
        for number, request in enumerate(requests):
            for engine in self._engines.values():
                engine.add_request(str(number), request, params)
            self._step(prefill)
        for _ in range(decode_steps):
            self._step(decode)
        for engine in self._engines.values():
            assert engine.get_num_unfinished_requests() == len(requests), "a step of nothing"
            engine.abort_request([str(number) for number in range(len(requests))])
            engine.step()
        return prefill, decode


def measure(turns: Turns, options: argparse.Namespace) -> list[Row]:
    """Rows of every number of images and batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=options.decode_steps + 8, ignore_eos=True)
    rows = []
    for images, batch in offline.cells(options):
        requests = offline.vllm_requests(images, batch)
        turns.run(requests[:1], params, 4)  # compiled and warm
        which = {"visual_tokens": images * shape.VISUAL_TOKENS, "batch": batch}
        if batch == 1:  # otherwise earlier requests decode beside a prefill
            times = turns.no_times()
            for _ in range(options.prefills):
                for name, found in turns.run(requests, params, 0)[0].items():
                    times[name] += found
            rows += compare(times, step="prefill", **which)
        decode = turns.run(requests, params, options.decode_steps)[1]
        rows += compare(decode, step="decode", **which)
    return rows


def start(model: Path, options: argparse.Namespace, engine: str) -> Any:
    """An engine; it lives as long as the process, because ending one ends what all share."""
    from vllm import LLM

    longest = max(options.images) * shape.VISUAL_TOKENS + options.decode_steps + 256
    return LLM(
        **offline.llm_arguments(model, options, engine),
        async_scheduling=False,  # a call of `step` is a step
        max_model_len=longest,
        max_num_batched_tokens=longest,
    ).llm_engine


def num_evicted(engine: Any) -> int:
    """Requests of an engine in this process."""
    return engine.engine_core.engine_core.scheduler.eviction_stats.evicted


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", choices=OTHERS, default=list(OTHERS), help="beside stock")
    add("--images", type=int, nargs="+", default=[1, 2, 4], help="of a prompt")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--max-images", type=int, default=16, help="of a batch: larger ones are left out")
    add("--decode-steps", type=int, default=400)
    add("--prefills", type=int, default=4, help="of each number of images")
    add("--shape", choices=shape.SHAPES, default="0.5b", help="of the language model")
    add("--kv-cache-gib", type=int, default=1)
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    add("--json", type=Path, metavar="FILE", help="write the results here")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if min(options.decode_steps, options.prefills) < 1 or not offline.cells(options):
        parser.error(
            "--decode-steps and --prefills must be at least 1, --max-images not below --images"
        )
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", options.shape)
        engines = {name: start(model, options, name) for name in (STOCK, *options.engines)}
        rows = measure(Turns(engines), options)
    for name, engine in engines.items():
        assert name not in ("whole", "ours") or (num_evicted(engine) > 0) == (name == "ours")
    if options.json:
        write_report(
            options.json,
            "benchmarks.turns",
            sys.argv[1:],
            policy=options.policy,
            budget=options.budget,
            rows=rows,
        )


if __name__ == "__main__":
    main()
