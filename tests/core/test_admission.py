# SPDX-License-Identifier: Apache-2.0
"""Which prompts are evicted, to how many blocks, and why others are not."""

from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import EvictionPlan, Skip, plan_eviction, post_vision_start
from vl_cache_vllm.policy.snapkv import SnapKVPolicy


def feature(modality: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None,
        modality=modality,
        identifier=f"{modality}-{offset}",
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param([], None, id="text"),
        pytest.param([feature("image", 5, 40)], 45, id="image"),
        pytest.param([feature("video", 0, 7)], 7, id="video"),
        pytest.param([feature("vision_chunk", 3, 4)], 7, id="vision-chunk"),
        pytest.param([feature("audio", 5, 40)], None, id="audio"),
        pytest.param([feature("image", 5, 40), feature("audio", 60, 9)], 45, id="then-audio"),
        pytest.param([feature("image", 5, 4), feature("image", 20, 10)], 30, id="two-images"),
        pytest.param([feature("image", 20, 10), feature("image", 5, 4)], 30, id="any-order"),
        pytest.param([feature("image", 5, 4), feature("video", 9, 10)], 19, id="image-and-video"),
    ],
)
def test_post_vision_start(features: list[MultiModalFeatureSpec], expected: int | None) -> None:
    config = KVCompressConfig()
    assert post_vision_start(config, features) == expected
    assert post_vision_start(config, tuple(features)) == expected
    text_too = KVCompressConfig(policy=SnapKVPolicy(), text=True)
    assert post_vision_start(text_too, features) == (expected if features else 0)


def plan(
    budget: float = 0.1,
    block_size: int = 8,
    prompt_tokens: int = 100,
    vision_end: int | None = 80,
    usable_blocks: int | None = None,
    min_prompt_tokens: int = 0,
) -> EvictionPlan:
    config = KVCompressConfig(budget=budget, min_prompt_tokens=min_prompt_tokens)
    return plan_eviction(config, block_size, prompt_tokens, vision_end, usable_blocks)


def test_evicted() -> None:
    assert plan() == EvictionPlan(prompt_tokens=100, prompt_blocks=13, kept_blocks=2, skip=None)


