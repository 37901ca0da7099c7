# SPDX-License-Identifier: Apache-2.0
"""A real engine evicts a request again and again while it decodes, as `testing.oracle` says."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.engine import engine, greedy, logprobs, read_trace_lines, token_ids
from testing.oracle import Continuation, Decision, Eviction, Oracle, Settings
from tests.e2e.test_against_oracle import (
    IMAGE_SIZE,
    MAX_MODEL_LEN,
    MIN_SCORE_GAP,
    Request,
    images_of,
    load_oracle,  # noqa: F401  a fixture
    method_model,
)

EVICTIONS = 3  # while the request decodes, after that of its prompt
MIN_TOKEN_GAP = 2e-4

both_runners = pytest.mark.both_runners


def candidates(
    oracle: Oracle, request: Request, settings: Settings, num_tokens: int
) -> Iterator[tuple[dict[str, Any], Eviction, Continuation]]:
    """Requests in which nothing hinges on rounding."""
    for seed in range(0, 400, 10):
        candidate = request.with_seed(seed)
        eviction = oracle.evict(candidate["prompt"], images_of(candidate), settings)
        if eviction.score_gap < MIN_SCORE_GAP:
            continue
        continuation = oracle.decode(eviction, num_tokens, settings)
        gaps = [one.score_gap for one in continuation.evictions]
        if min(continuation.gaps) >= MIN_TOKEN_GAP and min(gaps) >= MIN_SCORE_GAP:
            yield candidate, eviction, continuation


def assert_same_decision(record: dict[str, Any], expected: Decision) -> None:
    assert record["density"] == pytest.approx(expected.density, rel=0, abs=1e-4)
    assert record["kept_tokens"] == expected.kept_tokens
    assert record["kept_positions"] == expected.kept_positions


@pytest.mark.parametrize(
    ("heads", "block_size", "num_images", "every"),
    [
        pytest.param("gqa", 32, 1, 32, id="gqa-block32", marks=both_runners),
        pytest.param("gqa", 32, 2, 64, id="gqa-block32-two-images-every-two-blocks"),
        pytest.param("mha", 32, 2, 20, id="mha-block32-two-images", marks=both_runners),
        pytest.param("mha", 32, 1, 32, id="mha-block32"),
        pytest.param("gqa", 128, 1, 128, id="gqa-block128", marks=both_runners),
        pytest.param("mha", 128, 2, 128, id="mha-block128-two-images"),
    ],
)
def test_three_times_while_it_decodes(
    heads: str,
    block_size: int,
    num_images: int,
    every: int,
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],  # noqa: F811
) -> None:
    size = IMAGE_SIZE[block_size]
    model = method_model(models_dir, heads, size)
    settings = Settings(0.1, block_size, every=every)
    growth = -(-every // block_size) * block_size
    num_tokens = EVICTIONS * growth + block_size + 32
    request = Request("llava", num_images, size)
    oracle = load_oracle(model)
    sent, eviction, expected = next(candidates(oracle, request, settings, num_tokens))
    assert len(expected.evictions) >= EVICTIONS
    once = oracle.decode(eviction, num_tokens)
    kv_compress = {
        "policy": "vlcache",
        "budget": settings.budget,
        "every": every,
        "trace": {"path": str(tmp_path / "trace.jsonl"), "positions": True},
    }
    with engine(model, kv_compress, block_size=block_size, max_model_len=MAX_MODEL_LEN) as llm:
        (output,) = llm.generate([sent], greedy(num_tokens), use_tqdm=False)
    first, *again = read_trace_lines(tmp_path / "trace.jsonl")
    assert_same_decision(first, eviction)
    assert [record["eviction"] for record in again] == [*range(2, 2 + len(expected.evictions))]
    for record, decision in zip(again, expected.evictions, strict=True):
        assert_same_decision(record, decision)
    assert token_ids(output) == expected.token_ids
    close = functools.partial(pytest.approx, rel=0)
    assert logprobs(output) == close(expected.logprobs, abs=1e-3)
    # The case tells one eviction from several.
    assert logprobs(output) != close(once.logprobs, abs=1e-2)


@pytest.mark.parametrize(
    ("heads", "block_size", "num_images", "settings"),
    [
        pytest.param("gqa", 32, 1, {"evict_after": 40}, id="gqa-block32", marks=both_runners),
        pytest.param("mha", 32, 2, {"evict_after": 1}, id="mha-block32-two-images-after-one"),
        pytest.param(
            "gqa",
            32,
            2,
            {"evict_after": 16, "max_observation_tokens": 5, "every": 32},
            id="gqa-block32-two-images-and-again",
            marks=both_runners,
        ),
        pytest.param("mha", 128, 1, {"evict_after": 20}, id="mha-block128"),
    ],
)
def test_after_some_tokens_of_the_answer(
    heads: str,
    block_size: int,
    num_images: int,
    settings: dict[str, int],
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],  # noqa: F811
) -> None:
    """The prompt's queries and the answer's last one decide."""
    size = IMAGE_SIZE[block_size]
    model = method_model(models_dir, heads, size)
    wanted = Settings(0.1, block_size, **settings)
    num_tokens = wanted.evict_after + 64
    oracle = load_oracle(model)
    sent, eviction, expected = next(
        candidates(oracle, Request("llava", num_images, size), wanted, num_tokens)
    )
    assert len(expected.evictions) >= 1 + ("every" in settings)
    kv_compress = {
        "policy": "vlcache",
        "budget": wanted.budget,
        **settings,
        "trace": {"path": str(tmp_path / "trace.jsonl"), "positions": True},
    }
    with engine(model, kv_compress, block_size=block_size, max_model_len=MAX_MODEL_LEN) as llm:
        (output,) = llm.generate([sent], greedy(num_tokens), use_tqdm=False)
    for record, decision in zip(
        read_trace_lines(tmp_path / "trace.jsonl"), expected.evictions, strict=True
    ):
        assert_same_decision(record, decision)
    assert token_ids(output) == expected.token_ids
    assert logprobs(output) == pytest.approx(expected.logprobs, rel=0, abs=1e-3)
    # The case tells this eviction from one at the end of the prefill.
    early = oracle.decode(eviction, num_tokens)
    assert logprobs(output) != pytest.approx(early.logprobs, rel=0, abs=1e-2)


def test_a_prompt_that_is_too_short_is_evicted_when_it_has_grown(
    models_dir: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],  # noqa: F811
) -> None:
    """Its prompt is kept whole; counting starts at its end."""
    size = IMAGE_SIZE[32]
    model = method_model(models_dir, "gqa", size)
    oracle, settings = load_oracle(model), Settings(0.1, 32, every=64)
    for seed in range(0, 400, 10):
        sent = Request("llava", 1, size).with_seed(seed)
        eviction = oracle.evict(sent["prompt"], images_of(sent), settings)
        expected = oracle.decode_full(eviction, 200, settings)
        gaps = [one.score_gap for one in expected.evictions]
        if min(expected.gaps) >= MIN_TOKEN_GAP and min(gaps) >= MIN_SCORE_GAP:
            break
    else:
        raise AssertionError("a near tie with every seed")
    assert len(expected.evictions) == 2
    kv_compress = {
        "policy": "vlcache",
        "budget": 0.1,
        "every": 64,
        "min_prompt_tokens": 5000,
        "trace": {"path": str(tmp_path / "trace.jsonl"), "positions": True},
    }
    with engine(model, kv_compress, block_size=32, max_model_len=MAX_MODEL_LEN) as llm:
        (output,) = llm.generate([sent], greedy(200), use_tqdm=False)
    for record, decision in zip(
        read_trace_lines(tmp_path / "trace.jsonl"), expected.evictions, strict=True
    ):
        assert_same_decision(record, decision)
    assert token_ids(output) == expected.token_ids
    assert logprobs(output) == pytest.approx(expected.logprobs, rel=0, abs=1e-3)


def test_a_bound_that_is_never_reached_changes_nothing(models_dir: Path) -> None:
    """Bit for bit, beside the same request without one."""
    size = IMAGE_SIZE[32]
    model = method_model(models_dir, "gqa", size)
    sent = Request("llava", 1, size).with_seed(0)
    results = []
    for every in (None, 100):
        settings = {"policy": "vlcache", "budget": 0.1, "every": every}
        with engine(model, settings, block_size=32, max_model_len=MAX_MODEL_LEN) as llm:
            (output,) = llm.generate([sent], greedy(64), use_tqdm=False)
        results.append((token_ids(output), logprobs(output)))
    assert results[0] == results[1]
