# SPDX-License-Identifier: Apache-2.0
"""A refused request leaves the images of others where they are: in the front end and the engine.

vLLM keeps two caches of processed images that must hold the same entries in the same order. These
tests compare the two of a real engine. Three images fit.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs import EngineInput
from vllm.multimodal.cache.base import MultiModalCacheMissError
from vllm.multimodal.cache.lru import LruKeyReplicatedReceiverCache, LruKeyReplicatedSenderCache

from testing import engine as harness
from testing import tiny_models

SETTINGS = {"policy": "vlcache", "budget": 0.25}
IMAGE_SIZE = 112
IMAGE_BYTES = 3 * IMAGE_SIZE**2 * 4  # as processed, in float32
CACHE_GB = 3.5 * IMAGE_BYTES / 2**30
BAD_BUDGET = {"kv_budget": 7}
TOO_MANY_LOGPROBS = 9999  # vLLM refuses it when the images have been processed


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "small-llava", image_size=IMAGE_SIZE)


@contextmanager
def small_cache(model: Path, kv_compress: dict[str, Any] | None) -> Iterator[LLM]:
    with harness.engine(model, kv_compress, mm_processor_cache_gb=CACHE_GB) as llm:
        yield llm


@pytest.fixture(scope="module", params=[SETTINGS, None], ids=["vlcache", "none"])
def llm(request: pytest.FixtureRequest, model: Path) -> Iterator[LLM]:
    with small_cache(model, request.param) as llm:
        yield llm


@pytest.fixture(autouse=True)
def empty(request: pytest.FixtureRequest) -> None:
    if "llm" in request.fixturenames:
        request.getfixturevalue("llm").llm_engine.reset_mm_cache()


def prompt(*seeds: int) -> dict[str, Any]:
    return harness.image_request("llava", "What is it?", list(seeds))


def params(**parameters: Any) -> SamplingParams:
    return harness.greedy(1, **parameters)


def ask(llm: LLM, *seeds: int, **parameters: Any) -> None:
    llm.generate(prompt(*seeds), params(**parameters), use_tqdm=False)


def sender(llm: LLM) -> LruKeyReplicatedSenderCache:
    cache = llm.llm_engine.renderer.mm_processor_cache
    assert isinstance(cache, LruKeyReplicatedSenderCache)
    return cache


def front_end(llm: LLM) -> list[str]:
    """Hashes in the front end's cache, the oldest first."""
    return list(sender(llm)._cache.order)


def engine_core(llm: LLM) -> list[str]:
    """Hashes in the engine's cache, the oldest first."""
    cache = llm.llm_engine.engine_core.engine_core.mm_receiver_cache
    assert isinstance(cache, LruKeyReplicatedReceiverCache)
    return list(cache._cache.order)


def refused(llm: LLM, *seeds: int, **parameters: Any) -> None:
    with pytest.raises(VLLMValidationError):
        ask(llm, *seeds, **parameters)


def rendered(llm: LLM, *seeds: int) -> EngineInput:
    """What callers of AsyncLLM and LLMEngine hand over: the images have been processed."""
    return llm._preprocess_cmpl_one(prompt(*seeds))


def refused_after_rendering(llm: LLM, *seeds: int, **parameters: Any) -> None:
    engine_input = rendered(llm, *seeds)
    with pytest.raises(VLLMValidationError):
        llm.llm_engine.add_request("refused", engine_input, params(**parameters))


def test_three_images_fit(llm: LLM) -> None:
    for seed in range(4):
        ask(llm, seed)
    assert len(front_end(llm)) == 3


@pytest.mark.parametrize("seeds", [(2,), (0,), (3,), (0, 3), (3, 4)], ids=str)
def test_refused_in_front_of_the_cache(llm: LLM, seeds: tuple[int, ...]) -> None:
    """Of the images that are refused 0 is the oldest, 2 the newest, 3 and 4 are new."""
    for seed in range(3):
        ask(llm, seed)
    before = front_end(llm)
    refused(llm, *seeds, extra_args=BAD_BUDGET)
    assert front_end(llm) == before == engine_core(llm)
    ask(llm, 5)
    for seed in (1, 2, 0, *seeds):
        ask(llm, seed)
    assert front_end(llm) == engine_core(llm)


