# SPDX-License-Identifier: Apache-2.0
"""Requests that are evicted while they decode: after so many tokens, or when blocks are scarce."""

from typing import Any

import pytest
from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request, RequestStatus

from tests.core.test_block_manager import BLOCK_SIZE, GENERATED, Engine
from tests.core.test_scheduler_machine import SchedulerMachine, story, wish
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import EvictionPlan, Skip
from vl_cache_vllm.core.later_evictions import MOST_UNDER_PRESSURE, AnswerBound
from vl_cache_vllm.core.output_reserve import EvictedOutput
from vl_cache_vllm.policy.vlcache import VLCachePolicy

EVERY = 8  # two blocks
PROMPT = 26  # tokens of `Engine.add`: 7 blocks, of which the first eviction keeps 2
BOUND = AnswerBound(start=28, growth=2, kept_blocks=3)  # a quarter of 7 + 2 blocks


def schedule(engine: Engine, *running: Request, demands: int = 0) -> dict[str, Any]:
    """Decide about a step, and decode one token of each request in it; its orders."""
    engine.harness.manager.plan_later_evictions(running, lambda: demands)
    for request in running:
        engine.decode(request)
    return engine.orders()


def started(engine: Engine, **parameters: Any) -> Request:
    request = engine.add(**parameters)
    engine.prefill(request)
    engine.orders()
    return request


def test_a_request_is_evicted_again_and_again() -> None:
    engine = Engine(every=EVERY)
    request = started(engine)
    evicted, sizes, computed = [], [], []
    for _ in range(30):
        for tokens, kept in schedule(engine, request).values():
            evicted.append(tokens)
            sizes.append(len(kept))
            computed.append(request.num_computed_tokens - 1)  # before the step
    assert evicted == computed == [32, 40, 48]
    assert sizes == [3, 3, 3]
    stats = engine.harness.eviction_stats
    assert stats.evictions == {"prefill": 1, "every": 3}
    assert stats.evicted == 1
    engine.free(request)
    assert engine.num_held == 0


def test_what_a_later_eviction_replaces_is_freed_once_it_is_processed() -> None:
    engine = Engine(every=EVERY)
    request = started(engine)
    (first,) = (evicted.kept for evicted in engine.harness.manager._evicted.values())
    for _ in range(6):
        assert schedule(engine, request) == {}
    assert request.num_computed_tokens == 32
    assert engine.num_held == 2 + 2
    ((_, kept),) = schedule(engine, request).values()
    row = engine.row(request)
    assert row[:6] == [0] * 6 and 0 not in row[6:]
    assert engine.num_held == 2 + 2 + 3 + 1  # both kept ones, two replaced and a fresh block
    assert [block.ref_cnt for block in first] == [1, 1]
    assert not set(kept).intersection([*row, *(block.block_id for block in first)])
    assert schedule(engine, request) == {}
    assert engine.row(request) == [0] * 8 + row[8:]
    assert engine.num_held == 3 + 1
    assert [block.ref_cnt for block in first] == [0, 0]


def test_a_request_never_holds_more_than_its_bound() -> None:
    """However much it writes."""
    engine = Engine(every=EVERY)
    request = started(engine)
    for _ in range(38):
        evicts = bool(schedule(engine, request))
        assert engine.num_held <= BOUND.most_blocks + evicts * BOUND.kept_blocks
    assert BOUND.most_blocks == 6
    assert engine.num_held < cdiv(request.num_computed_tokens, BLOCK_SIZE)


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        pytest.param({}, {}, id="by-default"),
        pytest.param({"every": EVERY}, {"kv_evict_every": None}, id="not-this-request"),
        pytest.param({"every": EVERY, "budget": 1.0}, {}, id="budget-one"),
        pytest.param({"every": EVERY}, {"kv_budget": 1.0}, id="its-own-budget-one"),
        pytest.param({"every": EVERY}, {"image": 0, "after": 24}, id="text-only"),
        pytest.param({"every": EVERY}, {"resumable": True}, id="streaming-input"),
    ],
)
def test_who_is_never_evicted_again(settings: dict[str, Any], parameters: dict[str, Any]) -> None:
    engine = Engine(**settings)
    request = started(engine, **parameters)
    for _ in range(36):
        assert schedule(engine, request) == {}


