# SPDX-License-Identifier: Apache-2.0
"""How many functions are called: a measure of work that no machine's load changes."""

import gc
import sys
from collections.abc import Callable
from typing import Any


def calls_during(work: Callable[[], object]) -> int:
    """Calls of Python and C functions while ``work`` runs."""
    count = 0

    def on_event(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.collect()
    gc.disable()
    sys.setprofile(on_event)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count
