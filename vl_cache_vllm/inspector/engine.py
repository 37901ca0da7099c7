# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine inside this process, shut down after use. Imports vLLM only when it is needed."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


@contextlib.contextmanager
def running(start: Callable[[], LLM]) -> Iterator[LLM]:
    """Run the engine that ``start`` creates and release everything it holds on exit.

    Only one engine can run in a process at a time.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = start()
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