def test_a_request_may_bring_its_own_bound() -> None:
    engine = Engine()
    request = started(engine, kv_evict_every=12)
    evicted = [e for _ in range(36) for e, _ in schedule(engine, request).values()]
    assert evicted == [36, 48, 60]


@pytest.mark.parametrize(
    ("settings", "parameters"),
    [
        pytest.param({"min_prompt_tokens": 40}, {}, id="short-prompt"),
        pytest.param({}, {"before": 12, "after": 0}, id="nothing-behind-the-image"),
    ],
)
def test_a_prompt_that_was_not_evicted_is_when_it_has_grown(
    settings: dict[str, Any], parameters: dict[str, Any]
) -> None:
    engine = Engine(every=EVERY, **settings)
    request = started(engine, **parameters)
    orders = [order for _ in range(12) for order in schedule(engine, request).values()]
    ((evicted, kept),) = orders
    assert evicted == BOUND.start + EVERY
    assert len(kept) == BOUND.kept_blocks
    assert engine.harness.eviction_stats.evictions == {"every": 1}
    assert engine.row(request)[:9] == [0] * 9


def test_blocks_behind_an_eviction_are_not_hashed() -> None:
    engine = Engine(every=EVERY, min_prompt_tokens=40)
    request = started(engine)
    for _ in range(30):
        schedule(engine, request)
    hashed = sum(engine.hashed(list(range(engine.usable + 1))))
    assert hashed == 36 // BLOCK_SIZE  # E of the first
    assert not any(engine.hashed([block for block in engine.row(request) if block]))


def test_in_flight_steps_are_waited_for() -> None:
    """Async scheduling: what two steps read is freed after the second, in which the order is."""
    engine = Engine(every=EVERY)
    request = started(engine)
    for _ in range(6):
        schedule(engine, request)
    manager, cache = engine.harness.manager, engine.kv_cache_manager
    # A step is in flight; its token is not certain yet.
    request.num_computed_tokens, request.num_in_flight_tokens = 33, 1
    manager.plan_later_evictions([request], lambda: 0)
    assert cache.allocate_slots(request, 1) is not None
    assert [tokens for tokens, _ in engine.orders().values()] == [32]
    held = engine.num_held
    request.num_computed_tokens, request.num_in_flight_tokens = 34, 2
    request.append_output_token_ids(GENERATED)
    manager.plan_later_evictions([request], lambda: 0)
    assert not manager.later.due  # it is being evicted
    request.num_in_flight_tokens = 1  # the step before the one with the order is processed
    assert cache.allocate_slots(request, 1) is not None
    assert engine.num_held == held
    request.num_computed_tokens, request.num_in_flight_tokens = 35, 1
    assert cache.allocate_slots(request, 1) is not None
    assert engine.num_held == held - 2 - 2  # kept ones and columns
    assert engine.row(request)[:8] == [0] * 8


def test_a_request_that_ends_in_the_step_of_a_later_order() -> None:
    engine = Engine(every=EVERY)
    request = started(engine)
    for _ in range(6):
        schedule(engine, request)
    engine.harness.manager.plan_later_evictions([request], lambda: 0)
    engine.decode(request)
    assert engine.num_held == 2 + 2 + 3 + 1
    engine.free(request)
    assert engine.orders() == {}
    assert engine.num_held == 0


def test_a_request_that_is_not_scheduled_is_evicted_in_its_next_step() -> None:
    engine = Engine(every=EVERY)
    request = started(engine)
    for _ in range(6):
        schedule(engine, request)
    engine.harness.manager.plan_later_evictions([request], lambda: 0)
    assert engine.orders() == {}
    assert engine.num_held == 2 + 2
    assert len(schedule(engine, request)) == 1


def bound_of(skip: Skip | None, **settings: Any) -> AnswerBound | None:
    plan = EvictionPlan(PROMPT, 7, 0 if skip else 2, skip)
    return AnswerBound.of(KVCompressConfig(**settings), plan, PROMPT, BLOCK_SIZE)


