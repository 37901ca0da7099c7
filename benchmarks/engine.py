# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, for the benchmarks and the tests, and the trace that evictions leave."""

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory


@contextlib.contextmanager
def running_llm(**arguments: Any) -> Iterator[LLM]:
    """``LLM(**arguments)``, gone afterwards; one at a time in a process."""
    llm = LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def read_trace(path: Path) -> dict[str, dict[str, Any]]:
    """Evictions by request id; the engine appends a random suffix to the ids of `LLM`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["request_id"]: record for record in records}
