# SPDX-License-Identifier: Apache-2.0
"""However a prompt's cache came to be, the same tokens are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from testing import engine as harness
from testing import tiny_models
from testing.engine import read_trace

SETTINGS: dict[str, Any] = {"policy": "vlcache", "budget": 0.25}
LONG = "Describe everything that you can see in the picture, from left to right. " * 4


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


def kept(
    model: Path,
    trace: Path,
    requests: list[dict[str, Any]],
    one_by_one: bool = False,
    options: Mapping[str, Any] = {},
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The evictions in order of the requests, and the outputs."""
    settings = {**SETTINGS, **options, "trace": {"path": str(trace), "positions": True}}
    with harness.engine(model, settings, **kwargs) as llm:
        batches = [[r] for r in requests] if one_by_one else [requests]
        outputs = [
            output
            for batch in batches
            for output in llm.generate(batch, harness.greedy(24), use_tqdm=False)
        ]
    records = sorted(read_trace(trace).values(), key=lambda r: int(r["request_id"].split("-")[0]))
    return records, outputs


def assert_same(actual: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        for key in ("tokens", "evicted_tokens", "kept_blocks", "kept_tokens"):
            assert a[key] == b[key]
        assert a["kept_positions"] == b["kept_positions"]
        assert a["density"] == pytest.approx(b["density"], abs=1e-4)


@pytest.mark.both_runners
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_chunked_prefill(model: Path, tmp_path: Path, async_scheduling: bool) -> None:
    """64-token chunks: the observed queries are spread over several steps."""
    requests = [harness.image_request("llava", LONG, [seed]) for seed in (1, 2, 3)]
    whole, outputs = kept(model, tmp_path / "whole", requests, enable_prefix_caching=False)
    chunked, chunked_outputs = kept(
        model,
        tmp_path / "chunked",
        requests,
        enable_prefix_caching=False,
        max_num_batched_tokens=64 * 3 + 8,
        long_prefill_token_threshold=64,
        async_scheduling=async_scheduling,
    )
    assert_same(chunked, whole)
    for a, b in zip(chunked_outputs, outputs, strict=True):
        assert harness.token_ids(a) == harness.token_ids(b)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("llava", {}, marks=pytest.mark.both_runners),
        pytest.param("llava-hybrid", {}),
        # Its last queries alone are observed, yet what questions share is the image.
        pytest.param("llava-hybrid", {"policy": "vlcache-plus", "evict_after": 0}),
    ],
)
def test_second_question_on_a_cached_image(
    models_dir: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """The prefix hit covers the image, yet every post-vision token is observed."""
    model = tiny_models.build(kind, models_dir / kind)
    first = harness.image_request(kind, LONG, [7])
    second = harness.image_request(kind, "And what colour is it? " + LONG, [7])
    fresh, fresh_outputs = kept(model, tmp_path / "fresh", [second], options=options)
    cached, outputs = kept(
        model, tmp_path / "cached", [first, second, second], one_by_one=True, options=options
    )
    assert_same(cached[1:2], fresh)
    assert_same(cached[2:], fresh)  # the whole prompt is cached; the hit is trimmed
    vision_end, tokens = fresh[0]["vision_end"], fresh[0]["tokens"]
    first_observed = max(vision_end, tokens - 64) if options else vision_end
    hits = [output.num_cached_tokens for output in outputs[1:]]
    assert hits == [start // 32 * 32 for start in (vision_end, first_observed)]
    for output in outputs[1:]:
        assert harness.token_ids(output) == harness.token_ids(fresh_outputs[0])


@pytest.mark.both_runners
def test_options_that_need_more_than_sums(models_dir: Path, tmp_path: Path) -> None:
    """Queries held until the last one, keys, and grids of an image that the hit covers."""
    model = tiny_models.build("qwen2-vl", models_dir / "qwen2-vl")
    options = {
        "experimental": {"elite_window": 0.5, "diversity": 0.7},
        "max_observation_tokens": 150,
        "pooling": 3,
        "pooling_2d": True,
    }
    requests = [harness.image_request("qwen2-vl", q + LONG, [7]) for q in ("First: ", "Then: ")]
    fresh, _ = kept(
        model, tmp_path / "fresh", requests, options=options, enable_prefix_caching=False
    )
    chunked, _ = kept(
        model,
        tmp_path / "chunked",
        requests,
        one_by_one=True,
        options=options,
        max_num_batched_tokens=64,
    )
    assert_same(chunked, fresh)
    assert [record["grids"] for record in chunked] == [record["grids"] for record in fresh]
    assert all(record["grids"] for record in fresh)
    plain, _ = kept(model, tmp_path / "plain", requests)
    for a, b in zip(plain, fresh, strict=True):
        assert a["kept_positions"] != b["kept_positions"]


def test_hit_of_a_request_that_is_not_evicted_is_whole(model: Path) -> None:
    """Trimming costs only requests that will be evicted."""
    request = harness.image_request("llava", LONG, [7])
    with harness.engine(model, {"policy": "vlcache", "budget": 0.99}) as llm:
        for _ in range(2):
            (output,) = llm.generate([request], harness.greedy(4), use_tqdm=False)
        assert harness.eviction_stats(llm).evicted == 0
        assert output.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 32 * 32


@pytest.mark.parametrize("window", [300, None], ids=["window-over-the-image", "all-queries"])
def test_observation_of_visual_queries(model: Path, tmp_path: Path, window: int | None) -> None:
    """Chunks and prefix hits see all queries of a window that reaches into the image."""
    settings = {**SETTINGS, "post_vision_only": False, "max_observation_tokens": window}
    request = harness.image_request("llava", LONG, [7])
    kept = []
    for tokens in (2048, 96):
        trace = tmp_path / f"trace{tokens}"
        with harness.engine(
            model,
            {**settings, "trace": {"path": str(trace), "positions": True}},
            max_num_batched_tokens=tokens,
            enable_chunked_prefill=True,
        ) as llm:
            for _ in range(2):
                (output,) = llm.generate([request], harness.greedy(4), use_tqdm=False)
        kept += [record["kept_positions"] for record in read_trace(trace).values()]
        observed = len(output.prompt_token_ids) - window if window else 0
        assert output.num_cached_tokens == observed // 32 * 32
    assert len(kept) == 4
    assert all(positions == kept[0] for positions in kept)


def test_observation_window_is_capped(model: Path, tmp_path: Path) -> None:
    """With max_observation_tokens, hits are trimmed to that window only."""
    trace = tmp_path / "trace"
    settings = {
        **SETTINGS,
        "trace": {"path": str(trace), "positions": True},
        "max_observation_tokens": 16,
    }
    request = harness.image_request("llava", LONG, [7])
    with harness.engine(model, settings) as llm:
        for _ in range(2):
            (output,) = llm.generate([request], harness.greedy(4), use_tqdm=False)
    fresh, cached = read_trace(trace).values()
    assert cached["kept_positions"] == fresh["kept_positions"]
    assert output.num_cached_tokens == (len(output.prompt_token_ids) - 16) // 32 * 32
