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
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.requests import RequestState, RequestTable
from vl_cache_vllm.worker.step import Batch, BatchRow, StepPlan, plan_step

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
    """A request of which whole blocks were evicted."""
    assert evicted_tokens % BLOCK_SIZE == 0
    state = fresh(evicted_tokens, slot=slot)
    state.evicted_tokens, state.kept_blocks, state.num_evictions = evicted_tokens, kept_blocks, 1
    return state


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_SIZE * BLOCK_SIZE


def order(evicted_tokens: int, kept_blocks: int) -> EvictionOrder:
    return EvictionOrder(whole_blocks(evicted_tokens), tuple(range(90, 90 + kept_blocks)))


def plan(rows: list[BatchRow], kept: dict[int, int] | None = None) -> StepPlan:
    """Plan a step. ``kept``: kept blocks of rows, by index, that are to be evicted in it."""
    orders = {
        rows[index].state.request_id: order(
            max(rows[index].state.prefill_tokens, rows[index].num_computed), blocks
        )
        for index, blocks in (kept or {}).items()
    }
    return plan_step(Batch.of(rows), BLOCK_SIZE, NUM_LAYERS, orders=orders)


def test_a_prompt_in_one_step() -> None:
    state = fresh(63)
    numbers = plan([BatchRow(state, 0, 63)], {0: 2})
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert observation.row == finish.row == 0
    assert observation.state is finish.state is state
    assert (observation.query_start, observation.query_end) == (40, 63)
    assert observation.first_position == 40
    assert (observation.num_blocks, observation.tokens) == (8, 63)
    assert (finish.tokens, finish.num_queries, finish.tail) == (63, 23, 7)
    assert (finish.order.evicted_tokens, len(finish.order.kept_blocks)) == (56, 2)
    assert (finish.evicted_before, finish.kept_before, finish.max_pages) == (0, 0, 7)
    assert not numbers.needs_tables  # this step still reads the whole prompt
    assert numbers.table_width == 8
    assert not numbers.is_plain


def test_an_eviction_shows_in_the_next_step() -> None:
    state = fresh(63)
    plan([BatchRow(state, 0, 63)], {0: 2})
    assert (state.evicted_tokens, state.kept_blocks, state.num_evictions) == (56, 2, 1)
    numbers = plan([BatchRow(state, 63, 1)])
    assert numbers.needs_tables
    assert numbers.observations == numbers.pending_evictions == []
    assert not numbers.is_plain


def test_a_row_without_an_order_is_never_evicted() -> None:
    """The scheduler may decline (pool, max_tokens) what the worker observes."""
    state = fresh(64)
    assert plan([BatchRow(state, 0, 64)]).pending_evictions == []
    assert state.evicted_tokens == 0
    for computed in range(64, 90):
        numbers = plan([BatchRow(state, computed, 1)])
        assert numbers.is_plain
        assert numbers.table_width == cdiv(computed + 1, BLOCK_SIZE)


@pytest.mark.parametrize("tokens", [57, 63, 64, 65])
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_an_order_at_the_end_of_a_prefill(tokens: int, kept: int) -> None:
    state = fresh(tokens)
    (finish,) = plan([BatchRow(state, 48, tokens - 48)], {0: kept}).pending_evictions
    assert finish.tokens == tokens
    assert finish.tail == tokens % BLOCK_SIZE
    assert finish.max_pages == tokens // BLOCK_SIZE
    assert len(finish.order.kept_blocks) == kept


def test_an_order_while_a_full_cache_decodes() -> None:
    """Its first query of the step is observed; drafts behind it may be rejected."""
    states = fresh(20, vision_end=None, slot=2), fresh(63)
    rows = [BatchRow(states[0], 0, 5), BatchRow(states[1], 70, 3)]
    numbers = plan(rows, {1: 2})
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert (observation.row, observation.query_start, observation.query_end) == (1, 5, 6)
    assert (observation.num_blocks, observation.first_position, observation.tokens) == (0, 70, 71)
    assert (finish.tokens, finish.num_queries, finish.tail) == (71, 1, 7)
    assert (finish.evicted_before, finish.kept_before, finish.max_pages) == (0, 0, 8)
    assert numbers.needs_tables  # the keys are found through them


