# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, for the benchmarks and the tests, and the trace that evictions leave."""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vllm import LLM

from vl_cache_vllm.inspector.cli import running


def running_llm(**arguments: Any) -> AbstractContextManager[LLM]:
    """``LLM(**arguments)``, gone afterwards; one at a time in a process."""
    return running(lambda: LLM(**arguments))


def read_trace(path: Path) -> dict[str, dict[str, Any]]:
    """Evictions by request id; the engine appends a random suffix to the ids of `LLM`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["request_id"]: record for record in records}
