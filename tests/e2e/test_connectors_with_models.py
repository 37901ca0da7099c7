# SPDX-License-Identifier: Apache-2.0
"""KV connectors and models whose layers do not all have ordinary attention.

Beside full attention lie sliding windows, states, or layers that read another one's cache: a hit
must end where the observed part begins, because nothing before its end can be computed again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.config import KVTransferConfig

import testing.random_weights  # noqa: F401  registers the load format
from testing import engine as harness
from testing import model_zoo, offloading
from testing.tiny_models import random_image
from tests.e2e import test_latent_attention as latent
from tests.e2e.test_connectors import Offloaded, kept_positions, settings_with_trace
from tests.helpers import connectors
from tests.helpers.connectors import (
    HOST_BYTES,
    abort_and_preempt,
    answers,
    assert_nothing_leaks,
    assert_same,
    check_stores,
)

both_runners = pytest.mark.both_runners

LONG = "Describe everything that you can see in the picture, from left to right. "
OTHER = "And what colour is it? " + LONG
QUESTIONS = (LONG * 2, OTHER, OTHER)  # the last one is stored beyond where its hit must end
SETTINGS = {"policy": "vlcache", "budget": 0.25}

connect = connectors.connect


@contextmanager
def engine(
    models_dir: Path, kind: str, settings: dict[str, Any] | None = SETTINGS, **kwargs: Any
) -> Iterator[LLM]:
    kwargs = {"max_model_len": 1024, "kv_cache_memory_bytes": 64 << 20} | kwargs
    with harness.engine(
        model_zoo.build(kind, models_dir / kind),
        settings,
        dtype=model_zoo.dtype(kind),
        load_format="random",
        trust_remote_code=model_zoo.has_code(kind),
        **kwargs,
    ) as llm:
        yield llm


def request(kind: str, question: str, seed: int) -> Any:
    images = [random_image(seed), random_image(seed + 1)]
    return {
        "prompt": model_zoo.prompt_for(kind, question, 2),
        "multi_modal_data": model_zoo.image_data(kind, images),
    }


def ask_all(llm: LLM, kind: str, resets: bool) -> list[RequestOutput]:
    """One request at a time: rounding depends on the batch and on where a prefill begins."""
    found = []
    for question in QUESTIONS:
        for seed in (0, 10):
            found += answers(llm, [request(kind, question, seed)])
        if resets:
            harness.settle(llm)
            assert llm.reset_prefix_cache()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("gemma3", {}, id="gemma3", marks=both_runners),
        pytest.param("gemma4", {"async_scheduling": True}, id="gemma4-async"),
        pytest.param("gemma4-shared-kv", {}, id="gemma4-shared-kv"),
        pytest.param("qwen3.5", {}, id="qwen3.5"),
        pytest.param("qwen3.5", {"max_num_batched_tokens": 96}, id="qwen3.5-chunked"),
        pytest.param("lfm2-vl", {}, id="lfm2-vl"),
    ],
)
def test_a_loaded_hit_is_like_a_local_one(
    models_dir: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    local, loaded = tmp_path / "local.jsonl", tmp_path / "loaded.jsonl"
    with engine(models_dir, kind, settings_with_trace(local), **options) as llm:
        expected = ask_all(llm, kind, resets=False)
    options = options | {"kv_transfer_config": offloading.config(HOST_BYTES)}
    with engine(models_dir, kind, settings_with_trace(loaded), **options) as llm:
        offloaded = Offloaded(llm)
        found = ask_all(llm, kind, resets=True)
        assert offloaded.stored and offloaded.loaded
        assert_nothing_leaks(llm)
    assert_same(found, expected)
    hits = [output.num_cached_tokens for output in expected]
    assert [output.num_cached_tokens for output in found] == hits
    assert hits[:2] == [0, 0] and min(hits[2:]) > 100
    assert kept_positions(loaded) == kept_positions(local)
    assert len(kept_positions(loaded)) == 6


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["", "async"])
def test_aborted_and_preempted(models_dir: Path, async_scheduling: bool) -> None:
    """Requests that load hold blocks of both groups in a pool that is too small for all."""
    kind, settings = "gemma3", SETTINGS | {"output_reserve": False}
    requests = [request(kind, QUESTIONS[0], 2 * number) for number in range(6)]
    with engine(models_dir, kind, enable_prefix_caching=False) as llm:
        expected = answers(llm, requests)
    options: dict[str, Any] = {"num_gpu_blocks_override": 56, "max_model_len": 512}
    options |= {"kv_transfer_config": offloading.config(HOST_BYTES)}
    with engine(models_dir, kind, settings, async_scheduling=async_scheduling, **options) as llm:
        offloaded = Offloaded(llm)
        abort_and_preempt(llm, requests)
        assert any(one.num_preemptions for one in offloaded.requests)
        assert llm.reset_prefix_cache()
        loaded = offloaded.loaded
        assert_same(answers(llm, requests), expected)
        assert offloaded.loaded > loaded
        assert offloaded.stored <= offloaded.of_prompts
        assert_nothing_leaks(llm)


@pytest.mark.parametrize("connector", ["offloading", "lmcache"])
def test_latent_attention(
    models_dir: Path, tmp_path: Path, connect: Callable[[str], KVTransferConfig], connector: str
) -> None:
    """vLLM's CPU platform serves it without a prefix cache."""
    new, loaded = tmp_path / "new.jsonl", tmp_path / "loaded.jsonl"
    requests = [latent.request(QUESTIONS[0], seed) for seed in (0, 10, 20)]
    with latent.start(models_dir, settings_with_trace(new)) as llm:
        expected = answers(llm, requests)
    settings, transfer = settings_with_trace(loaded), connect(connector)
    with latent.start(models_dir, settings, kv_transfer_config=transfer) as llm:
        if connector == "lmcache":
            check_stores(llm)
        for is_loaded in (False, True):
            found = answers(llm, requests)
            assert_same(found, expected)
            assert all(bool(output.num_cached_tokens) == is_loaded for output in found)
            harness.settle(llm)
        assert_nothing_leaks(llm)
    assert kept_positions(loaded)[:3] == kept_positions(loaded)[3:] == kept_positions(new)
