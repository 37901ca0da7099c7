# SPDX-License-Identifier: Apache-2.0
"""Call 1: is eviction right on this GPU?"""

import shutil
import subprocess
import sys
from typing import Any

from benchmarks.gpu import agreement
from benchmarks.gpu.report import say
from benchmarks.gpu.step import Step
from testing.results import Row, describe_machine

KERNEL_CELLS: tuple[tuple[str, int, tuple[int, ...]], ...] = (
    ("7b-mha", 2048, (50, 1, 500)),
    ("8b-gqa", 2048, (50, 1, 500)),
    ("7b-mha", 8192, (50,)),
    ("8b-gqa", 8192, (50, 4000)),
    ("7b-mha", 32768, (50,)),
    ("8b-gqa", 32768, (50, 4000)),
)
"""Shape, prompt tokens, observed queries; the most important first."""
PARAMETERS = {"7b-mha": 6.7e9, "8b-gqa": 8.2e9}
"""Of the language model, for the time of a prefill: two operations for each parameter and token."""


def ceilings() -> dict[str, float]:
    """Bytes per second of a large copy, and operations per second of a large matrix product."""
    import torch

    from vl_cache_vllm.self_check.operations import bandwidth, device_milliseconds

    device = torch.device("cuda")
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    taken = device_milliseconds(lambda: left @ right) / 1000
    return {"bytes_per_second": bandwidth(device), "flops_per_second": 2 * 8192**3 / taken}


def machine() -> Row:
    """The GPU and its ceilings."""
    if shutil.which("nvidia-smi"):
        found = subprocess.run(["nvidia-smi"], capture_output=True, text=True)
        say("\n".join(found.stdout.splitlines()[:14]))
    result = describe_machine() | ceilings()
    say(
        f"copy {result['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"matrix product {result['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    return result


def check(seconds: float) -> Row:
    """The self-check, as users run it; its steps have processes of their own."""
    from vl_cache_vllm.self_check import cli
    from vl_cache_vllm.self_check.rows import failing

    result = cli.check(say, seconds)
    return cli.describe(result) | {"failing": sorted({r.name for r in failing(result.rows)})}


def kernels(cells: tuple[tuple[str, int, tuple[int, ...]], ...]) -> Row:
    """Times of the operations beside their byte bounds and the prefill of the same prompt."""
    import torch

    from benchmarks.kernels import line, measure

    device, found = torch.device("cuda"), ceilings()
    rows: list[Row] = []
    for shape, tokens, queries in cells:
        prefill = 2 * PARAMETERS[shape] * tokens / found["flops_per_second"]
        ceiling = found["bytes_per_second"]
        for row in measure(shape, tokens, queries, 16, ["triton"], device, ceiling):
            row["share_of_prefill"] = round(row["device_milliseconds"] / prefill / 1000, 5)
            rows.append(row)
            say(f"{line(row)}, {row['share_of_prefill']:.2%} of the prefill at the ceiling")
        torch.cuda.empty_cache()
    return {"rows": rows, **found}


def memcheck() -> Row:
    """The small cases of the self-check under compute-sanitizer."""
    if (tool := shutil.which("compute-sanitizer")) is None:
        say("no compute-sanitizer on the PATH")
        return {"skipped": "no compute-sanitizer"}
    code = (
        "import torch; from vl_cache_vllm.self_check.operations import CASES, compare; "
        "[print(row) for row in compare(CASES[:2], torch.device('cuda')) if not row.passed]"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True)
    tail = (found.stdout + found.stderr).splitlines()[-12:]
    say("\n".join(tail))
    result: dict[str, Any] = {"exit_code": found.returncode, "output": tail}
    return result | ({"failing": ["memcheck"]} if found.returncode else {})


STEPS = (
    Step("machine", "which GPU, and how fast are a copy and a matrix product?", 30, machine),
    Step(
        "check",
        "the self-check: operations, attention, engines with and without graphs",
        150,
        check,
        isolated=False,
    ),
    Step(
        "kernels",
        "how long do the operations take, beside their byte bounds?",
        50,
        kernels,
        {"cells": KERNEL_CELLS},
    ),
    Step(
        "agreement",
        "long prompts, preemption, an abort: do graphs evict alike, and does nothing wait?",
        60,
        agreement.measure,
    ),
    Step("memcheck", "do the kernels stay inside their tensors?", 40, memcheck),
)