@pytest.mark.parametrize(
    ("numbers", "skip"),
    [
        pytest.param({"vision_end": None}, Skip.TEXT_ONLY, id="text-only"),
        pytest.param({"vision_end": 100}, Skip.NO_POST_VISION_TOKENS, id="image-at-the-end"),
        pytest.param({"vision_end": 120}, Skip.NO_POST_VISION_TOKENS, id="image-beyond-the-end"),
        pytest.param({"vision_end": 99}, None, id="one-post-vision-token"),
        pytest.param({"min_prompt_tokens": 101}, Skip.SHORT_PROMPT, id="below-minimum"),
        pytest.param({"min_prompt_tokens": 100}, None, id="at-minimum"),
        pytest.param({"budget": 1.0}, Skip.NO_SAVING, id="budget-one"),
        # 100 tokens are 12 whole pages and a part; 12 kept would save nothing.
        pytest.param({"budget": 0.9}, Skip.NO_SAVING, id="twelve-of-thirteen"),
        pytest.param({"budget": 0.84}, None, id="eleven-of-thirteen"),
        pytest.param({"prompt_tokens": 8, "vision_end": 4}, Skip.NO_SAVING, id="one-block"),
        pytest.param(
            {"prompt_tokens": 15, "vision_end": 4}, Skip.NO_SAVING, id="a-block-and-a-part"
        ),
        pytest.param({"prompt_tokens": 16, "vision_end": 4}, None, id="two-blocks"),
        pytest.param({"prompt_tokens": 3, "vision_end": 1}, Skip.NO_SAVING, id="part-of-a-block"),
        # 13 prompt blocks, 2 kept ones, and the block that decoding starts in.
        pytest.param({"usable_blocks": 15}, Skip.POOL_TOO_SMALL, id="pool-too-small"),
        pytest.param({"usable_blocks": 16}, None, id="pool-just-fits"),
        pytest.param({"usable_blocks": None}, None, id="pool-unknown"),
    ],
)
def test_skip(numbers: dict[str, int | float | None], skip: Skip | None) -> None:
    result = plan(**numbers)  # type: ignore[arg-type]
    assert result.skip == skip
    assert (result.kept_blocks == 0) == (skip is not None)
    assert result.prompt_blocks == -(-result.prompt_tokens // 8)


def test_first_reason_wins() -> None:
    """A text-only prompt is text-only, however short."""
    assert plan(vision_end=None, prompt_tokens=3, min_prompt_tokens=9).skip == Skip.TEXT_ONLY
    assert plan(vision_end=3, prompt_tokens=3, min_prompt_tokens=9).skip is (
        Skip.NO_POST_VISION_TOKENS
    )


def test_reasons_have_names_for_metrics() -> None:
    assert {skip.value for skip in Skip} == {
        "text_only",
        "no_post_vision_tokens",
        "short_prompt",
        "no_saving",
        "pool_too_small",
        "no_decode",
        "streaming_input",
        "no_pressure",
        "no_observation_room",
        "short_output",
        "handed_over",
    }


BUDGETS = st.integers(1, 1000).map(lambda n: Fraction(n, 1000))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    budget=BUDGETS,
    block_size=st.sampled_from([1, 2, 5, 16, 32]),
    prompt_tokens=st.integers(1, 3000),
    post_vision=st.integers(0, 3000),
    usable_blocks=st.none() | st.integers(1, 4000),
)
def test_eviction_always_saves_a_block(
    budget: Fraction,
    block_size: int,
    prompt_tokens: int,
    post_vision: int,
    usable_blocks: int | None,
) -> None:
    assume(post_vision <= prompt_tokens)
    vision_end = prompt_tokens - post_vision
    result = plan(float(budget), block_size, prompt_tokens, vision_end, usable_blocks)
    num_blocks = -(-prompt_tokens // block_size)
    kept = ceil(budget * num_blocks)
    assert result.prompt_tokens == prompt_tokens
    assert result.prompt_blocks == num_blocks
    if result.skip is not None:
        assert result.kept_blocks == 0
    else:
        assert result.kept_blocks == kept >= 1
        # Every layer can have a page, and none needs more than the prompt's full ones.
        assert kept < prompt_tokens // block_size
        assert usable_blocks is None or num_blocks + kept + 1 <= usable_blocks
        tail = prompt_tokens % block_size  # stays where it is
        for generated in [*range(1, 2 * block_size + 2), 10_000, 10_001]:
            evicted = kept + -(-(tail + generated) // block_size)
            whole = -(-(prompt_tokens + generated) // block_size)
            assert evicted < whole, generated


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    budget=BUDGETS,
    block_size=st.sampled_from([1, 2, 5, 16, 32]),
    prompt_tokens=st.integers(1, 3000),
)
def test_no_saving_is_refused_only_where_true(
    budget: Fraction, block_size: int, prompt_tokens: int
) -> None:
    """If it is skipped, some continuation would indeed hold as many blocks as the whole cache."""
    result = plan(float(budget), block_size, prompt_tokens, vision_end=0)
    if result.skip is Skip.NO_SAVING:
        kept = ceil(budget * -(-prompt_tokens // block_size))
        tail = prompt_tokens % block_size
        assert any(
            kept + -(-(tail + generated) // block_size)
            >= -(-(prompt_tokens + generated) // block_size)
            for generated in range(1, 2 * block_size + 1)
        )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    budget=BUDGETS,
    block_size=st.sampled_from([1, 2, 5, 16, 32]),
    prompt_tokens=st.integers(1, 3000),
    vision_end=st.none() | st.integers(0, 3000),
    usable_blocks=st.integers(1, 4000),
)
def test_the_scheduler_is_at_least_as_strict_as_the_worker(
    budget: Fraction,
    block_size: int,
    prompt_tokens: int,
    vision_end: int | None,
    usable_blocks: int,
) -> None:
    """The worker does not know the pool; what it does not observe must never be evicted."""
    numbers = (float(budget), block_size, prompt_tokens, vision_end)
    scheduler, worker = plan(*numbers, usable_blocks), plan(*numbers)
    assert scheduler.kept_blocks in (0, worker.kept_blocks)


def test_a_tiny_budget_is_evicted_or_skipped() -> None:
    result = plan(budget=1e-12)
    assert (result.kept_blocks == 0) == (result.skip is not None)


def test_a_preemption_does_not_change_who_is_left_alone() -> None:
    """E then includes generated tokens; the rules about the prompt look at the prompt."""
    settings = KVCompressConfig(budget=0.1, min_prompt_tokens=100)
    sizes = {"block_size": 4, "prompt_tokens": 130, "num_prompt_tokens": 90}
    assert plan_eviction(settings, vision_end=60, **sizes).skip is Skip.SHORT_PROMPT
    anyone = KVCompressConfig(budget=0.1)
    assert plan_eviction(anyone, vision_end=90, **sizes).skip is Skip.NO_POST_VISION_TOKENS
    assert plan_eviction(anyone, vision_end=60, **sizes).kept_blocks == 4


def test_the_documented_table_of_large_blocks() -> None:
    """Blocks as large as a state of linear attention, of which a request holds six."""
    states, rows = 6, []
    for block_size in (544, 1568):
        for tokens in (4096, 16384, 65536):
            evicted = plan(block_size=block_size, prompt_tokens=tokens, vision_end=tokens - 50)
            tail = tokens % block_size
            before = evicted.prompt_blocks + states
            after = evicted.kept_blocks + (tail > 0) + states
            kept = (evicted.kept_blocks * block_size + tail) / tokens
            rows.append(
                f"| {block_size:,} | {tokens:,} | {before} | {after} | {kept:.0%} "
                f"| {before / after:.1f}x |"
            )
    guide = (Path(__file__).parents[2] / "docs" / "models.md").read_text().splitlines()
    start = guide.index(rows[0])
    assert guide[start : start + len(rows) + 1] == [*rows, ""]
