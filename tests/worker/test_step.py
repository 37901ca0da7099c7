# SPDX-License-Identifier: Apache-2.0
"""Step planning and the table of request states: host-side numbers only."""

import itertools
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from tests.conftest import examples
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.requests import RequestState, RequestTable
from vl_cache_vllm.worker.step import BatchRow, StepPlan, plan_step

BLOCK_SIZE = 8
NUM_LAYERS = 3


def config(budget: float = 0.25, **values: Any) -> KVCompressConfig:
    policy = VLCachePolicy(max_observation_tokens=values.pop("max_observation_tokens", None))
    return KVCompressConfig(policy=policy, budget=budget, **values)


def fresh(
    prefill_tokens: int,
    vision_end: int | None = 40,
    slot: int = 1,
    settings: KVCompressConfig | None = None,
) -> RequestState:
    return RequestState(f"request-{slot}", slot, settings or config(), vision_end, prefill_tokens)


def evicted(evicted_tokens: int, kept_blocks: int, slot: int = 1) -> RequestState:
    state = fresh(evicted_tokens, slot=slot)
    state.evicted_tokens = evicted_tokens
    state.prompt_blocks, state.kept_blocks = cdiv(evicted_tokens, BLOCK_SIZE), kept_blocks
    return state


def chunk(state: RequestState, computed: int, scheduled: int, reserved: int = 0) -> BatchRow:
    """A row of a request that is not evicted; its last chunk comes with reserved blocks."""
    num_blocks = cdiv(computed + scheduled, BLOCK_SIZE) + reserved
    return BatchRow(state, computed, scheduled, num_blocks)


def decode(state: RequestState, computed: int, scheduled: int = 1) -> BatchRow:
    """A row of a request with or without eviction."""
    num_blocks = state.prompt_blocks + state.kept_blocks
    num_blocks += cdiv(computed + scheduled - state.evicted_tokens, BLOCK_SIZE)
    return BatchRow(state, computed, scheduled, num_blocks)


def plan(rows: list[BatchRow]) -> StepPlan:
    return plan_step(rows, BLOCK_SIZE, NUM_LAYERS)


def test_a_prompt_in_one_step() -> None:
    state = fresh(63)
    numbers = plan([chunk(state, 0, 63, reserved=2)])
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert observation.row == finish.row == 0
    assert observation.state is finish.state is state
    assert (observation.query_start, observation.query_end) == (40, 63)
    assert observation.first_position == 40
    assert observation.num_blocks == 8
    assert (finish.prompt_tokens, finish.prompt_blocks, finish.kept_blocks) == (63, 8, 2)
    assert not numbers.any_evicted  # this step still reads the whole prompt
    assert numbers.table_width == 8
    assert not numbers.is_plain


def test_finishing_shows_in_the_next_step() -> None:
    state = fresh(63)
    plan([chunk(state, 0, 63, reserved=2)])
    assert (state.evicted_tokens, state.prompt_blocks, state.kept_blocks) == (63, 8, 2)
    numbers = plan([decode(state, 63)])
    assert numbers.any_evicted
    assert numbers.observations == numbers.pending_evictions == []
    assert not numbers.is_plain


def test_a_row_without_surplus_is_never_finished() -> None:
    """The scheduler may decline (pool, max_tokens) what the worker observes."""
    state = fresh(64)
    assert plan([chunk(state, 0, 64)]).pending_evictions == []
    assert state.evicted_tokens == 0
    for computed in range(64, 90):
        numbers = plan([decode(state, computed)])
        assert numbers.is_plain
        assert numbers.table_width == cdiv(computed + 1, BLOCK_SIZE)


@pytest.mark.parametrize("tokens", [57, 63, 64, 65])
@pytest.mark.parametrize("reserved", [1, 2, 5])
def test_finish_by_row_length(tokens: int, reserved: int) -> None:
    state = fresh(tokens)
    (finish,) = plan([chunk(state, 48, tokens - 48, reserved)]).pending_evictions
    assert finish.prompt_tokens == tokens
    assert finish.prompt_blocks == cdiv(tokens, BLOCK_SIZE)
    assert finish.kept_blocks == reserved


