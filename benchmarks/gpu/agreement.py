# SPDX-License-Identifier: Apache-2.0
"""Engines with different operations, attention backends and CUDA graphs evict the same tokens.

    python -m benchmarks.gpu.agreement [--json FILE]

The model is a tiny LLaVA with random weights. Every engine must evict all requests and keep the
same tokens as the first engine, up to the rounding of 16-bit types. The number of equal outputs is
reported but not required, for the same reason. The last engine runs this package's code with
torch's check for device synchronisation. It writes no trace, because that synchronises, so only
its number of evictions is compared. On a CPU there is one attention backend and there are no
graphs.
"""

import contextlib
import operator
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import shape
from benchmarks.own_time import wrapped
from testing import tiny_models
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report
from vl_cache_vllm.ops import dispatch

BUDGET, OUTPUT_LEN = 0.25, 32
MIN_OVERLAP = 0.97  # fraction of kept tokens; 16-bit rounding may change the rest


@dataclass(frozen=True)
class EngineSetup:
    """One of the compared engines."""

    name: str
    operations: dispatch.Implementation
    backend: str | None = None
    eager: bool = False
    forbid_sync: bool = False


def engines() -> list[EngineSetup]:
    """The engines that this machine can run."""
    if not torch.cuda.is_available():
        return [EngineSetup("torch", "torch", eager=True), EngineSetup("cpp", "cpp", eager=True)]
    return [
        EngineSetup("torch operations, eager", "torch", "FLASH_ATTN", eager=True),
        EngineSetup("Triton operations, eager", "triton", "FLASH_ATTN", eager=True),
        EngineSetup("Triton operations, graphs", "triton", "FLASH_ATTN"),
        EngineSetup("Triton attention, graphs", "triton", "TRITON_ATTN"),
        EngineSetup("no synchronisation", "triton", "FLASH_ATTN", forbid_sync=True),
    ]


@contextlib.contextmanager
def synchronisation_forbidden() -> Iterator[None]:
    """Raise where this package's code synchronises with the device."""
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
    """Collect the ids of evicted requests."""
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
class EngineRun:
    """What an engine did with two rounds of requests."""

    num_evicted: int
    records: list[dict[str, Any]]
    """Trace records; empty if no trace was written."""
    answers: list[list[int]]


def run(model: Path, engine: EngineSetup) -> EngineRun:
    """Start an engine and run the requests."""
    from vllm import SamplingParams

    from testing.engine import read_trace, running_llm

    trace = model / "trace.jsonl"
    trace.unlink(missing_ok=True)
    settings: dict[str, Any] = {"policy": "vlcache", "budget": BUDGET}
    if not engine.forbid_sync:  # writing the trace synchronises
        settings |= {"trace": {"path": str(trace), "positions": True}}
    arguments: dict[str, Any] = {}
    if engine.backend:
        arguments["attention_backend"] = engine.backend
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_LEN, ignore_eos=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use(engine.operations))
        evicted = stack.enter_context(counted())
        if engine.forbid_sync:
            stack.enter_context(synchronisation_forbidden())
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
    records = [] if engine.forbid_sync else list(read_trace(trace).values())
    return EngineRun(len(evicted), records, answers)


def overlap(record: dict[str, Any], expected: dict[str, Any]) -> float:
    """Fraction of the tokens kept in ``expected`` that ``record`` keeps too."""
    both = total = 0
    for layer, other in zip(record["kept_positions"], expected["kept_positions"], strict=True):
        for head, right in zip(layer, other, strict=True):
            both += len(set(head) & set(right))
            total += len(right)
    return both / total


def compare(model: Path) -> list[Row]:
    """One row for each engine, compared with the first one.

    Raises:
        AssertionError: if an engine evicts other tokens.
    """
    rows: list[Row] = []
    first: EngineRun | None = None
    for engine in engines():
        found = run(model, engine)
        first = first or found
        row = {
            "engine": engine.name,
            "evictions": found.num_evicted,
            "same_answers": sum(map(operator.eq, found.answers, first.answers)),
            "answers": len(found.answers),
        }
        if not engine.forbid_sync:
            pairs = zip(found.records, first.records, strict=True)
            row["least_overlap"] = round(min(overlap(*pair) for pair in pairs), 4)
        rows.append(row)
        print(row, flush=True)
        assert row["evictions"] == row["answers"], row
        assert row.get("least_overlap", 1.0) >= MIN_OVERLAP, row
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options = make_parser(__doc__).parse_args(arguments)
    set_vllm_environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(tiny_models.build("llava", Path(folder) / "model", image_size=336))
    if options.json:
        write_report(options.json, "benchmarks.gpu.agreement", arguments, rows=rows)


if __name__ == "__main__":
    main()