def test_bounds() -> None:
    assert bound_of(None, budget=0.25, every=EVERY) == BOUND
    assert bound_of(None, budget=0.25, every=5) == BOUND  # rounded up to whole blocks
    assert bound_of(None, budget=0.25) is None
    assert bound_of(None, budget=1.0, every=EVERY) is None


@pytest.mark.parametrize(
    "skip",
    [Skip.TEXT_ONLY, Skip.POOL_TOO_SMALL, Skip.NO_DECODE, Skip.STREAMING_INPUT],
)
def test_who_could_never_be_evicted_has_no_bound(skip: Skip) -> None:
    assert bound_of(skip, budget=0.25, every=EVERY) is None


# --------------------------------------------------------------------------------------------------
# The first eviction, after some tokens of the answer


def test_a_request_is_evicted_when_its_answer_has_begun() -> None:
    engine = Engine(evict_after=5)
    request = engine.add()
    engine.prefill(request)
    manager = engine.harness.manager
    assert engine.orders() == {}
    assert manager.take_deferred() == [request.request_id]
    assert engine.num_held == 7 + 2  # with the blocks that it will keep
    for _ in range(4):
        assert schedule(engine, request) == {}
    assert manager.take_deferred() == []
    assert request.num_computed_tokens == PROMPT + 4
    ((evicted, kept),) = schedule(engine, request).values()  # the fifth token
    assert (evicted, len(kept)) == (28, 2)
    assert engine.num_held == 8 + 2  # none of them new
    assert schedule(engine, request) == {}
    assert engine.row(request)[:7] == [0] * 7
    assert engine.num_held == 2 + 1
    stats = engine.harness.eviction_stats
    assert (stats.evictions, stats.evicted, stats.skipped) == ({"prefill": 1}, 1, {})
    engine.free(request)
    assert engine.num_held == 0


def test_blocks_before_a_deferred_eviction_are_hashed() -> None:
    engine = Engine(evict_after=8)
    request = started(engine)
    for _ in range(20):
        schedule(engine, request)
    assert sum(engine.hashed(list(range(engine.usable + 1)))) == 32 // BLOCK_SIZE


@pytest.mark.parametrize(("max_tokens", "evicts"), [(6, False), (7, True)])
def test_an_output_that_ends_before_the_eviction_helps(max_tokens: int, evicts: bool) -> None:
    """The token that is sampled in the step of the eviction is the last that needs no cache."""
    engine = Engine(evict_after=5)
    started(engine, max_tokens=max_tokens)
    skipped = engine.harness.eviction_stats.skipped
    assert skipped == ({} if evicts else {"no_decode": 1})
    assert engine.num_held == 7 + 2 * evicts


def test_a_request_that_ends_before_its_eviction() -> None:
    engine = Engine(evict_after=5)
    request = started(engine)
    schedule(engine, request)
    request.status = RequestStatus.FINISHED_STOPPED
    engine.free(request)
    assert engine.num_held == 0
    assert engine.harness.eviction_stats.skipped == {"short_output": 1}
    assert engine.harness.eviction_stats.evicted == 0


def test_a_request_that_is_preempted_before_its_eviction_waits_for_the_rest() -> None:
    engine = Engine(evict_after=5)
    request = started(engine)
    for _ in range(2):
        schedule(engine, request)
    engine.free(request)
    assert engine.num_held == 0
    engine.prefill(request)  # with three generated tokens
    assert request.num_computed_tokens == PROMPT + 3
    assert engine.orders() == {}
    assert schedule(engine, request) == {}
    assert len(schedule(engine, request)) == 1
    assert engine.harness.eviction_stats.skipped == {}


def test_a_request_whose_answer_had_begun_is_evicted_with_its_prefill() -> None:
    engine = Engine(evict_after=2)
    request = started(engine)
    schedule(engine, request)
    engine.free(request)
    engine.prefill(request)
    assert request.num_computed_tokens == PROMPT + 2
    assert [evicted for evicted, _ in engine.orders().values()] == [28]