def test_chunks_observe_their_part_of_the_window() -> None:
    state = fresh(63, vision_end=40)
    steps = [(0, 17), (17, 22), (39, 1), (40, 5), (45, 18)]
    seen = []
    for computed, scheduled in steps:
        last = computed + scheduled == 63
        numbers = plan([chunk(state, computed, scheduled, reserved=2 if last else 0)])
        assert bool(numbers.pending_evictions) == last
        for o in numbers.observations:
            assert o.query_start == o.first_position - computed
            assert o.query_end == scheduled
            assert o.num_blocks == cdiv(computed + scheduled, BLOCK_SIZE)
            seen.append((o.first_position, computed + scheduled))
    assert seen == [(40, 45), (45, 63)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    prefill_tokens=st.integers(24, 120),
    post_vision=st.integers(1, 60),
    limit=st.none() | st.integers(1, 30),
    first_computed=st.integers(0, 100),
    chunks=st.lists(st.integers(1, 40), min_size=120, max_size=120),
)
def test_windows_cover_every_post_vision_query_once(
    prefill_tokens: int,
    post_vision: int,
    limit: int | None,
    first_computed: int,
    chunks: list[int],
) -> None:
    """Whatever the chunks, and after a prefix hit that was trimmed to the window's start."""
    vision_end = max(1, prefill_tokens - post_vision)
    observed_from = max(vision_end, prefill_tokens - limit) if limit else vision_end
    settings = config(max_observation_tokens=limit)
    state = fresh(prefill_tokens, vision_end, settings=settings)
    computed = min(first_computed, observed_from) // BLOCK_SIZE * BLOCK_SIZE
    queries: list[int] = []
    for size in chunks:
        if computed == prefill_tokens:
            break
        scheduled = min(size, prefill_tokens - computed)
        last = computed + scheduled == prefill_tokens
        numbers = plan([chunk(state, computed, scheduled, 1 if last else 0)])
        for o in numbers.observations:
            tokens = range(computed, computed + scheduled)[o.query_start : o.query_end]
            assert tokens[0] == o.first_position
            queries.extend(tokens)
        computed += scheduled
    assert queries == list(range(observed_from, prefill_tokens))


def test_queries_are_indexed_in_the_whole_batch() -> None:
    rows = [
        chunk(fresh(63, vision_end=None, slot=1), 0, 11),
        decode(evicted(60, 2, slot=2), 70),
        chunk(fresh(63, vision_end=40, slot=3), 30, 20),
        chunk(fresh(50, vision_end=40, slot=4), 44, 6, reserved=2),
    ]
    numbers = plan(rows)
    assert [(o.row, o.query_start, o.query_end) for o in numbers.observations] == [
        (2, 11 + 1 + 10, 11 + 1 + 20),
        (3, 11 + 1 + 20, 11 + 1 + 20 + 6),
    ]
    assert [o.first_position for o in numbers.observations] == [40, 44]
    assert [finish.row for finish in numbers.pending_evictions] == [3]
    assert numbers.any_evicted


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(fresh(63, vision_end=None), id="text-only"),
        pytest.param(fresh(63, vision_end=63), id="nothing-after-the-image"),
        pytest.param(fresh(63, settings=config(min_prompt_tokens=64)), id="below-minimum"),
        pytest.param(fresh(63, settings=config(budget=1.0)), id="budget-one"),
        pytest.param(fresh(15, vision_end=4), id="no-saving"),
    ],
)
def test_prompts_that_are_never_evicted_are_not_observed(state: RequestState) -> None:
    state = replace(state)
    numbers = plan([chunk(state, 0, state.prefill_tokens)])
    assert numbers.is_plain


