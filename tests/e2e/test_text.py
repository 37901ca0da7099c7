# SPDX-License-Identifier: Apache-2.0
"""Text tokens: ``--kv-compress-text`` for prompts without images, ``keep_text`` for the others."""

from pathlib import Path

import pytest

from testing import engine as harness
from testing import tiny_models
from testing.engine import held_positions, read_trace

BLOCK = 32
TEXT = {"prompt": "USER: " + "Once upon a time there was a cache that kept everything. " * 9}


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


@pytest.mark.both_runners
@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "h2o", "streamingllm"])
def test_text_only_prompts_are_evicted_too(model: Path, tmp_path: Path, policy: str) -> None:
    trace = tmp_path / "trace.jsonl"
    settings = {"policy": policy, "budget": 0.25, "trace": {"path": str(trace), "positions": True}}
    image = harness.image_request("llava", "What is it? " * 9, [1])
    with harness.engine(
        model, settings | {"text": True}, max_num_batched_tokens=128, enable_chunked_prefill=True
    ) as llm:
        outputs = [
            llm.generate([request], harness.greedy(2 * BLOCK), use_tqdm=False)[0]
            for request in (TEXT, image, TEXT)  # the second time from the prefix cache
        ]
        assert harness.eviction_stats(llm).evicted == 3
    first, _, again = read_trace(trace).values()
    tokens = len(outputs[0].prompt_token_ids)
    assert first["tokens"] == tokens > 400
    assert first["kept_blocks"] == -(-first["blocks"] // 4)
    assert again["kept_positions"] == first["kept_positions"]
    assert harness.token_ids(outputs[2]) == harness.token_ids(outputs[0])
    assert (outputs[2].num_cached_tokens > 0) == (policy != "h2o")  # which observes everything
    if policy == "streamingllm":
        kept = first["kept_blocks"] * BLOCK
        end = tokens // BLOCK * BLOCK  # what stands behind stays, too
        expected = [*range(4), *range(end - kept + 4, end)]
        for layer in first["kept_positions"]:
            assert all(sorted(head) == expected for head in layer)


def test_without_the_flag_they_are_left_alone(model: Path) -> None:
    with harness.engine(model, {"policy": "snapkv", "budget": 0.25}) as llm:
        llm.generate([TEXT], harness.greedy(4), use_tqdm=False)
        assert harness.eviction_stats(llm).skipped == {"text_only": 1}


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "streamingllm"])
def test_long_answers_to_text_are_bounded_with_the_flag(model: Path, policy: str) -> None:
    """Also where the prompt is too short to be evicted itself."""
    short = {"prompt": "USER: Tell me a long story."}
    for text in (True, False):
        settings = {"policy": policy, "budget": 0.25, "text": text, "every": 2 * BLOCK}
        with harness.engine(model, settings) as llm:
            llm.generate([TEXT, short], harness.greedy(6 * BLOCK), use_tqdm=False)
            evictions = harness.eviction_stats(llm).evictions
            assert evictions == ({"prefill": 1, "every": 5} if text else {})


@pytest.mark.both_runners
def test_keep_text(model: Path, tmp_path: Path) -> None:
    """Text around two images stays in every layer and KV head; the scores choose visual tokens."""
    trace = tmp_path / "trace.jsonl"
    settings = {"policy": "vlcache", "budget": 0.25, "uniform_mix": 1.0, "keep_text": True}
    request = harness.image_request("llava", "What is it? " * 3, [1, 2])
    with harness.engine(
        model, settings | {"trace": {"path": str(trace), "positions": True}}
    ) as llm:
        image_token = llm.model_config.hf_config.image_token_index
        (output,) = llm.generate([request], harness.greedy(4), use_tqdm=False)
    (record,) = read_trace(trace).values()
    ids = output.prompt_token_ids
    text = {i for i, token in enumerate(ids) if token != image_token}
    assert 10 < len(text) < min(record["kept_tokens"])
    heads = [set(head) for layer in held_positions(record) for head in layer]
    assert all(text <= head for head in heads)
    assert len({frozenset(head) for head in heads}) > 1