def test_one_of_many_is_refused(llm: LLM) -> None:
    """LLM refuses all of a call; none of its images has been processed then."""
    ask(llm, 0)
    before = front_end(llm)
    with pytest.raises(VLLMValidationError):
        llm.generate(
            [prompt(1), prompt(2)], [params(), params(extra_args=BAD_BUDGET)], use_tqdm=False
        )
    with pytest.raises(VLLMValidationError):
        llm.chat([{"role": "user", "content": "hello"}], params(extra_args=BAD_BUDGET))
    assert front_end(llm) == before == engine_core(llm)
    assert not llm.llm_engine.has_unfinished_requests()


def test_any_order_of_requests(llm: LLM) -> None:
    rng = random.Random(0)
    num_refused = 0
    for _ in range(60):
        seeds = rng.choices(range(6), k=rng.choice((1, 2)))
        if rng.random() < 0.4:
            refused(llm, *seeds, extra_args=BAD_BUDGET)
            num_refused += 1
        else:
            ask(llm, *seeds)
        assert front_end(llm) == engine_core(llm)
    assert 10 < num_refused < 50


def test_refused_after_rendering(llm: LLM) -> None:
    """Known images stay, new ones are sent again, and those pushed out are not missed."""
    for seed in range(3):
        ask(llm, seed)
    (known,) = rendered(llm, 2)["mm_hashes"]["image"]
    refused_after_rendering(llm, 2, extra_args=BAD_BUDGET)
    assert front_end(llm) == engine_core(llm)
    refused_after_rendering(llm, 3, 2, extra_args=BAD_BUDGET)
    assert front_end(llm) == engine_core(llm)[1:]  # 0 was pushed out
    assert sender(llm).is_cached_item(known)
    for seed in (4, 3, 2, 0, 1):
        ask(llm, seed)
        assert front_end(llm) == engine_core(llm)


def test_data_that_the_renderer_did_not_see(llm: LLM) -> None:
    """/inference/v1/generate takes processed images past the front end's cache."""
    ask(llm, 0)
    llm.llm_engine.renderer.clear_mm_cache()
    engine_input = rendered(llm, 0)
    assert engine_input["mm_kwargs"]["image"][0] is not None
    del engine_input["arrival_time"]  # only the renderer sets it
    before = front_end(llm)
    with pytest.raises(VLLMValidationError):
        llm.llm_engine.add_request("refused", engine_input, params(extra_args=BAD_BUDGET))
    assert front_end(llm) == before == engine_core(llm)


def test_what_vllm_refuses_itself(model: Path) -> None:
    """With eviction an image that vLLM refused can be used at once, without it can not."""
    too_long = "x" * (harness.DEFAULTS["max_model_len"] - 60)  # with the image's 64 tokens

    def refuse(llm: LLM, seed: int, question: str, **parameters: Any) -> None:
        request = harness.image_request("llava", question, [seed])
        with pytest.raises(VLLMValidationError):
            llm.generate(request, params(**parameters), use_tqdm=False)

    for settings in (SETTINGS, None):
        with small_cache(model, settings) as llm:
            ask(llm, 0)
            before = front_end(llm)
            refuse(llm, 1, "What is it?", prompt_logprobs=TOO_MANY_LOGPROBS)
            refuse(llm, 2, too_long)
            if settings is not None:
                assert front_end(llm) == before == engine_core(llm)
                ask(llm, 1, 2)
                assert front_end(llm) == engine_core(llm)
            else:
                assert engine_core(llm) == before
                assert len(front_end(llm)) == 3
                with pytest.raises(MultiModalCacheMissError):
                    ask(llm, 1)
