# SPDX-License-Identifier: Apache-2.0
"""A real engine follows the method: the evictions and the continuation of `testing.oracle`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from vllm import RequestOutput

from testing import tiny_models
from testing.engine import engine, greedy, image_request, logprobs, read_trace, token_ids
from testing.oracle import MIN_WEIGHT, Continuation, Eviction, Oracle, Settings

QUESTION = "What is in the picture, and what will happen next? Answer in a sentence or two."
NUM_TOKENS = 32
NUM_KV_HEADS = {"gqa": 2, "mha": 4}  # of 4 query heads
# Pixels a side, so that budgets are several blocks: 625 visual tokens an image, and 1296.
IMAGE_SIZE = {32: 350, 128: 504}
MAX_MODEL_LEN = 6144

# Ties within float32 rounding have two right answers. Requests that contain one decide nothing.
MIN_SCORE_GAP = 2e-5
MIN_TOKEN_GAP = 5e-4

both_runners = pytest.mark.both_runners


class Request(NamedTuple):
    """A request that the engine and the oracle both understand."""

    kind: str
    num_images: int
    image_size: int

    def with_seed(self, seed: int) -> dict[str, Any]:
        seeds = range(seed, seed + self.num_images)
        return image_request(self.kind, QUESTION, seeds, (self.image_size, self.image_size))


def method_model(models_dir: Path, heads: str, image_size: int) -> Path:
    """A tiny LLaVA with heads of the kind and images of the size."""
    return tiny_models.build(
        "llava",
        models_dir / f"method-{heads}-{image_size}",
        num_kv_heads=NUM_KV_HEADS[heads],
        image_size=image_size,
    )


def images_of(request: dict[str, Any]) -> list[Image.Image]:
    images = request["multi_modal_data"]["image"]
    return images if isinstance(images, list) else [images]


@pytest.fixture(scope="module")
def load_oracle() -> Callable[[Path], Oracle]:
    return functools.cache(Oracle)


class Case(NamedTuple):
    """A request and what must happen to it."""

    request: dict[str, Any]
    eviction: Eviction
    continuation: Continuation
    without_eviction: Continuation


def decisive_case(oracle: Oracle, request: Request, settings: Settings) -> Case:
    """The case of the first seed with which nothing hinges on rounding."""
    for seed in range(0, 100, 10):
        candidate = request.with_seed(seed)
        eviction = oracle.evict(candidate["prompt"], images_of(candidate), settings)
        if eviction.score_gap < MIN_SCORE_GAP:
            continue
        continuation = oracle.decode(eviction, NUM_TOKENS)
        if min(continuation.gaps) < MIN_TOKEN_GAP:
            continue
        return Case(candidate, eviction, continuation, oracle.decode_full(eviction, NUM_TOKENS))
    raise AssertionError(f"{request}, {settings}: a near tie with every seed")


def check(
    oracle: Oracle,
    model: Path,
    kind: str,
    image_size: int,
    settings: Settings,
    tmp_path: Path,
    image_counts: Sequence[int] = (1, 2),
) -> list[Case]:
    """Compare one engine with the oracle on one request for each number of images."""
    cases = [
        decisive_case(oracle, Request(kind, num_images, image_size), settings)
        for num_images in image_counts
    ]
    # Only what the case changes, so that the engine's defaults are under test too.
    changed = {
        field.name: value
        for field in dataclasses.fields(settings)
        if (value := getattr(settings, field.name)) != field.default
    }
    block_size = changed.pop("block_size")
    kv_compress = {
        "policy": "vlcache",
        **changed,
        "trace": {"path": str(tmp_path / "trace.jsonl"), "positions": True},
    }
    outputs: list[RequestOutput] = []
    with engine(model, kv_compress, block_size=block_size, max_model_len=MAX_MODEL_LEN) as llm:
        for case in cases:
            outputs += llm.generate([case.request], greedy(NUM_TOKENS), use_tqdm=False)
    trace = read_trace(tmp_path / "trace.jsonl")
    assert len(trace) == len(cases)
    for case, output in zip(cases, outputs, strict=True):
        (record,) = (r for i, r in trace.items() if i.startswith(f"{output.request_id}-"))
        assert output.prompt_token_ids == case.eviction.prompt_token_ids
        assert_same_eviction(record, case.eviction)
        assert_same_continuation(output, case)
    return cases


def assert_same_eviction(record: dict[str, Any], expected: Eviction) -> None:
    assert record["density"] == pytest.approx(expected.density, rel=0, abs=1e-4)
    assert record["kept_tokens"] == expected.kept_tokens
    assert record["kept_positions"] == expected.kept_positions
    # The case tells layers apart: with more than one page a layer they are divided unevenly.
    assert (len(set(expected.pages)) > 1) == (record["kept_blocks"] > 1)


def assert_same_continuation(output: RequestOutput, case: Case) -> None:
    assert token_ids(output) == case.continuation.token_ids
    close = functools.partial(pytest.approx, rel=0)
    assert logprobs(output) == close(case.continuation.logprobs, abs=1e-3)
    # The case tells eviction from none.
    assert logprobs(output) != close(case.without_eviction.logprobs, abs=1e-2)


@pytest.mark.parametrize(
    ("heads", "block_size", "budget"),
    [
        pytest.param("gqa", 32, 0.05, id="gqa-block32-budget5%"),
        pytest.param("gqa", 32, 0.1, id="gqa-block32-budget10%", marks=both_runners),
        pytest.param("gqa", 32, 0.25, id="gqa-block32-budget25%"),
        pytest.param("gqa", 32, 0.5, id="gqa-block32-budget50%"),
        pytest.param("gqa", 128, 0.05, id="gqa-block128-budget5%"),
        pytest.param("gqa", 128, 0.25, id="gqa-block128-budget25%"),
        pytest.param("gqa", 128, 0.5, id="gqa-block128-budget50%", marks=both_runners),
        pytest.param("mha", 32, 0.05, id="mha-block32-budget5%", marks=both_runners),
        pytest.param("mha", 32, 0.25, id="mha-block32-budget25%"),
        pytest.param("mha", 32, 0.5, id="mha-block32-budget50%"),
        pytest.param("mha", 128, 0.1, id="mha-block128-budget10%", marks=both_runners),
    ],
)
def test_the_paper(
    heads: str,
    block_size: int,
    budget: float,
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],
) -> None:
    size = IMAGE_SIZE[block_size]
    model = method_model(models_dir, heads, size)
    check(load_oracle(model), model, "llava", size, Settings(budget, block_size), tmp_path)


def test_least_weight_of_a_layer(
    models_dir: Path, tmp_path: Path, load_oracle: Callable[[Path], Oracle]
) -> None:
    """With more than 100 blocks the clip at 0.01 gives a sharp layer more than the one-page floor.

    The prompt is also longer than a step may be.
    """
    size = 728
    model = tiny_models.build(
        "llava", models_dir / "method-long", num_heads=2, num_kv_heads=1, image_size=size
    )
    settings = Settings(budget=0.05, block_size=32)
    (case,) = check(load_oracle(model), model, "llava", size, settings, tmp_path, image_counts=[2])
    sharpest = case.eviction.weights.index(MIN_WEIGHT)
    assert case.eviction.pages[sharpest] > 1


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"pooling": 3}, id="pooling3"),
        pytest.param({"uniform_mix": 0.8}, id="mix80%"),
        pytest.param({"pooling": 3, "uniform_mix": 0.8}, id="pooling3-mix80%", marks=both_runners),
        pytest.param({"max_observation_tokens": 50}, id="last50"),
    ],
)
def test_beyond_the_paper(
    parameters: dict[str, Any],
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],
) -> None:
    size = IMAGE_SIZE[32]
    model = method_model(models_dir, "gqa", size)
    oracle = load_oracle(model)
    settings = Settings(budget=0.1, block_size=32, **parameters)
    with_parameters = check(oracle, model, "llava", size, settings, tmp_path)

    for case in with_parameters:
        request = case.request
        paper = oracle.evict(request["prompt"], images_of(request), Settings(0.1, 32))
        assert case.eviction.kept_positions != paper.kept_positions


@pytest.mark.parametrize(
    ("kind", "image_size"),
    [
        pytest.param("llava-next", 168, id="llava_next"),
        pytest.param("llava-hybrid", 350, id="llava_hybrid", marks=both_runners),
        pytest.param("qwen2-vl", 672, id="qwen2_vl", marks=both_runners),
        pytest.param("qwen2.5-vl", 672, id="qwen2.5_vl"),
    ],
)
def test_architectures(
    kind: str,
    image_size: int,
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],
) -> None:
    model = tiny_models.build(kind, models_dir / f"method-{kind}", image_size=image_size)
    check(load_oracle(model), model, kind, image_size, Settings(0.1, 32), tmp_path)
