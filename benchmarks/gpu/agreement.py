# SPDX-License-Identifier: Apache-2.0
"""Engines under a hostile load: all must evict the same tokens, and none may wait for the device.

The self-check compares engines on a few requests at a time. Here a prompt of 7K tokens and many
short ones, evicted or not, go through a pool that preempts some of them, and one is aborted. Every
engine runs, and all rows are printed before anything is judged.

The last engine runs this package's code with torch's check for device synchronisation. It writes
no trace, because that synchronises, so only its outputs are compared. On a CPU there is one
attention backend and there are no graphs.
"""

import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import say
from benchmarks.own_time import wrapped
from testing.cli import set_vllm_environment
from testing.results import Row
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.self_check import engines
from vl_cache_vllm.self_check.engines import EngineRun, EngineSetup
from vl_cache_vllm.self_check.model import LOAD_FORMAT, ModelSize, request, write_model


@dataclass(frozen=True)
class Load:
    """Sizes of the model, the prompts and the pool."""

    model: ModelSize = field(default_factory=ModelSize)
    dtype: str = "bfloat16"
    long_images: int = 12
    num_short: int = 10
    output_len: int = 40
    pool_tokens: int = 9216

    @property
    def max_model_len(self) -> int:
        tokens = (self.model.image_size // 14) ** 2
        return -(-(self.long_images * tokens + 200) // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def pool_bytes(self) -> int:
        model, size = self.model, getattr(torch, self.dtype).itemsize
        return self.pool_tokens * 2 * size * model.num_layers * model.num_kv_heads * model.head_size

    def requests(self) -> list[tuple[dict[str, Any], float | None]]:
        """Requests with their budgets; None: the engine's."""
        short: list[tuple[dict[str, Any], float | None]] = [
            (request(self.model, i, i % 4 > 0, 10 + 7 * i), 1.0 if i % 3 == 0 else None)
            for i in range(self.num_short)
        ]
        return [(request(self.model, 99, self.long_images, 40), None), *short]


BLOCK_SIZE = 32
ABORTED, ABORTED_AFTER = 2, 6
"""Index of the request that is aborted, and after how many steps."""


def setups() -> list[tuple[EngineSetup, bool]]:
    """The engines of this machine, the reference first; and whether synchronisation is refused."""
    if not torch.cuda.is_available():
        return [(EngineSetup(None, operations="torch"), False), (EngineSetup(None), False)]
    return [
        (EngineSetup("FLASH_ATTN", operations="torch"), False),
        (EngineSetup("FLASH_ATTN", graphs=True), False),
        (EngineSetup("FLASH_ATTN", graphs=True), True),
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
def counted() -> Iterator[Counter[str]]:
    """Count preemptions."""
    from vllm.v1.core.sched.scheduler import Scheduler

    counts: Counter[str] = Counter()

    def counting(original: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            counts["preemptions"] += 1
            return original(*args, **kwargs)

        return run

    with wrapped([(Scheduler, "_preempt_request")], counting):
        yield counts


def run(setup: EngineSetup, forbid_sync: bool, load: Load, folder: Path) -> tuple[EngineRun, Row]:
    """Start an engine and run the load.

    Args:
        setup: which engine.
        forbid_sync: raise where this package synchronises with the device.
        load: the requests.
        folder: empty; receives the model and the trace.

    Returns:
        What it did, and its row.
    """
    from vllm import SamplingParams

    from testing.engine import running_llm

    write_model(folder / "model", load.model)
    trace = folder / "trace.jsonl"
    settings = dict(engines.SETTINGS)
    if not forbid_sync:  # writing the trace synchronises
        settings["trace"] = {"path": str(trace), "positions": True}
    arguments: dict[str, Any] = {
        "model": str(folder / "model"),
        "load_format": LOAD_FORMAT,
        "dtype": load.dtype,
        "enforce_eager": not setup.graphs,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "max_model_len": load.max_model_len,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": load.pool_bytes,
        "gpu_memory_utilization": 0.3,
        "limit_mm_per_prompt": {"image": load.long_images},
        "additional_config": {"kv_compress": settings},
    }
    if setup.graphs:
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if setup.backend:
        arguments["attention_backend"] = setup.backend
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use(setup.operations))
        counts = stack.enter_context(counted())
        if forbid_sync:
            stack.enter_context(synchronisation_forbidden())
        core = stack.enter_context(running_llm(**arguments)).llm_engine
        for number, (prompt, budget) in enumerate(load.requests()):
            extra = None if budget is None else {"kv_budget": budget}
            params = SamplingParams(
                temperature=0,
                max_tokens=load.output_len,
                ignore_eos=True,
                logprobs=engines.NUM_LOGPROBS,
                extra_args=extra,
            )
            core.add_request(str(number), prompt, params)
        outputs: dict[int, Any] = {}
        steps = 0
        while core.has_unfinished_requests():
            for output in core.step():
                outputs[int(output.request_id)] = output
            steps += 1
            if steps == ABORTED_AFTER:
                core.abort_request([str(ABORTED)])
    outputs.pop(ABORTED, None)
    found = [
        [*map(engines.step_of, outputs[number].outputs[0].logprobs)] for number in sorted(outputs)
    ]
    kept: dict[int, Any] = {}
    if not forbid_sync:
        for line in trace.read_text().splitlines():
            record = json.loads(line)
            number = int(record["request_id"].partition("-")[0])
            if number != ABORTED:
                kept[number - (number > ABORTED)] = record["kept_positions"]
    row = {
        "engine": str(setup) + (", no synchronisation" if forbid_sync else ""),
        "outputs": len(found),
        "evicted": len(kept),
        "preemptions": counts["preemptions"],
        "steps": steps,
        "numbers_missing": sum(
            math.isnan(value) for one in found for step in one for value in step.logprobs.values()
        ),
    }
    return EngineRun(kept, found, [], math.nan, 0), row


def judge(rows: Sequence[tuple[EngineRun, Row]], load: Load) -> list[str]:
    """What is wrong; the first engine is the reference. Completes the rows."""
    wrong = []
    (reference, first), *others = rows
    for _, row in rows:
        problems = []
        if row["outputs"] != load.num_short:  # one is aborted
            problems.append(f"{row['outputs']} outputs")
        if row["numbers_missing"]:
            problems.append("log-probabilities that are no number")
        wrong += [f"{row['engine']}: {problem}" for problem in problems]
    if first["preemptions"] == 0:
        wrong.append("nothing was preempted: the pool is too large for this check")
    for found, row in others:
        if found.kept:
            difference = engines.kept_difference(found, reference, BLOCK_SIZE)
            row["pages_moved"], row["tokens_moved"] = difference
            if row["pages_moved"] > 1 or not row["tokens_moved"] <= engines.MOVED_LIMIT:
                wrong.append(f"{row['engine']}: kept other tokens")
            alike = engines.kept_alike(found, reference)
        else:
            alike = found.mixed, reference.mixed
        row["logprob_difference"] = engines.logprob_difference(*alike)
        if not row["logprob_difference"] <= engines.LOGPROB_LIMIT:
            wrong.append(f"{row['engine']}: other outputs")
    return wrong


def measure(load: Load | None = None) -> Row:
    """Run all engines, print their rows, and name what is wrong."""
    set_vllm_environment()
    load = load or Load()
    found = []
    for setup, forbid_sync in setups():
        with tempfile.TemporaryDirectory() as folder:
            found.append(run(setup, forbid_sync, load, Path(folder)))
        say(found[-1][1])
    wrong = judge(found, load)
    for _, row in found[1:]:
        say(row)
    return {"rows": [row for _, row in found], "failing": wrong}
