# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on, and the file that says so."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def describe() -> dict[str, object]:
    """Processor, cores, memory and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line]
    names = ["torch", "transformers", "vllm", "vl-cache-vllm"]
    if importlib.util.find_spec("kvpress"):  # of benchmarks with peers; no dependency of ours
        names.append("kvpress")
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def write_report(path: Path, module: str, arguments: Sequence[str], **contents: Any) -> None:
    """Write results as JSON, with the command and the machine; makes the folder."""
    report = {
        "command": shlex.join(["python", "-m", module, *arguments]),
        "machine": describe(),
        **contents,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