def test_a_deferred_eviction_comes_early_where_blocks_run_out() -> None:
    """Before vLLM would preempt somebody; the one that has waited longest."""
    engine = Engine(evict_after=50, num_blocks=1 + 21, output_reserve=False)
    first, second = started(engine), started(engine, variant=1)
    running = [first, second]
    assert engine.usable - engine.num_held == 3
    assert due(engine, running, 0) == []
    other = started(engine, image=0, after=6, variant=2)  # two blocks more
    running.append(other)
    assert engine.usable - engine.num_held == 1
    # The last blocks of two have room for two tokens, that of the third is full.
    assert [request.num_computed_tokens % BLOCK_SIZE for request in running] == [2, 2, 0]
    assert due(engine, running, 0) == [first.request_id]
    orders = schedule(engine, *running)
    assert list(orders) == [first.request_id]
    assert due(engine, running, 0) == []  # its blocks are on their way back


def test_a_bound_counts_from_the_deferred_eviction() -> None:
    engine = Engine(evict_after=10, every=EVERY)
    request = started(engine)
    evicted = [e for _ in range(36) for e, _ in schedule(engine, request).values()]
    assert evicted == [32, 40, 48, 56]
    assert engine.harness.eviction_stats.evictions == {"prefill": 1, "every": 3}


# --------------------------------------------------------------------------------------------------
# Under pressure


def scarce(engine: Engine) -> Engine:
    """From now on blocks are scarce."""
    engine.harness.manager.decisions.pressure.is_on = True
    return engine


def with_full_caches(*lengths: int, num_blocks: int = 81, **settings: Any) -> Any:
    """Requests of so many tokens each, none of them evicted at the end of its prefill."""
    engine = Engine(when="pressure", num_blocks=num_blocks, output_reserve=False, **settings)
    requests = [
        started(engine, after=length - 16, variant=variant)
        for variant, length in enumerate(lengths)
    ]
    assert engine.harness.eviction_stats.skipped == {"no_pressure": len(requests)}
    return engine, requests


def due(engine: Engine, running: list[Request], demands: int) -> list[str]:
    engine.harness.manager.plan_later_evictions(running, lambda: demands)
    return list(engine.harness.manager.later.due)


ALL = 1000  # more blocks than there are


def test_nobody_is_evicted_while_blocks_are_not_scarce() -> None:
    engine, running = with_full_caches(PROMPT, PROMPT)
    assert due(engine, running, ALL) == []
    assert len(due(scarce(engine), running, ALL)) == 2


def test_a_running_request_under_pressure() -> None:
    engine, (request,) = with_full_caches(PROMPT)
    scarce(engine)
    ((evicted, kept),) = schedule(engine, request, demands=ALL).values()
    assert (evicted, len(kept)) == (24, 2)
    assert engine.num_held == 7 + 2
    assert schedule(engine, request, demands=ALL) == {}  # it has no full cache any more
    assert engine.num_held == 2 + 1
    assert engine.harness.eviction_stats.evictions == {"pressure": 1}


def test_who_frees_most_is_evicted_first() -> None:
    engine, running = with_full_caches(26, 46, 36)
    assert due(scarce(engine), running, ALL) == ["request-1", "request-2", "request-0"]


def test_among_equals_the_one_that_would_be_preempted_first() -> None:
    engine, running = with_full_caches(26, 26, 26)
    assert due(scarce(engine), running, ALL) == ["request-2", "request-1", "request-0"]


def test_no_more_are_evicted_than_blocks_are_missing() -> None:
    """Load counts from the high mark on: 72 of 80 blocks."""
    engine, running = with_full_caches(26, 26, 26)  # 21 blocks; each eviction frees 6 - 2
    scarce(engine)
    assert due(engine, running, 72 - 21) == []
    assert len(due(engine, running, 72 - 21 + 1)) == 1
    assert len(due(engine, running, 72 - 21 + 4)) == 1
    assert len(due(engine, running, 72 - 21 + 5)) == 2