def test_an_order_after_some_tokens_of_the_answer() -> None:
    """What the prompt's queries attended to is kept until then, and counts."""
    state = fresh(63)
    state.attention_stats = AttentionStats(state.config, 2, 1, 63, torch.device("cpu"))
    numbers = plan_step(
        Batch.of([BatchRow(state, 0, 63)]), BLOCK_SIZE, NUM_LAYERS, deferred=["request-1"]
    )
    assert (numbers.kept_whole, numbers.pending_evictions) == ([], [])
    assert len(numbers.observations) == 1
    for computed in range(63, 70):
        assert plan([BatchRow(state, computed, 1)]).is_plain
    numbers = plan([BatchRow(state, 70, 3)], {0: 2})
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert (observation.query_end, observation.first_position, observation.tokens) == (1, 70, 71)
    assert (finish.tokens, finish.num_queries, finish.unobserved) == (71, 23 + 1, 7)
    # The next one is observed by its own query alone.
    (later,) = plan([BatchRow(state, 80, 1)], {0: 2}).pending_evictions
    assert (later.num_queries, later.unobserved) == (1, 0)


def test_an_order_for_a_request_that_was_evicted_before() -> None:
    state = evicted(56, 2)
    numbers = plan([BatchRow(state, 81, 1)], {0: 1})
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    # Of 2 * 3 kept pages a layer has at most 4, then 3 of whole blocks, and positions 80 and 81.
    assert finish.max_pages == 4 + 3
    assert (observation.first_position, observation.tokens) == (7 * 8 + 1, 7 * 8 + 2)
    assert (finish.evicted_before, finish.kept_before, finish.tail) == (56, 2, 2)
    assert (state.evicted_tokens, state.kept_blocks, state.num_evictions) == (80, 1, 2)
    # The step itself still reads the pages of before.
    assert numbers.table_width == 4 + cdiv(82 - 56, BLOCK_SIZE)


def test_chunks_observe_their_part_of_the_window() -> None:
    state = fresh(63, vision_end=40)
    steps = [(0, 17), (17, 22), (39, 1), (40, 5), (45, 18)]
    seen = []
    for computed, scheduled in steps:
        last = computed + scheduled == 63
        numbers = plan([BatchRow(state, computed, scheduled)], {0: 2} if last else None)
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
        numbers = plan([BatchRow(state, computed, scheduled)], {0: 1} if last else None)
        for o in numbers.observations:
            tokens = range(computed, computed + scheduled)[o.query_start : o.query_end]
            assert tokens[0] == o.first_position
            queries.extend(tokens)
        computed += scheduled
    assert queries == list(range(observed_from, prefill_tokens))


def test_queries_are_indexed_in_the_whole_batch() -> None:
    rows = [
        BatchRow(fresh(63, vision_end=None, slot=1), 0, 11),
        BatchRow(evicted(56, 2, slot=2), 70, 1),
        BatchRow(fresh(63, vision_end=40, slot=3), 30, 20),
        BatchRow(fresh(50, vision_end=40, slot=4), 44, 6),
    ]
    numbers = plan(rows, {3: 2})
    assert [(o.row, o.query_start, o.query_end) for o in numbers.observations] == [
        (2, 11 + 1 + 10, 11 + 1 + 20),
        (3, 11 + 1 + 20, 11 + 1 + 20 + 6),
    ]
    assert [o.first_position for o in numbers.observations] == [40, 44]
    assert [finish.row for finish in numbers.pending_evictions] == [3]
    assert numbers.needs_tables


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
    numbers = plan([BatchRow(state, 0, state.prefill_tokens)])
    assert numbers.is_plain


def test_generated_tokens_are_not_observed() -> None:
    state = fresh(63)
    plan([BatchRow(state, 0, 63)])  # the scheduler kept_whole
    assert plan([BatchRow(state, 63, 1)]).is_plain


def test_a_restarted_request_observes_its_generated_tokens_too() -> None:
    """After a preemption E includes generated tokens; they follow the image."""
    table = RequestTable()
    state = table.start("a", config(), 40, 63)
    plan([BatchRow(state, 0, 63)], {0: 2})
    plan([BatchRow(state, 63, 1)])
    state = table.start("a", config(), 40, 65)
    numbers = plan([BatchRow(state, 32, 33)], {0: 3})
    (observation,), (finish,) = numbers.observations, numbers.pending_evictions
    assert (observation.first_position, observation.query_end) == (40, 33)
    assert (finish.tokens, finish.tail, len(finish.order.kept_blocks)) == (65, 1, 3)
    assert (finish.evicted_before, finish.kept_before) == (0, 0)


