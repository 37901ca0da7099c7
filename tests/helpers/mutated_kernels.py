# SPDX-License-Identifier: Apache-2.0
"""Kernels with a planted fault: copies of files of ``kernels/`` with a piece of text replaced."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vl_cache_vllm import kernels
from vl_cache_vllm.ops import dispatch

KERNELS = Path(str(kernels.__file__)).parent


@dataclass(frozen=True)
class Fault:
    """A planted fault, and the rows of the check that must show it."""

    kernel: str
    """Function that has the fault."""
    before: str
    """Text of its file, which occurs once."""
    after: str
    rows: frozenset[str]
    """Names of the failing rows; all others pass."""

    @property
    def file(self) -> str:
        (found,) = [p.stem for p in KERNELS.glob("*.py") if f"def {self.kernel}(" in p.read_text()]
        return found


@contextlib.contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """Run the operations with the fault; Triton reads the source from a file in ``folder``."""
    text = (KERNELS / f"{fault.file}.py").read_text()
    assert text.count(fault.before) == 1, f"{fault.file}: {fault.before!r} must occur once"
    path = folder / f"{fault.file}.py"
    path.write_text(text.replace(fault.before, fault.after))
    name = f"{kernels.__name__}.{fault.file}"
    original = importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    dispatch._find.cache_clear()
    try:
        spec.loader.exec_module(module)
        yield
    finally:
        sys.modules[name] = original
        dispatch._find.cache_clear()