def test_blocks_on_their_way_back_are_not_missing() -> None:
    engine, running = with_full_caches(26, 26, 26)
    scarce(engine)
    demands = 72 - 21 + 4
    assert len(schedule(engine, *running, demands=demands)) == 1
    # Two more are held, and six come back when the step is processed.
    assert due(engine, running, demands) == []


def test_few_are_evicted_in_one_step() -> None:
    engine, running = with_full_caches(*[26] * 6)
    assert MOST_UNDER_PRESSURE == 4
    assert len(due(scarce(engine), running, ALL)) == 4


def test_shared_blocks_count_for_nothing() -> None:
    engine, (first,) = with_full_caches(26)
    second = started(engine)  # the same prompt: 4 blocks are the first one's
    alone = started(engine, variant=5)
    assert engine.row(first)[:4] == engine.row(second)[:4]
    # Two of six replaced blocks would come back, and two are kept.
    assert due(scarce(engine), [first, second, alone], ALL) == [alone.request_id]
    engine.free(first)
    assert set(due(engine, [second, alone], ALL)) == {second.request_id, alone.request_id}


def test_nobody_is_preempted_so_that_another_is_evicted() -> None:
    engine, (request,) = with_full_caches(PROMPT, num_blocks=1 + 11)
    other = started(engine, image=0, after=6, variant=1)  # two of eleven blocks, and one more now
    scarce(engine)
    assert engine.usable - engine.num_held == 2
    assert due(engine, [request, other], ALL) == [request.request_id]
    engine.decode(other)
    engine.decode(request)  # one block is free, two would be kept
    assert engine.orders() == {}
    assert engine.num_held == 7 + 3
    assert due(engine, [request, other], ALL) == []
    engine.free(other)
    assert due(engine, [request], ALL) == [request.request_id]
    engine.decode(request)
    assert len(engine.orders()) == 1


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param({"kv_budget": 1.0}, id="budget-one"),
        pytest.param({"image": 0, "after": 24}, id="text-only"),
        pytest.param({"before": 12, "after": 0}, id="nothing-behind-the-image"),
        pytest.param({"resumable": True}, id="streaming-input"),
    ],
)
def test_who_keeps_its_cache_whatever_the_load_is(parameters: dict[str, Any]) -> None:
    engine = Engine(when="pressure", output_reserve=False)
    request = started(engine, **parameters)
    assert due(scarce(engine), [request], ALL) == []


def test_a_prefill_is_not_evicted_before_its_end() -> None:
    engine = Engine(when="pressure", output_reserve=False)
    request = engine.add()
    assert engine.step(request, 16)
    assert due(scarce(engine), [request], ALL) == []


def test_a_prefill_is_not_evicted_before_its_end_is_processed() -> None:
    """Beside drafts: a chunk in flight, perhaps most of the prompt, would not be replaced."""
    engine = Engine(when="pressure", output_reserve=False)
    engine.harness.manager.later._has_drafts = True
    request = engine.add()
    assert engine.step(request, 8)
    assert engine.kv_cache_manager.allocate_slots(request, 18) is not None
    request.num_computed_tokens, request.num_in_flight_tokens = PROMPT, 18
    assert due(scarce(engine), [request], ALL) == []
    request.num_in_flight_tokens = 0
    assert due(engine, [request], ALL) == [request.request_id]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        pytest.param({}, EvictedOutput(60, 8, 16), id="only-the-load-left-it-whole"),
        # One block: eviction saved nothing, and what was decided stays.
        pytest.param({"before": 1, "image": 2, "after": 2}, None, id="no-saving"),
    ],
)
def test_admission_counts_on_those_that_can_be_evicted(
    parameters: dict[str, Any], expected: EvictedOutput | None
) -> None:
    engine = Engine(when="pressure", budget=0.5, output_reserve=False)
    request = started(engine, **parameters)
    engine.decode(request, 61 - request.num_tokens)
    assert engine.harness.manager._coming_output(request) is None
    assert scarce(engine).harness.manager._coming_output(request) == expected


# --------------------------------------------------------------------------------------------------
# Through vLLM's scheduler; the machine checks every step


