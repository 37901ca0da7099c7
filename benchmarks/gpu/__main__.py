# SPDX-License-Identifier: Apache-2.0
"""What a GPU must answer, in three calls that together take less than fifteen minutes.

    python -m benchmarks.gpu right --out OUT [--seconds 280]
    python -m benchmarks.gpu fast --out OUT --carried FOLDER [--seconds 250]
    python -m benchmarks.gpu why --out OUT --carried FOLDER [--seconds 130] [--steps NAME ...]

`right` asks whether eviction is right on this GPU; it begins with the self-check. `fast` measures
what eviction costs and gains. `why` explains: host time, profile, memory; with ``--steps`` it runs
any steps of any call, first those that failed. ``--list`` shows the steps.

Each step has a process and a time limit of its own, and none stops the next. A step starts if at
least half of its time is left. OUT receives at most seven files: CALL.json and CALL.log, written
after every step, and the caches of compiled code in up to five parts of 15 MiB. A later call on
another machine finds these in ``--carried`` and compiles nothing twice.

No network is needed: the models have dummy or generated weights. If this package is not installed,
a copy with its metadata is assembled in a temporary folder on PYTHONPATH.
"""

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import caches
from benchmarks.gpu.report import LOG, Report, say
from benchmarks.gpu.step import Step
from testing.cli import make_parser

ROOT = Path(__file__).resolve().parents[2]
PREPARED = "VL_CACHE_GPU_PREPARED"
"""Environment variable of a process whose environment `prepare` has set."""
PACKING_SECONDS = 15.0
ENVIRONMENT = {
    "VL_CACHE_VLLM_TRY_GPU": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "PYTHONUNBUFFERED": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",  # shows what vLLM's monitor sees compiled while serving
}
SECONDS = {"right": 280.0, "fast": 250.0, "why": 130.0}


def steps() -> dict[str, tuple[Step, ...]]:
    """The steps of each call, in order."""
    from benchmarks.gpu import fast, right, why

    return {"right": right.STEPS, "fast": fast.STEPS, "why": why.STEPS}


def install(folder: Path) -> list[str]:
    """Folders for PYTHONPATH that contain this package with its metadata, as if installed.

    Args:
        folder: empty; receives the package if it is not installed.
    """
    # Metadata that a build left in the source tree does not count: the tree itself does not have
    # the kernels inside the package.
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    if any(importlib.metadata.distributions(name="vl-cache-vllm", path=elsewhere)):
        return [str(ROOT)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # A source tree may have a link to the kernels in the package.
    ignored = shutil.ignore_patterns("kernels")
    shutil.copytree(ROOT / "vl_cache_vllm", folder / "vl_cache_vllm", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "vl_cache_vllm" / "kernels")
    info = folder / "vl_cache_vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vl-cache-vllm\nVersion: 0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return [str(folder), str(ROOT)]


def prepare(folder: Path, out: Path, call: str) -> dict[str, str]:
    """The environment of a call.

    Args:
        folder: temporary.
        out: receives the log.
        call: name of the call.
    """
    package = folder / "package"
    package.mkdir()
    paths = [*install(package), os.environ.get("PYTHONPATH", "")]
    from vl_cache_vllm.self_check import cli

    return {
        **cli.ENVIRONMENT,
        **os.environ,
        **ENVIRONMENT,
        **{name: str(path) for name, path in caches.folders(folder / "caches").items()},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        PREPARED: str(folder),
        LOG: str(out / f"{call}.log"),
    }


def run(call: str, chosen: Sequence[Step], out: Path, seconds: float) -> list[str]:
    """Run steps; the names of those that failed or found a failing row.

    Args:
        call: name of the call, and of its result files.
        chosen: steps, in order.
        out: receives the result file after every step.
        seconds: time for all of them.
    """
    end = time.monotonic() + seconds
    report = Report(out / f"{call}.json", call)
    failed = []
    for step in chosen:
        left = end - time.monotonic()
        if left < step.seconds / 2:
            say(f"== {step.name}: not started, {left:.0f} s left")
            report.add(step.name, {"skipped": f"{left:.0f} s left"}, 0.0)
            continue
        limit = min(step.seconds, left)
        say(f"== {step.name}: {step.question} (at most {limit:.0f} s)")
        began = time.monotonic()
        result = step.run(limit)
        taken = time.monotonic() - began
        report.add(step.name, result, taken)
        if problem := result.get("error") or result.get("failing"):
            failed.append(step.name)
            say(f"== {step.name}: FAILED: {problem}")
        say(f"== {step.name}: {taken:.1f} s")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("call", choices=sorted(SECONDS))
    parser.add_argument("--out", type=Path, metavar="OUT", default=Path("gpu-results"))
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="with caches of a call")
    parser.add_argument("--seconds", type=float, help="time for the steps of this call")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these, of any call")
    parser.add_argument("--list", action="store_true", help="list the steps and exit")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    if PREPARED not in os.environ and not options.list:
        _start_again(options, out)
    available = {step.name: step for one in steps().values() for step in one}
    chosen = list(steps()[options.call])
    if options.steps:
        if unknown := set(options.steps) - set(available):
            parser.error(f"unknown steps: {', '.join(sorted(unknown))}")
        chosen = [available[name] for name in options.steps]
    if options.list:
        for step in chosen:
            print(f"{step.name:<14}{step.seconds:>5.0f} s  {step.question}")
        return 0
    seconds = SECONDS[options.call] if options.seconds is None else options.seconds
    folder = Path(os.environ[PREPARED])
    if options.carried is not None:
        say(f"caches carried: {caches.unpack(options.carried, folder / 'caches'):.1f} MiB")
    try:
        failed = run(options.call, chosen, out, seconds - PACKING_SECONDS)
        say(f"caches packed: {caches.pack(folder / 'caches', out):.1f} MiB")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{options.call}: failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _start_again(options: argparse.Namespace, out: Path) -> None:
    """Replace this process by one with the environment of `prepare`, in a neutral folder."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="vl-cache-gpu."))
    environment: dict[str, Any] = prepare(folder, out, options.call)
    command = [sys.executable, "-m", "benchmarks.gpu", options.call, "--out", str(out)]
    if options.carried is not None:
        command += ["--carried", str(options.carried.resolve())]
    if options.seconds is not None:
        command += ["--seconds", str(options.seconds)]
    if options.steps:
        command += ["--steps", *options.steps]
    # Not the source tree: its package has no kernels inside.
    os.chdir(folder)
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    sys.exit(main())
