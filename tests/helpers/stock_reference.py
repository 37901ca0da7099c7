# SPDX-License-Identifier: Apache-2.0
"""Outputs of vLLM without our plugin: run as a program, with VLLM_PLUGINS empty, prints JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from testing import engine as harness


def mixed_requests() -> list[dict[str, Any]]:
    """8 requests: one and two images, no image, short and long questions."""
    text = "Tell me about blocks and pages, " * 12
    return [
        harness.image_request("llava", "What is in the picture?", [1]),
        {"prompt": f"USER: {text}\nASSISTANT:"},
        harness.image_request("llava", "Compare the two pictures." + text, [2, 3]),
        harness.image_request("llava", "?", [4]),
        {"prompt": "USER: Hi\nASSISTANT:"},
        harness.image_request("llava", text, [5]),
        harness.image_request("llava", "What is in the picture?", [6]),
        {"prompt": f"USER: {text[::-1]}\nASSISTANT:"},
    ]


def run(model: Path, kv_compress: dict[str, Any] | None, **kwargs: Any) -> list[list[Any]]:
    """Token ids and log-probabilities of the mixed requests, all at once."""
    with harness.engine(model, kv_compress, **kwargs) as llm:
        outputs = llm.generate(mixed_requests(), harness.greedy(40), use_tqdm=False)
        return [[harness.token_ids(o), harness.logprobs(o)] for o in outputs]


def run_without_plugin(model: Path) -> list[list[Any]]:
    """`run` in a process where vLLM loads no plugin."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.stock_reference", str(model)],
        env={**os.environ, "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    outcome = run(Path(sys.argv[1]), None)
    from vllm.engine.arg_utils import EngineArgs

    assert not hasattr(EngineArgs, "_vl_cache_installed"), "the plugin was loaded"
    print(json.dumps(outcome))