def test_generated_tokens_are_not_observed() -> None:
    state = fresh(63)
    plan([chunk(state, 0, 63)])  # the scheduler kept_whole
    assert plan([decode(state, 63)]).is_plain


def test_a_restarted_request_observes_its_generated_tokens_too() -> None:
    """After a preemption E includes generated tokens; they follow the image."""
    table = RequestTable()
    state = table.start("a", config(), 40, 63)
    plan([chunk(state, 0, 63, reserved=2)])
    plan([decode(state, 63)])
    state = table.start("a", config(), 40, 65)
    numbers = plan([chunk(state, 32, 33, reserved=3)])
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert (observation.first_position, observation.query_end) == (40, 33)
    assert (finish.prompt_tokens, finish.prompt_blocks, finish.kept_blocks) == (65, 9, 3)


def test_plain_steps() -> None:
    assert plan([]).is_plain
    assert plan([chunk(fresh(63, vision_end=None), 0, 63), decode(fresh(9, None), 9)]).is_plain


def splits(num_layers: int, total: int, cap: int) -> list[tuple[int, ...]]:
    """Every division of pages among layers that `apportion` could return."""
    return [
        pages
        for pages in itertools.product(range(1, cap + 1), repeat=num_layers)
        if sum(pages) == total
    ]


@cache
def longest_deal(num_layers: int, total: int, cap: int) -> int:
    return max(max(pages) for pages in splits(num_layers, total, cap))


EVICTED = [
    (prompt_tokens, budget)
    for prompt_tokens in (16, 17, 24, 39, 48, 55)
    for budget in (0.1, 0.35, 0.5, 0.8)
    if plan_eviction(config(budget), BLOCK_SIZE, prompt_tokens, 4).kept_blocks
]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(("prompt_tokens", "budget"), EVICTED)
def test_table_width_bounds_every_layer_tightly(
    num_layers: int, prompt_tokens: int, budget: float
) -> None:
    settings = config(budget)
    kept_blocks = plan_eviction(settings, BLOCK_SIZE, prompt_tokens, 4).kept_blocks
    longest = longest_deal(num_layers, kept_blocks * num_layers, prompt_tokens // BLOCK_SIZE)
    for generated in range(1, 2 * BLOCK_SIZE + 2):
        state = evicted(prompt_tokens, kept_blocks)
        row = decode(state, prompt_tokens + generated - 1)
        width = plan_step([row], BLOCK_SIZE, num_layers).table_width
        assert width == longest + cdiv(generated, BLOCK_SIZE)


def test_table_width_is_that_of_the_widest_row() -> None:
    # Of 2 * 3 pages a layer has at most 4; with 2 decode blocks the evicted row needs 6.
    narrow = decode(evicted(60, 2, slot=1), 60 + 8)
    for tokens, width in ((40, 6), (48, 6), (49, 7)):
        rows = [narrow, chunk(fresh(tokens, vision_end=None, slot=2), 0, tokens)]
        assert plan(rows).table_width == width
        assert plan(rows[::-1]).table_width == width


def test_kept_pages_never_exceed_the_prompt() -> None:
    """2 blocks of 64 layers are 128 pages, but a layer cannot keep more than it has."""
    numbers = plan_step([decode(evicted(39, 2), 39)], BLOCK_SIZE, num_layers=64)
    assert numbers.table_width == 39 // BLOCK_SIZE + 1


def test_table_start_get_drop() -> None:
    table = RequestTable()
    assert len(table) == 0
    assert table.get("a") is None
    state = table.start("a", config(), 40, 63)
    assert table.get("a") is state
    assert (state.request_id, state.vision_end, state.prefill_tokens) == ("a", 40, 63)
    assert (state.evicted_tokens, state.prompt_blocks, state.kept_blocks) == (0, 0, 0)
    table.drop("a")
    assert table.get("a") is None
    table.drop("a")  # unknown keys are fine
    assert len(table) == 0


def test_table_restart_clears_everything() -> None:
    table = RequestTable()
    state = table.start("a", config(), 40, 63)
    state.attention_stats = AttentionStats(state.config, 2, 1, 63, torch.device("cpu"))
    plan([chunk(state, 0, 63, reserved=2)])
    again = table.start("a", config(), 40, 70)
    assert again is not state
    assert again.attention_stats is None
    assert (again.evicted_tokens, again.prefill_tokens) == (0, 70)
    assert len(table) == 1
    assert table.get("a") is again


def test_drop_all_but() -> None:
    table = RequestTable()
    kept, dropped = table.start("a", config(), None, 5), table.start("b", config(), None, 5)
    assert kept.slot != dropped.slot
    table.drop_all_but({"a": "anything with `in`"})
    assert table.get("a") is kept
    assert table.get("b") is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["start", "drop", "keep"]), st.sampled_from("abcdef"))))
