# SPDX-License-Identifier: Apache-2.0
"""Interleaved step timing of baseline and eviction engines: resolves small differences.

    python -m benchmarks.turns [--images 1 2 4] [--batch 1 8] [--decode-steps 400] [--json FILE]

All engines run in this process and share its threads:

    stock   vLLM without eviction (the baseline)
    again   a second baseline (A/A): the resolution of this method
    whole   vLLM with --kv-compress POLICY and budget 1.0, which evicts nothing
    ours    the same with a smaller budget

All engines hold the same requests. Each executes one step before any executes the next, in an
order that is drawn again for every step. A ratio divides the time of the baseline by the time of
another engine for the same step. The results are medians of these ratios with 95% confidence
intervals from order statistics. They resolve differences below the run-to-run noise of separate
runs. For complete batches with their bounds see `benchmarks.offline`; for the time spent in this
package's code see `benchmarks.overhead`.
"""

import argparse
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import offline, shape
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

BASELINE, OTHERS = "stock", ("again", "whole", "ours")

Times = dict[str, list[float]]  # by engine, seconds of each step


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95% confidence interval of the median; the range for fewer than six values."""
    ordered = sorted(values)
    middle, reach = (len(ordered) - 1) / 2, 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(middle - reach))
    return ordered[low], ordered[len(ordered) - 1 - low]


def compare(times: Times, **which: Any) -> list[Row]:
    """One row for each engine but the baseline, from the times of the same steps.

    Args:
        times: the baseline comes first.
        which: further columns of the rows.
    """
    rows = []
    for engine in list(times)[1:]:
        ratios = [s / t for s, t in zip(times[BASELINE], times[engine], strict=True)]
        low, high = interval(ratios)
        row = {
            **which,
            "engine": engine,
            "stock_milliseconds": round(1000 * statistics.median(times[BASELINE]), 3),
            "milliseconds": round(1000 * statistics.median(times[engine]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "interval": [round(low, 4), round(high, 4)],
            "steps": len(ratios),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


class InterleavedEngines:
    """Engines that execute the same steps, one engine after the other."""

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
        """Prefill the requests one by one, then decode them together.

        Returns:
            Times of the prefills and of the decode steps.
        """
        prefill, decode = self.no_times(), self.no_times()
        for number, request in enumerate(requests):
            for engine in self._engines.values():
                engine.add_request(str(number), request, params)
            self._step(prefill)
        for _ in range(decode_steps):
            self._step(decode)
        for engine in self._engines.values():
            assert engine.get_num_unfinished_requests() == len(requests), (
                "a request ended too early"
            )
            engine.abort_request([str(number) for number in range(len(requests))])
            engine.step()
        return prefill, decode


def measure(engines: InterleavedEngines, options: argparse.Namespace) -> list[Row]:
    """The rows of every number of images and batch size."""
    from vllm import SamplingParams

    # The first request of a batch decodes while the others prefill.
    most = max(options.batch) + options.decode_steps + 1
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    rows = []
    for images, batch in offline.cells(options):
        requests = offline.vllm_requests(images, batch)
        engines.run(requests[:1], params, 4)  # warm-up and compilation
        which = {"visual_tokens": images * shape.VISUAL_TOKENS, "batch": batch}
        if batch == 1:  # in larger batches, earlier requests decode during a prefill
            times = engines.no_times()
            for _ in range(options.prefills):
                for name, found in engines.run(requests, params, 0)[0].items():
                    times[name] += found
            rows += compare(times, step="prefill", **which)
        decode = engines.run(requests, params, options.decode_steps)[1]
        rows += compare(decode, step="decode", **which)
    return rows


def start(model: Path, options: argparse.Namespace, engine: str, **changed: Any) -> Any:
    """Start an engine. It is never shut down: shutdown would end state that all engines share.

    Args:
        changed: arguments of `vllm.LLM` that replace those of all engines.
    """
    from vllm import LLM

    longest = max(options.images) * shape.VISUAL_TOKENS + options.decode_steps + 256
    arguments = offline.llm_arguments(model, options, engine) | {
        "async_scheduling": False,  # each call of `step` executes one step
        "max_model_len": longest,
        "max_num_batched_tokens": longest,
    }
    return LLM(**arguments | changed).llm_engine


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--engines", nargs="+", choices=OTHERS, default=list(OTHERS), help="compared with stock")
    add("--images", type=int, nargs="+", default=[1, 2, 4], help="images per prompt")
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    add("--max-images", type=int, default=16, help="skip batches with more images")
    add("--decode-steps", type=int, default=400, help="of each batch")
    add("--prefills", type=int, default=4, help="of each number of images")
    add("--shape", choices=shape.TEXT_CONFIGS, default="0.5b", help="shape of the language model")
    add("--kv-cache-gib", type=int, default=1)
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if min(options.decode_steps, options.prefills) < 1 or not offline.cells(options):
        parser.error(
            "--decode-steps and --prefills must be at least 1, --max-images at least --images"
        )
    set_vllm_environment()
    from testing.engine import num_evicted

    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", options.shape)
        engines = {name: start(model, options, name) for name in (BASELINE, *options.engines)}
        rows = measure(InterleavedEngines(engines), options)
    for name, engine in engines.items():
        assert name not in ("whole", "ours") or (num_evicted(engine) > 0) == (name == "ours")
    if options.json:
        write_report(
            options.json,
            "benchmarks.turns",
            arguments,
            policy=options.policy,
            budget=options.budget,
            rows=rows,
        )


if __name__ == "__main__":
    main()
