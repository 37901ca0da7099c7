# SPDX-License-Identifier: Apache-2.0
"""Records of the check: a file for each combination of GPU, driver and versions.

They lie in vLLM's cache folder (``VLLM_CACHE_ROOT``), as everything that vLLM can make again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COMMAND = "vl-cache-check"
FOLDER = "vl_cache_check"

Combination = Mapping[str, str]


def combination(device: int = 0) -> Combination:
    """What a check holds for: the GPU, its driver, and the versions of all code that runs on it.

    Args:
        device: index of a visible GPU.
    """
    import torch
    import triton
    import vllm
    from vllm.platforms import current_platform

    from vl_cache_vllm import __version__

    return {
        "gpu": current_platform.get_device_name(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": vllm.__version__,
        "vl-cache-vllm": __version__,
        "source": source_digest(),
    }


def driver_version() -> str:
    """Version of the NVIDIA driver; "unknown" where NVML is missing."""
    from vllm.utils.import_utils import import_pynvml

    nvml: Any = import_pynvml()
    try:
        nvml.nvmlInit()
        try:
            version = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError:
        return "unknown"
    return version.decode() if isinstance(version, bytes) else str(version)


def source_digest() -> str:
    """A hash of this package's source, which differs between builds of one version."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    # In a source tree kernels/ is a link, which a recursive search does not follow.
    for path in sorted({*package.rglob("*.py"), *(package / "kernels").glob("*.py")}):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(combined: Combination) -> Path:
    """Where the record of a combination is."""
    from vllm import envs

    key = hashlib.sha256(json.dumps(combined, sort_keys=True).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / FOLDER / f"{key}.json"


def write(combined: Combination, failing: Sequence[str], **contents: Any) -> Path:
    """Write a record; other processes see it whole.

    Args:
        combined: what was checked.
        failing: rows that failed; empty: the check passed.
        contents: further entries.

    Raises:
        OSError: if the cache folder cannot be written.
    """
    path = path_of(combined)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"combination": dict(combined), "passed": not failing, "failing": [*failing]}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(json.dumps(record | contents, indent=1) + "\n")
    os.chmod(file.name, 0o644)  # a server may run as another user than the check
    os.replace(file.name, path)
    return path


def read(combined: Combination) -> dict[str, Any] | None:
    """The record of exactly this combination; None if there is none that can be read."""
    try:
        record = json.loads(path_of(combined).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("combination") != dict(combined):
        return None
    return record


def has_passed(combined: Combination) -> bool:
    """Whether a check of exactly this combination passed."""
    record = read(combined)
    return record is not None and record.get("passed") is True


def missing_check() -> str | None:
    """Why KV compression may not start on the visible GPUs; None if all kinds of them passed."""
    from vllm.platforms import current_platform

    count = max(1, current_platform.device_count())
    kinds: dict[str, int] = {}
    for device in range(count):
        kinds.setdefault(current_platform.get_device_name(device), device)
    for name, device in kinds.items():
        combined = combination(device)
        record = read(combined)
        if record is not None and record.get("passed") is True:
            continue
        command = COMMAND if len(kinds) == 1 else f"CUDA_VISIBLE_DEVICES={device} {COMMAND}"
        if record is None:
            return (
                f"a GPU that has not been checked with this driver and these versions ({name}): "
                f"run {command} once, which takes about three minutes"
            )
        rows = ", ".join(map(str, record.get("failing", ())))
        return (
            f"a GPU that failed its check ({name}; failing: {rows}): please report the table that "
            f"{command} prints"
        )
    return None