def test_slots_are_never_shared(actions: list[tuple[str, int]]) -> None:
    """Slot 0 is nobody's; slots stay as few as there ever were requests at once."""
    model: dict[str, int] = {}
    table, most = RequestTable(), 0
    for action, key in actions:
        if action == "start":
            model[key] = table.start(key, config(), 4, 9).slot
        elif action == "drop":
            table.drop(key)
            model.pop(key, None)
        else:
            table.drop_all_but([key])
            model = {k: slot for k, slot in model.items() if k == key}
        most = max(most, len(model))
        assert len(table) == len(model)
        slots = list(model.values())
        assert len(set(slots)) == len(slots)
        assert all(1 <= slot <= most for slot in slots)
        for k, slot in model.items():
            state = table.get(k)
            assert state is not None
            assert state.slot == slot


def test_room_for_rejected_drafts_is_not_an_eviction() -> None:
    """A decoding request may hold a block more than its tokens need."""
    table = RequestTable()
    state = table.start("a", config(), 40, 63)
    plan([chunk(state, 0, 63)])
    numbers = plan([BatchRow(state, 63, 1, -(-64 // BLOCK_SIZE) + 1)])
    assert numbers.pending_evictions == [] and state.evicted_tokens == 0


def test_a_prefill_that_ends_with_room_for_drafts_is_not_observed() -> None:
    """vLLM pads a prefill of a single token; this one the scheduler leaves alone."""
    state = fresh(63)
    plan([chunk(state, 0, 62)])
    numbers = plan([chunk(state, 62, 4)])
    assert numbers.observations == []
    assert numbers.pending_evictions == []


@st.composite
def batches(draw: st.DrawFn) -> list[BatchRow]:
    """Rows as a scheduler sends them: chunks, last chunks with kept blocks, decodes, drafts."""
    rows = []
    for slot in range(1, 1 + draw(st.integers(1, 5))):
        limit = draw(st.none() | st.integers(1, 30))
        post_vision_only = draw(st.booleans())
        policy = VLCachePolicy(max_observation_tokens=limit, post_vision_only=post_vision_only)
        settings = KVCompressConfig(
            policy,
            draw(st.sampled_from([0.1, 0.25, 0.6, 1.0])),
            min_prompt_tokens=draw(st.sampled_from([0, 0, 40])),
        )
        tokens = draw(st.integers(1, 70))
        state = fresh(tokens, draw(st.none() | st.integers(0, 60)), slot, settings)
        most = tokens // BLOCK_SIZE - 1
        if most > 0 and draw(st.booleans()):
            state.evicted_tokens = tokens
            state.prompt_blocks, state.kept_blocks = (
                cdiv(tokens, BLOCK_SIZE),
                draw(st.integers(1, most)),
            )
            rows.append(decode(state, tokens + draw(st.integers(0, 20)), draw(st.integers(1, 4))))
        elif draw(st.booleans()):
            computed = draw(st.integers(0, tokens - 1))
            end = draw(st.just(tokens) | st.integers(computed + 1, tokens))
            plan = plan_eviction(settings, BLOCK_SIZE, tokens, state.vision_end)
            reserved = plan.kept_blocks if end == tokens and draw(st.booleans()) else 0
            rows.append(chunk(state, computed, end - computed, reserved))
        else:  # decodes with its whole cache, maybe with room for drafts that were rejected
            computed = tokens + draw(st.integers(0, 20))
            rows.append(chunk(state, computed, draw(st.integers(1, 4)), draw(st.integers(0, 1))))
    return rows


@examples(200)
@given(rows=batches(), num_layers=st.integers(1, 3))
def test_random_batches_token_by_token(rows: list[BatchRow], num_layers: int) -> None:
    tokens = [
        (r, position)
        for r, row in enumerate(rows)
        for position in range(row.num_computed, row.num_computed + row.num_scheduled)
    ]
    evicted_before = [row.state.evicted_tokens > 0 for row in rows]
    observed, finishing, width = set(), {}, 1
    for index, (r, position) in enumerate(tokens):
        row, state = rows[r], rows[r].state
        config, end, vision_end = state.config, state.prefill_tokens, state.vision_end
        blocks, policy = cdiv(end, BLOCK_SIZE), config.policy
        may_be_evicted = (
            vision_end is not None
            and vision_end < end
            and end >= config.min_prompt_tokens
            and ceil(Fraction(str(config.budget)) * blocks) < end // BLOCK_SIZE
        )
        is_query = position >= (vision_end or 0) or not policy.post_vision_only
        window = policy.max_observation_tokens or end
        row_end = row.num_computed + row.num_scheduled
        is_left_alone = row_end >= end and row.num_blocks <= cdiv(row_end, BLOCK_SIZE)
        is_observed = may_be_evicted and is_query and not is_left_alone
        if is_observed and end - window <= position < end:
            observed.add((r, index, position))
        if position == end - 1 and row.num_blocks > blocks:
            finishing[r] = (end, blocks, row.num_blocks - blocks)
        if evicted_before[r]:
            pages = state.kept_blocks * num_layers
            longest = longest_deal(num_layers, pages, end // BLOCK_SIZE)
            width = max(width, longest + (position - end) // BLOCK_SIZE + 1)
        else:
            width = max(width, position // BLOCK_SIZE + 1)

    numbers = plan_step(rows, BLOCK_SIZE, num_layers)
    planned = {
        (o.row, index, o.first_position + index - o.query_start)
        for o in numbers.observations
        for index in range(o.query_start, o.query_end)
    }
    assert planned == observed
    for o in numbers.observations:
        end = rows[o.row].num_computed + rows[o.row].num_scheduled
        assert o.state is rows[o.row].state and o.num_blocks == cdiv(end, BLOCK_SIZE)
    assert {
        f.row: (f.prompt_tokens, f.prompt_blocks, f.kept_blocks) for f in numbers.pending_evictions
    } == finishing
    for r, (row, was_evicted) in enumerate(zip(rows, evicted_before, strict=True)):
        assert (row.state.evicted_tokens > 0) == (was_evicted or r in finishing)
    assert numbers.any_evicted == any(evicted_before)
    assert numbers.table_width == width
    assert numbers.is_plain == (not observed and not finishing and not any(evicted_before))


def test_only_the_admitted_are_observed() -> None:
    """Of two prompts that end in this step, one was admitted; the other was not given blocks."""
    table = RequestTable()
    states = [table.start(name, KVCompressConfig(), 10, 100) for name in "ab"]
    rows = [BatchRow(states[0], 0, 100, 10), BatchRow(states[1], 0, 100, 7)]
    numbers = plan_step(rows, 16, 3, admitted={"a"})
    assert [one.state for one in numbers.observations] == [states[0]]
    assert [one.state for one in numbers.pending_evictions] == [states[0]]
    assert plan_step([BatchRow(states[1], 0, 50, 4)], 16, 3, admitted=set()).observations == []
