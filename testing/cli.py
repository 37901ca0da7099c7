# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the command lines of benchmarks, checks and evaluation."""

import argparse
import os
from pathlib import Path

# vLLM reads these when it is imported. With the engine core in the same process, steps can be
# timed one by one and the scheduler and worker can be inspected.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def set_vllm_environment(**changed: str) -> None:
    """Set `ENVIRONMENT`, where the user has not; call it before vLLM is imported.

    Args:
        changed: values that replace those of `ENVIRONMENT`.
    """
    for name, value in {**ENVIRONMENT, **changed}.items():
        os.environ.setdefault(name, value)


def make_parser(doc: str | None, json: bool = True) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it is.

    Args:
        doc: the docstring.
        json: add ``--json FILE``.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if json:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    return parser