def run(machine: SchedulerMachine, num_steps: int = 400, max_tokens: int = 64) -> None:
    for _ in range(num_steps):
        if not machine.scheduler.requests and not machine.in_flight:
            break
        machine.advance(max_tokens)
        machine.check_everything()


ASYNC = {"is_async": True, "steps_in_flight": 2}


def test_a_request_is_preempted_in_the_step_of_its_order() -> None:
    """A less urgent one is scheduled first, and then has to make room."""
    machine = story({"by_priority": True}, VLCachePolicy(), 0, every=8, output_reserve=False)
    machine.add_request(wish(priority=2, max_tokens=20), False)
    machine.advance()
    machine.add_request(wish(after=34, priority=0, variant=1), False)
    run(machine, 24, max_tokens=7)
    assert machine.seen["order withdrawn"] == 1
    run(machine)
    assert not machine.scheduler.requests
    machine.teardown()


@pytest.mark.parametrize("setup", [{}, ASYNC, {"num_drafts": 2}], ids=["sync", "async", "drafts"])
@pytest.mark.parametrize("generated", range(5, 12))
@pytest.mark.parametrize("how", ["stop_after", "max_tokens"])
def test_a_request_that_ends_around_its_order(
    setup: dict[str, Any], generated: int, how: str
) -> None:
    """One of these numbers is that of the step with the order: E = 32 of 26 tokens and 6 more."""
    machine = story(setup, VLCachePolicy(), every=8)
    machine.add_request(wish(**{"max_tokens": 30, how: generated}), False)
    machine.add_request(wish(variant=1, max_tokens=30), False)
    run(machine)
    assert not machine.scheduler.requests
    assert machine.num_evictions["every"] >= 2
    machine.teardown()


@pytest.mark.parametrize("setup", [{}, ASYNC], ids=["sync", "async"])
@pytest.mark.parametrize("steps", range(10, 18))
def test_an_abort_around_an_order(setup: dict[str, Any], steps: int) -> None:
    machine = story(setup, VLCachePolicy(), every=8)
    machine.add_request(wish(max_tokens=30), False)
    run(machine, steps)
    machine.finish("request-0")
    machine.check_everything()
    machine.add_request(wish(variant=1, max_tokens=30), False)
    run(machine)
    machine.teardown()


def preemptions(num_requests: int, num_blocks: int, setup: dict[str, Any], **settings: Any) -> Any:
    """Long answers to different prompts; the machine, and how often a request was preempted."""
    machine = story(setup, VLCachePolicy(), num_blocks, output_reserve=False, **settings)
    for variant in range(num_requests):
        machine.add_request(wish(variant=variant, max_tokens=36), False)
    requests = list(machine.scheduler.requests.values())
    run(machine)
    machine.teardown()
    return machine, sum(request.num_preemptions for request in requests)


@pytest.mark.parametrize("setup", [{}, ASYNC], ids=["sync", "async"])
def test_running_requests_are_evicted_before_anyone_is_preempted(setup: dict[str, Any]) -> None:
    """Eight prompts of 7 blocks, which grow to 16: 128 of 92. Each eviction takes two first."""
    machine, preempted = preemptions(8, 75, setup, budget="1")
    assert preempted > 0  # as vLLM alone
    machine, preempted = preemptions(8, 75, setup, when="pressure", budget="0.1")
    assert preempted == 0
    assert machine.num_evictions["pressure"] == machine.num_evicted > 0


def test_light_load_keeps_every_token() -> None:
    machine, preempted = preemptions(2, 30, {}, when="pressure")
    assert preempted == 0
    assert machine.num_evicted == 0


def test_hysteresis() -> None:
    """Evictions end when load is below the high mark, although pressure lasts to the low one."""
    engine, running = with_full_caches(26, 26, 26)
    gauge = engine.harness.manager.decisions.pressure
    gauge.update(21, [60], 80)
    assert gauge.is_on
    assert len(due(engine, running, 60)) == 3
    gauge.update(21, [40], 80)
    assert gauge.is_on
    assert due(engine, running, 40) == []
    gauge.update(21, [20], 80)
    assert not gauge.is_on
    assert due(engine, running, 60) == []
