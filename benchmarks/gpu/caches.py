# SPDX-License-Identifier: Apache-2.0
"""Compiled code, packed in parts small enough to travel from one machine to the next."""

import io
import tarfile
from pathlib import Path

PART_BYTES = 15 << 20
MAX_PARTS = 5
PREFIX = "caches.tar.xz."
MAX_FILE_BYTES = 8 << 20
"""Larger files are left out."""


def folders(root: Path) -> dict[str, Path]:
    """Environment variables with the folders below ``root`` where code is cached."""
    return {
        "TRITON_CACHE_DIR": root / "triton",
        "TORCHINDUCTOR_CACHE_DIR": root / "inductor",
        "VLLM_CACHE_ROOT": root / "vllm",
    }


def pack(root: Path, out: Path) -> float:
    """Write all that is below ``root`` to parts in ``out``; their size in MiB.

    If the parts would be too many, nothing is written: a part of an archive is of no use.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=1) as archive:
        for path in sorted(root.rglob("*")) if root.exists() else []:
            if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                archive.add(path, path.relative_to(root), recursive=False)
    content = buffer.getvalue()
    if len(content) > MAX_PARTS * PART_BYTES:
        return 0.0
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        (out / f"{PREFIX}{number:02}").write_bytes(content[start : start + PART_BYTES])
    return len(content) / (1 << 20)


def unpack(carried: Path, root: Path) -> float:
    """Unpack the parts of a folder, if there are any; their size in MiB."""
    content = b"".join(path.read_bytes() for path in sorted(carried.glob(f"{PREFIX}*")))
    if content:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
            archive.extractall(root, filter="data")
    return len(content) / (1 << 20)
