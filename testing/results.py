# SPDX-License-Identifier: Apache-2.0
"""Result files: what was measured, on which machine, with which versions and command."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # one row of a result, with the keys of its JSON


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, GPU, and the versions of the relevant packages."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    names = ("torch", "triton", "transformers", "vllm", "vl-cache-vllm", "xformers", "kvpress")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    if commit := _commit():
        versions["commit"] = commit
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **gpu,
        "python": platform.python_version(),
        **versions,
    }


def _commit() -> str:
    """The commit of the source tree; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()
    return ""


def to_json(value: Any, indent: str = "") -> str:
    """JSON with one entry a line, but a list of numbers or of words on a single line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(str(key))}: {to_json(v, inner)}" for key, v in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        lines = [to_json(v, inner) for v in value]
        opening, closing = "[]"
    else:
        return json.dumps(value)
    return f"{opening}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{closing}"


def make_report(module: str, arguments: Sequence[str] | None, **contents: Any) -> dict[str, Any]:
    """Results with the command and the machine.

    Args:
        module: the module that was run.
        arguments: its arguments; None stands for those of this process.
        contents: the results and settings.
    """
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", module, *given])
    return {"command": command, "machine": describe_machine(), **contents}


def write_report(path: Path, module: str, arguments: Sequence[str] | None, **contents: Any) -> None:
    """Write `make_report` to a file as JSON; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(make_report(module, arguments, **contents)) + "\n")
