# SPDX-License-Identifier: Apache-2.0
"""The Triton operations against the torch operations on the CPU, and their times.

Attention that is summed in another order differs in the last bits, so sums and maxima have a
tolerance, and an entry at the density threshold may count or not. Everything else is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.self_check.rows import Row, broken
from vl_cache_vllm.self_check.synthetic import (
    ATTENTION_SHAPES,
    AttentionShape,
    Case,
    SyntheticPrompt,
)

COLUMN_TOLERANCE = 1e-3  # relative
DENSE_TOLERANCE = 1e-4  # of the entries

CASES: tuple[Case, ...] = (
    Case(AttentionShape(3, 6, 2, 80), 208, 16, num_queries=7, budget=0.3),
    Case(
        AttentionShape(4, 3, 1, 64),
        535,
        32,
        num_queries=50,
        layers_outermost=False,
        heads_interleaved=True,
        softcap=20.0,
        grouped=True,
        budget=0.2,
    ),
    Case(
        AttentionShape(5, 4, 4, 128),
        330,
        48,
        num_queries=1,
        dtype=torch.float16,
        heads_interleaved=True,
        recent_ratio=0.0,
        budget=0.4,
        decoding=7,
    ),
    Case(
        AttentionShape(2, 12, 2, 96),
        515,
        64,
        num_queries=70,
        dtype=torch.float16,
        layers_outermost=False,
        weighted=True,
        grouped=True,
        recent_ratio=1.0,
        budget=0.25,
    ),
    # Both launches of the observation must compute the same bits.
    Case(AttentionShape(7, 2, 1, 256), 333, 16, num_queries=33, threshold=1.0, recent_ratio=0.14),
    # Gemma 4's heads, of which a tile has few rows.
    Case(AttentionShape(2, 4, 1, 512), 203, 32, num_queries=19, budget=0.3),
    Case(AttentionShape(1, 5, 1, 64), 97, 16, num_queries=97, dtype=torch.float32, budget=0.5),
    # A long prompt: keys are split over many programs, and tables have several iterations.
    Case(AttentionShape(2, 4, 2, 128), 4099, 16, num_queries=5, budget=0.15, grouped=True),
)


def cases_for(device: torch.device) -> tuple[Case, ...]:
    """The cases for a device: those in bfloat16 become float16 on GPUs that have no bfloat16."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0):
        return CASES
    return tuple(
        replace(case, dtype=torch.float16) if case.dtype == torch.bfloat16 else case
        for case in CASES
    )


def compare(
    cases: Iterable[Case],
    device: torch.device,
    implementation: dispatch.Implementation = "triton",
) -> Iterator[Row]:
    """One row for each case and result of an operation.

    Args:
        cases: prompts.
        device: where the implementation runs; the torch operations run on the CPU.
        implementation: the one to check.
    """
    for case in cases:
        prompt = SyntheticPrompt(case, torch.device("cpu"))
        calls = prompt.to(device).calls()  # copied before the reference changes the pool
        for operation, reference in prompt.calls().items():
            with dispatch.use("torch"):
                expected = reference()
            try:
                with dispatch.use(implementation):
                    found = {name: one.cpu() for name, one in calls[operation]().items()}
            except Exception as error:  # whatever a compiler or a driver raises
                yield broken(operation, str(case), error)
                continue
            for name, right in expected.items():
                yield _row(case, operation, name, found[name], right)


def _row(case: Case, operation: str, name: str, found: torch.Tensor, right: torch.Tensor) -> Row:
    title = f"{operation}: {name}" if name else operation
    if found.shape != right.shape:
        return broken(title, str(case), f"shape {[*found.shape]}, expected {[*right.shape]}")
    if operation.startswith("observe") and name == "dense entries":
        entries = case.shape.num_heads * case.num_queries * case.tokens
        # At a threshold of 1, only the entry that is the maximum counts.
        limit = 0.0 if case.threshold == 1.0 else max(2.0, DENSE_TOLERANCE * entries)
        return Row(title, str(case), float((found - right).abs().max()), limit, "of a layer")
    if operation.startswith("observe"):
        error = ((found - right).abs() / (right.abs() + 1e-6)).max()
        return Row(title, str(case), float(error), COLUMN_TOLERANCE, "relative")
    wrong = int((found != right).sum())  # NaN differs from everything
    return Row(title, str(case), float(wrong), 0.0, f"of {right.numel()} entries")


# --------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Time:
    """The time of an operation on the device, beside what its bytes take at least."""

    operation: str
    case: str
    milliseconds: float
    bound_milliseconds: float
    """Bytes divided by the bandwidth of a large copy on this device."""

    def __str__(self) -> str:
        return (
            f"time  {self.operation:<36}{self.case:<50}{self.milliseconds:>8.3f} ms"
            f"{self.bound_milliseconds:>8.3f} ms bound"
        )


TIMED = Case(ATTENTION_SHAPES["7b-gqa"], 2112, 16, num_queries=64)


def device_milliseconds(run: object, in_graph: bool = True) -> float:
    """Median device time of a call.

    Args:
        run: the call.
        in_graph: time replays of a CUDA graph that contains it; otherwise, time calls, which
            includes what the device waits for the host.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    return float((do_bench_cudagraph if in_graph else do_bench)(run, return_mode="median"))


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    source = torch.zeros(1 << 29, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2000 * len(source) / device_milliseconds(lambda: target.copy_(source))


def times(device: torch.device, cases: Sequence[Case] = (TIMED,)) -> Iterator[Time]:
    """Times of the Triton operations of each case on a GPU."""
    ceiling = bandwidth(device)
    for case in cases:
        prompt = SyntheticPrompt(case, device)
        for operation in prompt.operations():
            with dispatch.use("triton"):
                taken = device_milliseconds(operation.run, in_graph=not operation.copies)
            yield Time(operation.name, str(case), taken, 1000 * operation.num_bytes / ceiling)
