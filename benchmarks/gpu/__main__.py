# SPDX-License-Identifier: Apache-2.0
"""All measurements that need a GPU, in stages of less than ten minutes each.

    python -m benchmarks.gpu --out FOLDER [--minutes 9] [--stages kernels ...] [--list]

A stage writes FOLDER/STAGE.json and is skipped while that file exists. A stage starts only if its
time limit fits into the remaining ``--minutes``; the same command later continues with the rest.
No network is needed: the models have dummy or random weights. If this package is not installed, a
copy with its metadata is assembled in a temporary folder on PYTHONPATH.
"""

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

from testing.cli import make_parser

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_STOP = 20
_OFFLINE = ("--engines", "stock", "ours", "whole", "--repeats", "3")
_INTERLEAVED = ("--images", "2", "8", "--prefills", "30", "--kv-cache-gib", "5")


@dataclass(frozen=True)
class Stage:
    """A command that accepts ``--json FILE``."""

    name: str
    what: str
    minutes: float
    """Time limit."""
    command: tuple[str, ...]


def _offline(shape: str, name: str, what: str, *arguments: str) -> Stage:
    # Three 7B engines with their caches do not fit into 80 GB.
    command = ("benchmarks.offline", "--shape", shape, "--one-at-a-time", *_OFFLINE, *arguments)
    return Stage(f"{name}-{shape}", what, 9, command)


def _stages() -> tuple[Stage, ...]:
    kernels = ("--block-size", "16", "--tokens", "2048", "8192", "32768")
    stages = [
        Stage(
            "agreement",
            "engines evict the same tokens; no device synchronisation",
            8,
            ("benchmarks.gpu.agreement",),
        ),
        Stage("oracle", "observation compared with xformers", 4, ("benchmarks.gpu.oracle",)),
    ]
    for shape in ("7b-mha", "7b-gqa"):
        gib = "24" if shape == "7b-mha" else "8"
        what = "operations compared with torch and their bandwidth bound"
        command = ("benchmarks.kernels", "--shapes", shape, *kernels)
        stages.append(Stage(f"kernels-{shape}", what, 5, command))
        short = ("--images", "2", "8", "--batch", "1", "16", "--max-images", "32")
        stages.append(
            _offline(
                shape,
                "offline",
                "one batch, prompts of 2K and 8K tokens",
                *short,
                "--kv-cache-gib",
                gib,
            )
        )
        long = ("--images", "32", "--batch", "1", "--max-images", "32", "--max-model-len", "65536")
        stages.append(
            _offline(shape, "long", "one batch, prompt of 32K tokens", *long, "--kv-cache-gib", gib)
        )
        what = "interleaved steps: budget 1.0 and eviction, 2K and 8K tokens"
        batch = ("1",) if shape == "7b-mha" else ("1", "8")
        command = (
            "benchmarks.turns",
            "--shape",
            shape,
            "--engines",
            "whole",
            "ours",
            *_INTERLEAVED,
        )
        stages.append(Stage(f"turns-{shape}", what, 9, (*command, "--batch", *batch)))
        what = "servers at increasing load, limited pool"
        command = ("benchmarks.serving", "--profile", f"gpu-{shape}")
        stages.append(Stage(f"serving-{shape}", what, 9, command))
    return tuple(stages)


STAGES = _stages()


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


def call(command: Sequence[str], log: Path, seconds: float, **how: Any) -> int:
    """Run a command in its own process group, which is ended when the time is over.

    Returns:
        Its exit code; -1 if it was stopped.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # Background jobs of a shell ignore SIGINT, and their children would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **how,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)  # lets a benchmark stop its servers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
            return -1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(stages: Sequence[Stage], out: Path, minutes: float) -> list[str]:
    """Run the stages without a result that fit into the time; return the failed ones."""
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
                print(f"{stage.name}: has a result", flush=True)
                continue
            left = end - time.monotonic()
            if left < 60 * stage.minutes:
                print(f"{stage.name}: not enough time, left for the next call", flush=True)
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
    parser = make_parser(__doc__, json=False)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, default=9.5, help="time for this call")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="STAGE")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    options = parser.parse_args(arguments)
    chosen = [stage for stage in STAGES if stage.name in options.stages]
    if options.list:
        for stage in chosen:
            command = " ".join(["python", "-m", *stage.command])
            print(f"{stage.name:<16}{stage.what}, at most {stage.minutes:.0f} minutes: {command}")
        return 0
    failed = run(chosen, options.out, options.minutes)
    done = sum((options.out / f"{stage.name}.json").exists() for stage in STAGES)
    print(f"{done} of {len(STAGES)} stages have results; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