def test_plain_steps() -> None:
    assert plan([]).is_plain
    assert plan(
        [BatchRow(fresh(63, vision_end=None), 0, 63), BatchRow(fresh(9, None), 9, 1)]
    ).is_plain


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
    end = whole_blocks(prompt_tokens)
    for beyond in range(1, 2 * BLOCK_SIZE + 2):
        row = BatchRow(evicted(end, kept_blocks), end + beyond - 1, 1)
        width = plan_step(Batch.of([row]), BLOCK_SIZE, num_layers).table_width
        assert width == longest + cdiv(beyond, BLOCK_SIZE)


def test_table_width_is_that_of_the_widest_row() -> None:
    # Of 2 * 3 pages a layer has at most 4; with 2 decode blocks the evicted row needs 6.
    narrow = BatchRow(evicted(56, 2, slot=1), 56 + 8, 1)
    for tokens, width in ((40, 6), (48, 6), (49, 7)):
        rows = [narrow, BatchRow(fresh(tokens, vision_end=None, slot=2), 0, tokens)]
        assert plan(rows).table_width == width
        assert plan(rows[::-1]).table_width == width


def test_kept_pages_never_exceed_the_prompt() -> None:
    """2 blocks of 64 layers are 128 pages, but a layer cannot keep more than it has."""
    numbers = plan_step(Batch.of([BatchRow(evicted(32, 2), 39, 1)]), BLOCK_SIZE, num_layers=64)
    assert numbers.table_width == 32 // BLOCK_SIZE + 1


def test_table_start_get_drop() -> None:
    table = RequestTable()
    assert len(table) == 0
    assert table.get("a") is None
    state = table.start("a", config(), 40, 63)
    assert table.get("a") is state
    assert (state.request_id, state.vision_end, state.prefill_tokens) == ("a", 40, 63)
    assert (state.evicted_tokens, state.kept_blocks, state.num_evictions) == (0, 0, 0)
    table.drop("a")
    assert table.get("a") is None
    table.drop("a")  # unknown keys are fine
    assert len(table) == 0


def test_table_restart_clears_everything() -> None:
    table = RequestTable()
    state = table.start("a", config(), 40, 63)
    state.attention_stats = AttentionStats(state.config, 2, 1, 63, torch.device("cpu"))
    plan([BatchRow(state, 0, 63)], {0: 2})
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


def test_a_prefill_that_ends_with_room_for_drafts_is_not_observed() -> None:
    """vLLM pads a prefill of a single token; this one the scheduler leaves alone."""
    state = fresh(63)
    plan([BatchRow(state, 0, 62)])
    numbers = plan([BatchRow(state, 62, 4)])
    assert numbers.observations == []
    assert numbers.pending_evictions == []


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[BatchRow], dict[str, EvictionOrder]]:
    """Rows as a scheduler sends them: chunks, decodes with drafts; some with an order."""
    rows, orders = [], {}
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
        if draw(st.booleans()):  # decodes
            if most > 0 and draw(st.booleans()):
                state.evicted_tokens = whole_blocks(tokens)
                state.kept_blocks, state.num_evictions = draw(st.integers(1, most)), 1
            row = BatchRow(state, tokens + draw(st.integers(0, 40)), draw(st.integers(1, 4)))
            present = state.kept_blocks + (row.num_computed - state.evicted_tokens) // BLOCK_SIZE
            if present > max(1, state.kept_blocks) and draw(st.booleans()):
                kept = draw(st.integers(1, present - 1))
                orders[state.request_id] = order(row.num_computed, kept)
        else:
            computed = draw(st.integers(0, tokens - 1))
            end = draw(st.just(tokens) | st.integers(computed + 1, tokens))
            row = BatchRow(state, computed, end - computed)
            plan = plan_eviction(settings, BLOCK_SIZE, tokens, state.vision_end)
            if plan.kept_blocks and end == tokens and draw(st.booleans()):
                orders[state.request_id] = order(tokens, plan.kept_blocks)
        rows.append(row)
    return rows, orders


