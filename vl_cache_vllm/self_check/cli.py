# SPDX-License-Identifier: Apache-2.0
"""The command ``vl-cache-check``.

vLLM and torch read environment variables when they are imported, so they are imported after these
are set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vl_cache_vllm.hooks import GPU_BACKENDS
from vl_cache_vllm.self_check.record import COMMAND
from vl_cache_vllm.self_check.rows import HEADER, Row, broken, failing

if TYPE_CHECKING:
    from vl_cache_vllm.self_check.engines import EngineRun, EngineSetup
    from vl_cache_vllm.self_check.operations import Time

DESCRIPTION = """
Check KV compression on this machine's GPU, in about three minutes, and record the result.

--kv-compress starts on a GPU if this check has passed with the same GPU, driver, torch, Triton,
vLLM and vl-cache-vllm. It needs one GPU with 4 GB of free memory, no network and no weights. Of
several GPUs it checks the first; choose another with CUDA_VISIBLE_DEVICES.

Exit status: 0 if all rows pass, 1 if a row fails, 2 if there is nothing to check.
"""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    # Answers whether there is a GPU without initialising CUDA, which forked processes need.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
OPERATIONS_SECONDS, ENGINE_SECONDS, TIMES_SECONDS = 180.0, 120.0, 60.0  # time limits


@dataclass
class Result:
    """What a check found."""

    rows: list[Row] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check, print a table, write the record; the exit status."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="do nothing if the record of this combination says that it passed",
    )
    options = parser.parse_args(arguments)
    set_environment()
    from vllm.platforms import current_platform

    from vl_cache_vllm.self_check import record
    from vl_cache_vllm.support import unsupported_version

    if reason := unsupported_version():
        print(f"{COMMAND}: {reason}", file=sys.stderr)
        return 2
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not current_platform.is_cuda():
        if not is_interpreted:
            print(f"{COMMAND}: no NVIDIA GPU is visible here", file=sys.stderr)
            return 2
        result = Result()
        _check_operations(result, "cpu", OPERATIONS_SECONDS, print)
        return _verdict(result)
    combined = record.combination()
    print(", ".join(f"{name} {value}" for name, value in combined.items()), flush=True)
    if options.if_needed and record.has_passed(combined):
        print(f"passed before: {record.path_of(combined)}")
        return 0
    result = check(print)
    code = _verdict(result)
    names = sorted({row.name for row in failing(result.rows)})
    try:
        path = record.write(combined, names, **describe(result))
    except OSError as error:
        print(f"{COMMAND}: cannot write the record: {error}", file=sys.stderr)
        return 1
    print(f"record: {path}")
    return code


def set_environment() -> None:
    """Set what vLLM and torch read when they are imported, where the user has not."""
    from vl_cache_vllm.support import TRY_GPU

    os.environ[TRY_GPU] = "1"  # the engines of the check itself
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def check(report: Callable[[str], Any], seconds: float = 900) -> Result:
    """Run all steps on the first visible GPU.

    Args:
        report: gets each line of the table.
        seconds: time for all steps.
    """
    from vl_cache_vllm.self_check import engines
    from vl_cache_vllm.self_check.steps import StepError, run_step

    end = time.monotonic() + seconds
    result = Result()
    report(HEADER)
    _check_operations(result, "cuda", min(OPERATIONS_SECONDS, seconds), report)
    try:
        backends = engines.supported_backends()
    except Exception as error:  # whatever a driver raises
        backends = []
        _add(result, [broken("attention backends", "this GPU", error)], report)
    else:
        if not backends:
            names = ", ".join(GPU_BACKENDS)
            rows = [broken("attention backends", "this GPU", f"none of {names} runs here")]
            _add(result, rows, report)
    if backends:
        _preload()
        runs = {}
        for setup in engines.setups(backends):
            if (limit := min(ENGINE_SECONDS, end - time.monotonic())) < 1:
                _add(result, [broken("engine", str(setup), "no time is left")], report)
            elif (found := _run_engine(result, setup, limit, report)) is not None:
                runs[setup] = found
        _add(result, engines.compare(runs), report)
    began = time.monotonic()
    try:
        result.times = run_step(_times, seconds=min(TIMES_SECONDS, max(1, end - began)))
    except StepError as error:
        report(f"times: {error}")
    result.seconds["times"] = time.monotonic() - began
    for one in result.times:
        report(str(one))
    return result


def _preload() -> None:
    """Import what every engine needs, once for all forked processes."""
    for module in (
        "vllm.entrypoints.llm",
        "vllm.v1.engine.core",
        "vllm.v1.worker.gpu_worker",
        "vllm.v1.worker.gpu.model_runner",
        "vllm.model_executor.models.llava",
        "transformers.models.llava.processing_llava",
        "vl_cache_vllm.worker.gpu_worker",
    ):
        with contextlib.suppress(Exception):  # an engine that needs it will say so
            importlib.import_module(module)


def describe(result: Result) -> dict[str, Any]:
    """The parts of a result as JSON has them."""
    return {
        "rows": [vars(row) | {"passed": row.passed} for row in result.rows],
        "times": [vars(one) for one in result.times],
        "seconds": {name: round(value, 1) for name, value in result.seconds.items()},
    }


def _check_operations(
    result: Result, device: str, seconds: float, report: Callable[[str], Any]
) -> None:
    from vl_cache_vllm.self_check.steps import StepError, run_step

    began = time.monotonic()
    try:
        rows = run_step(_compare_operations, device, seconds=seconds)
    except StepError as error:
        rows = [broken("operations", device, error)]
    result.seconds["operations"] = time.monotonic() - began
    _add(result, rows, report)


def _run_engine(
    result: Result, setup: EngineSetup, seconds: float, report: Callable[[str], Any]
) -> EngineRun | None:
    from vl_cache_vllm.self_check import engines
    from vl_cache_vllm.self_check.steps import StepError, run_step

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            scale = engines.Scale(dtype=engines.number_type())
            return run_step(engines.run, setup, scale, Path(folder), seconds=seconds)
        except StepError as error:
            _add(result, [broken("engine", str(setup), error)], report)
            return None
        finally:
            result.seconds[str(setup)] = time.monotonic() - began


def _compare_operations(device: str) -> list[Row]:
    import torch

    from vl_cache_vllm.self_check import operations

    cases = operations.cases_for(torch.device(device))
    return [*operations.compare(cases, torch.device(device))]


def _times() -> list[Time]:
    import torch

    from vl_cache_vllm.self_check import operations

    return [*operations.times(torch.device("cuda"))]


def _add(result: Result, rows: Iterable[Row], report: Callable[[str], Any]) -> None:
    for row in rows:
        result.rows.append(row)
        report(str(row))


def _verdict(result: Result) -> int:
    """Print the failing rows once more, and return the exit status."""
    wrong = failing(result.rows)
    taken = sum(result.seconds.values())
    print(f"{len(result.rows) - len(wrong)} of {len(result.rows)} rows pass, {taken:.0f} s")
    for row in wrong:
        print(row)
    return 1 if wrong or not result.rows else 0


if __name__ == "__main__":
    sys.exit(main())
