# SPDX-License-Identifier: Apache-2.0
"""Where a request's own settings go, for each endpoint that generates: docs/guide.md has the table.

vLLM ignores fields that it does not know, so a setting in the wrong place changes nothing.
"""

import json
import math
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testing import tiny_models
from testing.engine import read_trace
from testing.server import Server, running

ROOT = Path(__file__).parents[2]
TEXT = "Tell me all that you know about the old mill by the river, and who lives in it. " * 8
USER = [{"role": "user", "content": TEXT}]
NAME = "tiny"
TOKENS = list(range(40, 100)) * 8

# What to ask, where settings go, and places that look right where they are ignored.
ENDPOINTS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "/v1/chat/completions": (
        {"messages": USER, "max_tokens": 4},
        "vllm_xargs",
        ("", "extra_body", "extra_args"),
    ),
    "/v1/completions": (
        {"prompt": TEXT, "max_tokens": 4},
        "vllm_xargs",
        ("", "extra_body", "extra_args"),
    ),
    "/v1/responses": (
        {"input": TEXT, "max_output_tokens": 4},
        "vllm_xargs",
        ("", "extra_body", "extra_args"),
    ),
    "/v1/messages": (
        {"model": NAME, "messages": USER, "max_tokens": 4},
        "vllm_xargs",
        ("", "extra_body", "extra_args", "metadata"),
    ),
    "/inference/v1/generate": (
        {"token_ids": TOKENS, "sampling_params": {"max_tokens": 4}},
        "sampling_params.extra_args",
        ("", "vllm_xargs", "extra_args", "sampling_params", "sampling_params.vllm_xargs"),
    ),
    "/v1/chat/completions/batch": (
        {"messages": [USER], "max_tokens": 4},
        "vllm_xargs",
        ("", "extra_body", "extra_args"),
    ),
}
WRONG = [(path, place) for path, (_, _, wrong) in ENDPOINTS.items() for place in wrong]


def with_setting(path: str, place: str, budget: float) -> dict[str, Any]:
    """An endpoint's body with ``kv_budget`` at a dotted place; "" is its top level."""
    body = json.loads(json.dumps(ENDPOINTS[path][0]))
    target = body
    for name in filter(None, place.split(".")):
        target = target.setdefault(name, {})
    target["kv_budget"] = budget
    return body


def test_the_guide_has_the_table() -> None:
    guide = (ROOT / "docs/guide.md").read_text()
    for path, (_, place, _) in ENDPOINTS.items():
        example = json.dumps({"kv_budget": 0.25})
        for name in reversed(place.split(".")):
            example = json.dumps({name: json.loads(example)})
        assert f"| `{path}` | `{example[1:-1]}` |" in guide, path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("endpoints") / "trace.jsonl"


@pytest.fixture(scope="module")
def server(models_dir: Path, trace: Path) -> Iterator[Server]:
    """Text-only prompts are evicted, because one endpoint takes no images."""
    arguments = (
        "--kv-compress=snapkv",
        "--kv-compress-text",
        "--kv-compress-budget=0.1",
        f'--kv-compress-config={{"trace": {{"path": "{trace}"}}}}',
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=2048",
        "--block-size=32",
        "--kv-cache-memory-bytes=16M",
        f"--served-model-name={NAME}",
        "--enable-scale-out",  # for /inference/v1/generate
    )
    model = tiny_models.build("llava", models_dir / "llava")
    with running(model, trace.with_suffix(".log"), *arguments) as server:
        yield server


def kept(server: Server, trace: Path, path: str, body: dict[str, Any]) -> tuple[int, int]:
    """Blocks that a request keeps, and blocks of its prompt."""
    with server.post(path, body) as response:
        assert response.status == 200
        response.read()
    record = list(read_trace(trace).values())[-1]
    return record["kept_blocks"], record["blocks"]


@pytest.mark.server
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_setting_in_its_place(server: Server, trace: Path, path: str) -> None:
    place = ENDPOINTS[path][1]
    num_kept, num_blocks = kept(server, trace, path, with_setting(path, place, 0.5))
    assert num_kept == math.ceil(num_blocks / 2)
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(path, with_setting(path, place, 7))
    assert error.value.code == 400
    assert "kv_budget must be greater than 0" in error.value.read().decode()


@pytest.mark.server
@pytest.mark.parametrize(("path", "place"), WRONG)
def test_a_setting_elsewhere_is_ignored(server: Server, trace: Path, path: str, place: str) -> None:
    """Without a word, by vLLM: even one that is wrong."""
    num_kept, num_blocks = kept(server, trace, path, with_setting(path, place, 7))
    assert num_kept == math.ceil(num_blocks / 10)