@examples(200)
@given(batch=batches(), num_layers=st.integers(1, 3))
def test_random_batches_token_by_token(
    batch: tuple[list[BatchRow], dict[str, EvictionOrder]], num_layers: int
) -> None:
    rows, orders = batch
    tokens = [
        (r, position)
        for r, row in enumerate(rows)
        for position in range(row.num_computed, row.num_computed + row.num_scheduled)
    ]
    before = [replace(row.state) for row in rows]
    observed, evicting, width = set(), {}, 1
    for index, (r, position) in enumerate(tokens):
        row, state = rows[r], before[r]
        config, end, vision_end = state.config, state.prefill_tokens, state.vision_end
        blocks, policy = cdiv(end, BLOCK_SIZE), config.policy
        ordered = orders.get(state.request_id)
        may_be_evicted = (
            vision_end is not None
            and vision_end < end
            and end >= config.min_prompt_tokens
            and ceil(Fraction(str(config.budget)) * blocks) < end // BLOCK_SIZE
        )
        is_query = position >= (vision_end or 0) or not policy.post_vision_only
        window = policy.max_observation_tokens or end
        row_end = row.num_computed + row.num_scheduled
        is_left_alone = row_end >= end and ordered is None
        is_observed = may_be_evicted and is_query and not is_left_alone
        decodes = row.num_computed >= end
        if not decodes and is_observed and end - window <= position < end:
            observed.add((r, index))
        if decodes and ordered is not None and position == row.num_computed:
            observed.add((r, index))
        if ordered is not None and position == (row.num_computed if decodes else end - 1):
            evicting[r] = (position + 1, position + 1 - ordered.evicted_tokens)
        if state.evicted_tokens:
            pages = state.kept_blocks * num_layers
            longest = longest_deal(num_layers, pages, state.evicted_tokens // BLOCK_SIZE)
            width = max(width, longest + (position - state.evicted_tokens) // BLOCK_SIZE + 1)
        else:
            width = max(width, position // BLOCK_SIZE + 1)

    numbers = plan_step(Batch.of(rows), BLOCK_SIZE, num_layers, orders=orders)
    planned = {
        (o.row, index) for o in numbers.observations for index in range(o.query_start, o.query_end)
    }
    assert planned == observed
    for o in numbers.observations:
        row = rows[o.row]
        assert o.state is row.state
        first = row.num_computed + o.query_start - sum(one.num_scheduled for one in rows[: o.row])
        if o.num_blocks:
            assert o.num_blocks == cdiv(row.num_computed + row.num_scheduled, BLOCK_SIZE)
            assert (o.first_position, o.tokens) == (first, row.state.prefill_tokens)
        else:
            assert o.first_position == o.tokens - 1
    assert {f.row: (f.tokens, f.tail) for f in numbers.pending_evictions} == evicting
    for f in numbers.pending_evictions:
        assert (f.evicted_before, f.kept_before) == (
            before[f.row].evicted_tokens,
            before[f.row].kept_blocks,
        )
        columns = (f.order.evicted_tokens - f.evicted_before) // BLOCK_SIZE
        kept = f.kept_before * num_layers
        longest = longest_deal(num_layers, kept, f.evicted_before // BLOCK_SIZE) if kept else 0
        assert f.max_pages == longest + columns
    for r, (row, old) in enumerate(zip(rows, before, strict=True)):
        assert row.state.num_evictions == old.num_evictions + (r in evicting)
        if r in evicting:
            ordered = orders[row.state.request_id]
            assert row.state.evicted_tokens == ordered.evicted_tokens
            assert row.state.kept_blocks == len(ordered.kept_blocks)
    decodes_with_order = any(
        r in evicting and row.num_computed >= row.state.prefill_tokens for r, row in enumerate(rows)
    )
    any_evicted = any(old.evicted_tokens for old in before)
    assert numbers.needs_tables == (any_evicted or decodes_with_order)
    assert numbers.table_width == width
    assert numbers.is_plain == (not observed and not evicting and not any_evicted)


def test_only_the_admitted_are_observed() -> None:
    """Of two prompts that end in this step, one was admitted; the other was not given blocks."""
    table = RequestTable()
    states = [table.start(name, KVCompressConfig(), 10, 100) for name in "ab"]
    rows = [BatchRow(state, 0, 100) for state in states]
    numbers = plan_step(Batch.of(rows), 16, 3, {"a"}, {"a": EvictionOrder(96, (1,))})
    assert [one.state for one in numbers.observations] == [states[0]]
    assert [one.state for one in numbers.pending_evictions] == [states[0]]
    assert (
        plan_step(Batch.of([BatchRow(states[1], 0, 50)]), 16, 3, admitted=set()).observations == []
    )
