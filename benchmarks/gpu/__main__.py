# SPDX-License-Identifier: Apache-2.0
"""Everything that waits for a GPU, in stages that each fit into a call of ten minutes.

    python -m benchmarks.gpu --out FOLDER [--minutes 9] [--stages kernels ...] [--list]

A stage writes FOLDER/STAGE.json and is not run again while that file is there. No stage is started
that may not end within ``--minutes``; the same command goes on with the rest. Needs no network: the
models have no weights, or random ones. Where this package is not installed, as on a machine whose
vLLM was only unpacked, it is put together in a folder on PYTHONPATH.
"""

import argparse
import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_STOP = 20
_OFFLINE = ("--engines", "stock", "ours", "whole", "--repeats", "3")
_TURNS = ("--images", "2", "8", "--prefills", "30", "--kv-cache-gib", "5")


@dataclass(frozen=True)
class Stage:
    """A command that takes ``--json FILE``."""

    name: str
    what: str
    minutes: float
    """At most."""
    command: tuple[str, ...]


def _offline(shape: str, name: str, what: str, *arguments: str) -> Stage:
    # Three engines of 7B and their caches do not fit into 80 GB.
    command = ("benchmarks.offline", "--shape", shape, "--one-at-a-time", *_OFFLINE, *arguments)
    return Stage(f"{name}-{shape}", what, 9, command)


def _stages() -> tuple[Stage, ...]:
    kernels = ("--block-size", "16", "--tokens", "2048", "8192", "32768")
    stages = [
        Stage("agreement", "engines evict alike; nothing waits", 8, ("benchmarks.gpu.agreement",)),
        Stage("oracle", "observation beside xformers", 4, ("benchmarks.gpu.oracle",)),
    ]
    for shape in ("7b-mha", "7b-gqa"):
        gib = "24" if shape == "7b-mha" else "8"
        what = "operations against torch's and their bytes"
        command = ("benchmarks.kernels", "--shapes", shape, *kernels)
        stages.append(Stage(f"kernels-{shape}", what, 5, command))
        short = ("--images", "2", "8", "--batch", "1", "16", "--max-images", "32")
        stages.append(
            _offline(shape, "offline", "one batch, 2K and 8K", *short, "--kv-cache-gib", gib)
        )
        long = ("--images", "32", "--batch", "1", "--max-images", "32", "--max-model-len", "65536")
        stages.append(_offline(shape, "long", "one batch, 32K", *long, "--kv-cache-gib", gib))
        what = "steps in turns: nothing evicted, and evicted, 2K and 8K"
        batch = ("1",) if shape == "7b-mha" else ("1", "8")
        command = ("benchmarks.turns", "--shape", shape, "--engines", "whole", "ours", *_TURNS)
        stages.append(Stage(f"turns-{shape}", what, 9, (*command, "--batch", *batch)))
        what = "servers at growing load, the pool limited"
        command = ("benchmarks.serving", "--profile", f"gpu-{shape}")
        stages.append(Stage(f"serving-{shape}", what, 9, command))
    return tuple(stages)


STAGES = _stages()


def install(folder: Path) -> list[str]:
    """Folders for PYTHONPATH with this package as an installation would have it."""
    # What setup left in the tree is no installation: that alone has the kernels in the package.
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    if any(importlib.metadata.distributions(name="vl-cache-vllm", path=elsewhere)):
        return [str(ROOT)]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    shutil.copytree(ROOT / "vl_cache_vllm", folder / "vl_cache_vllm")
    shutil.copytree(ROOT / "kernels", folder / "vl_cache_vllm" / "kernels")
    info = folder / "vl_cache_vllm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vl-cache-vllm\nVersion: 0\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return [str(folder), str(ROOT)]


def call(command: Sequence[str], log: Path, seconds: float, **how: Any) -> int:
    """Exit code of a command; past its time it and all that it started are stopped."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background jobs ignore it, and so would what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **how,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # a benchmark then stops its servers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
            return -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(stages: Sequence[Stage], out: Path, minutes: float) -> list[str]:
    """Run what is missing and fits; the names of those that failed."""
    end = time.monotonic() + 60 * minutes
    failed = []
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = [*install(Path(folder)), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "VL_CACHE_VLLM_TRY_GPU": "1",
        }
        for stage in stages:
            result, log = out / f"{stage.name}.json", out / f"{stage.name}.log"
            if result.exists():
                print(f"{stage.name}: done before", flush=True)
                continue
            left = end - time.monotonic()
            if left < 60 * stage.minutes:
                print(f"{stage.name}: left for the next call", flush=True)
                continue
            print(f"{stage.name}: {stage.what}", flush=True)
            command = [sys.executable, "-m", *stage.command, "--json", str(result)]
            code = call(command, log, 60 * stage.minutes, cwd=folder, env=environment)
            print(log.read_text(errors="replace")[-1500:], flush=True)
            if code:
                print(f"{stage.name}: FAILED ({code}); see {log}", flush=True)
                failed.append(stage.name)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    options = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    if options.list:
        for stage in chosen:
            command = " ".join(["python", "-m", *stage.command])
            print(f"{stage.name:<16}{stage.what}, {stage.minutes:.0f} minutes: {command}")
        return 0
    failed = run(chosen, options.out, options.minutes)
    done = sum((options.out / f"{stage.name}.json").exists() for stage in STAGES)
    print(f"{done} of {len(STAGES)} stages done, failed now: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
