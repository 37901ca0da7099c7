# SPDX-License-Identifier: Apache-2.0
"""Requests with settings of their own, in one batch."""

from pathlib import Path
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from testing import engine as harness
from testing import tiny_models
from testing.engine import read_trace

SETTINGS = {"policy": "vlcache", "budget": 0.1}
QUESTION = "Describe everything that you can see in the picture, from left to right. " * 4
# extra_args and the same as settings of an engine.
REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kv_budget": 0.05}, {"budget": 0.05}),
    ({"kv_budget": 0.2}, {"budget": 0.2}),
    ({"kv_budget": 1.0}, {"budget": 1.0}),
    ({}, {}),
    ({"kv_budget": 0.3, "kv_policy_options": {"max_observation_tokens": 16}}, {}),
    ({"kv_policy_options": '{"pooling": 7, "uniform_mix": 0.5}', "other": 1}, {}),
]
REQUESTS[4][1].update(budget=0.3, max_observation_tokens=16)
REQUESTS[5][1].update(pooling=7, uniform_mix=0.5)


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


@pytest.mark.both_runners
def test_budgets_side_by_side(model: Path, tmp_path: Path) -> None:
    """Each as in an engine of its own with these settings."""
    prompts = [harness.image_request("llava", QUESTION, [i]) for i in range(len(REQUESTS))]
    params = [harness.greedy(24, extra_args=extra) for extra, _ in REQUESTS]
    trace = tmp_path / "trace.jsonl"

    def tracing(file: Path) -> dict[str, Any]:
        return {"trace": {"path": str(file), "positions": True}}

    with harness.engine(model, SETTINGS | tracing(trace), max_num_batched_tokens=8192) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
    records = {key.split("-")[0]: record for key, record in read_trace(trace).items()}
    for (_, settings), prompt, output in zip(REQUESTS, prompts, together, strict=True):
        own = tmp_path / f"{output.request_id}.jsonl"
        with harness.engine(model, SETTINGS | settings | tracing(own)) as llm:
            (alone,) = llm.generate([prompt], harness.greedy(24), use_tqdm=False)
        assert harness.token_ids(output) == harness.token_ids(alone)
        assert harness.logprobs(output) == pytest.approx(harness.logprobs(alone), abs=1e-4)
        if settings.get("budget") == 1.0:
            assert output.request_id not in records
            assert not own.exists() or not own.read_text()
            continue
        record = records[output.request_id]
        (expected,) = read_trace(own).values()
        assert record["budget"] == settings.get("budget", 0.1)
        for name in ("kept_blocks", "kept_tokens", "kept_positions"):
            assert record[name] == expected[name]
    assert {r["kept_blocks"] for r in records.values()} > {2, 4}  # of 37 blocks at 5 and 10 %


def test_without_compression_a_budget_is_refused(model: Path) -> None:
    with harness.engine(model) as llm:
        prompt = harness.image_request("llava", QUESTION)
        with pytest.raises(VLLMValidationError, match="started without --kv-compress"):
            llm.generate(prompt, harness.greedy(2, extra_args={"kv_budget": 0.5}), use_tqdm=False)
        (output,) = llm.generate(prompt, harness.greedy(2, extra_args={"x": 1}), use_tqdm=False)
        assert len(harness.token_ids(output)) == 2
