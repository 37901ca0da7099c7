# SPDX-License-Identifier: Apache-2.0
"""Engines that must evict alike: other operations, other attention, with and without graphs.

    python -m benchmarks.gpu.agreement [--json FILE]

A tiny LLaVA with random weights. Every engine must evict all requests and keep the tokens that the
first one keeps, up to what 16 bits leave undecided; how many answers are the same is reported, not
required, for the same reason. The last engine runs our code under torch's check that nothing waits
for the device, and without a trace, which does: of it only the number of evictions is compared. On
a CPU there is one attention and there are no graphs.
"""

import argparse
import contextlib
import operator
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks import shape
from benchmarks.own_time import wrapped
from testing import tiny_models
from testing.results import write_report
from vl_cache_vllm.ops import dispatch

BUDGET, OUTPUT_LEN = 0.25, 32
LEAST_OVERLAP = 0.97  # of kept tokens; what 16 bits leave undecided
Row = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """One of those compared."""

    name: str
    operations: dispatch.Implementation
    backend: str | None = None
    eager: bool = False
    must_not_wait: bool = False


def engines() -> list[Engine]:
    """Those that this machine can run."""
    if not torch.cuda.is_available():
        return [Engine("torch", "torch"), Engine("cpp", "cpp")]
    return [
        Engine("torch operations, eager", "torch", "FLASH_ATTN", eager=True),
        Engine("Triton operations, eager", "triton", "FLASH_ATTN", eager=True),
        Engine("Triton operations, graphs", "triton", "FLASH_ATTN"),
        Engine("Triton attention, graphs", "triton", "TRITON_ATTN"),
        Engine("nothing waits", "triton", "FLASH_ATTN", must_not_wait=True),
    ]


@contextlib.contextmanager
def forbidden_to_wait() -> Iterator[None]:
    """Our code raises where it waits for the device."""
    from vl_cache_vllm.attention.per_layer import PerLayerAttentionMixin
    from vl_cache_vllm.worker.evictor import Evictor

    def guarded(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return original(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    targets: list[tuple[type, str]] = [(PerLayerAttentionMixin, "_layer_view")]
    targets += [(Evictor, name) for name in ("begin_step", "layer_done", "take_reports")]
    with wrapped(targets, guarded):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """Ids of the requests that are evicted."""
    from vl_cache_vllm.worker.evictor import Evictor

    ids: list[str] = []

    def counting(original: Any) -> Any:
        def run(worker: Any, step: Any, finish: Any, *rest: Any) -> Any:
            result = original(worker, step, finish, *rest)
            ids.append(finish.state.request_id)
            return result

        return run

    with wrapped([(Evictor, "_evict")], counting):
        yield ids


@dataclass(frozen=True)
class Outcome:
    """Of an engine after two rounds of requests."""

    num_evicted: int
    records: list[dict[str, Any]]
    """What the trace says; empty if there is none."""
    answers: list[list[int]]


def run(model: Path, engine: Engine) -> Outcome:
    """Send an engine the requests."""
    from vllm import SamplingParams

    from testing.engine import read_trace, running_llm

    trace = model / "trace.jsonl"
    trace.unlink(missing_ok=True)
    settings: dict[str, Any] = {"policy": "vlcache", "budget": BUDGET}
    if not engine.must_not_wait:  # the trace does
        settings |= {"trace": {"path": str(trace), "positions": True}}
    arguments: dict[str, Any] = {}
    if engine.backend:
        arguments["attention_backend"] = engine.backend
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use(engine.operations))
        evicted = stack.enter_context(counted())
        if engine.must_not_wait:
            stack.enter_context(forbidden_to_wait())
        llm = stack.enter_context(
            running_llm(
                model=str(model),
                dtype="bfloat16",
                enforce_eager=engine.eager,
                block_size=32,
                enable_prefix_caching=False,
                max_model_len=2048,
                max_num_seqs=4,
                kv_cache_memory_bytes=1 << 28,
                gpu_memory_utilization=0.3,
                limit_mm_per_prompt={"image": 2},
                additional_config={"kv_compress": settings},
                **arguments,
            )
        )
        answers = []
        for number in (1, 2):
            requests: Any = [
                {
                    "prompt": tiny_models.prompt_for("llava", shape.QUESTION, num_images=number),
                    "multi_modal_data": {
                        "image": [
                            tiny_models.random_image(10 * seed + i, (336, 336))
                            for i in range(number)
                        ]
                    },
                }
                for seed in range(3)
            ]
            outputs = llm.generate(requests, params, use_tqdm=False)
            answers += [list(output.outputs[0].token_ids) for output in outputs]
    records = [] if engine.must_not_wait else list(read_trace(trace).values())
    return Outcome(len(evicted), records, answers)


def overlap(record: dict[str, Any], expected: dict[str, Any]) -> float:
    """Share of the tokens that both keep, of those that the second one keeps."""
    both = total = 0
    for layer, other in zip(record["kept_positions"], expected["kept_positions"], strict=True):
        for head, right in zip(layer, other, strict=True):
            both += len(set(head) & set(right))
            total += len(right)
    return both / total


def compare(model: Path) -> list[Row]:
    """A row of each engine beside the first one.

    Raises:
        AssertionError: if one evicts otherwise.
    """
    rows: list[Row] = []
    first: Outcome | None = None
    for engine in engines():
        found = run(model, engine)
        first = first or found
        row = {
            "engine": engine.name,
            "evictions": found.num_evicted,
            "same_answers": sum(map(operator.eq, found.answers, first.answers)),
            "answers": len(found.answers),
        }
        if not engine.must_not_wait:
            pairs = zip(found.records, first.records, strict=True)
            row["least_overlap"] = round(min(overlap(*pair) for pair in pairs), 4)
        rows.append(row)
        print(row, flush=True)
        assert row["evictions"] == row["answers"], row
        assert row.get("least_overlap", 1.0) >= LEAST_OVERLAP, row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(tiny_models.build("llava", Path(folder) / "model", image_size=336))
    if options.json:
        write_report(options.json, "benchmarks.gpu.agreement", sys.argv[1:], rows=rows)


if __name__ == "__main__":
    main()
