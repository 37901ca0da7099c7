# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on, and the file that says so."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, object]:
    """Processor, cores, memory, GPU, and the versions of what is installed of what matters."""
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
    """Of the tree that this file is part of; empty if it is in no repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    with contextlib.suppress(OSError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()
    return ""


def write_report(path: Path, module: str, arguments: Sequence[str], **contents: Any) -> None:
    """Write results as JSON, with the command and the machine; makes the folder."""
    report = {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "machine": describe_machine(),
        **contents,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
