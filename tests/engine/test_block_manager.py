# SPDX-License-Identifier: Apache-2.0
"""Block accounting, driven through vLLM's own cache manager.

First the documented behaviour, one promise a test; then random histories of many requests against
an executable model that predicts every row, reference count, prefix hit and failed allocation.
"""

from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.request import Request, RequestStatus

from tests.engine.blocks import (
    EvictionHarness,
    image_prompt,
    make_kv_cache_manager,
    make_request,
)
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.engine.admission import Skip
from vl_cache_vllm.policy.vlcache import VLCachePolicy

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
GENERATED = 7  # the one token that is ever generated, so that answers share prefixes too


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Engine:
    """A scheduler of one request at a time: just enough to tell single stories."""

    def __init__(
        self,
        budget: float = 0.25,
        num_blocks: int = 41,
        enable_caching: bool = True,
        max_observation_tokens: int | None = None,
    ) -> None:
        config = KVCompressConfig(
            policy=VLCachePolicy(max_observation_tokens=max_observation_tokens), budget=budget
        )
        self.harness = EvictionHarness(
            make_kv_cache_manager(config, num_blocks, BLOCK_SIZE, MAX_MODEL_LEN, enable_caching)
        )
        self.kv_cache_manager = self.harness.kv_cache_manager
        self.usable = num_blocks - 1

    def add(
        self,
        before: int = 2,
        image: int = 14,
        after: int = 10,
        variant: int = 0,
        max_tokens: int = 100,
        resumable: bool = False,
        modality: str = "image",
    ) -> Request:
        """By default 26 tokens with the image in 2..15: N = 7 blocks, M = 2 at a quarter."""
        request = make_request(
            f"request-{len(self.harness.requests)}",
            image_prompt(before, image, after, variant),
            [(before, image, "image-0")] if image else [],
            block_size=BLOCK_SIZE,
            max_tokens=max_tokens,
            resumable=resumable,
            modality=modality,
        )
        self.harness.requests[request.request_id] = request
        return request

    def step(self, request: Request, num_tokens: int, full_sequence_must_fit: bool = False) -> bool:
        """Schedule tokens and process the step at once; False if blocks are missing."""
        blocks, hit = None, 0
        if request.num_computed_tokens == 0:
            blocks, hit = self.harness.prefix_hit(request)
        allocated = self.kv_cache_manager.allocate_slots(
            request,
            num_tokens,
            num_new_computed_tokens=hit,
            new_computed_blocks=blocks,
            full_sequence_must_fit=full_sequence_must_fit,
        )
        if allocated is None:
            return False
        request.num_computed_tokens += hit + num_tokens
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(GENERATED)
        return True

    def prefill(self, request: Request) -> None:
        """All of the prompt that no prefix hit covers, in one step."""
        _, hit = self.harness.prefix_hit(request)
        assert self.step(request, request.num_tokens - hit)

    def decode(self, request: Request, num_tokens: int = 1) -> None:
        for _ in range(num_tokens):
            assert self.step(request, 1)

    def free(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0

    def row(self, request: Request) -> list[int]:
        return self.harness.row(request)

    @property
    def num_held(self) -> int:
        return self.usable - self.harness.block_pool.get_num_free_blocks()

    def hashed(self, row: list[int]) -> list[bool]:
        return [self.harness.block_pool.blocks[i].block_hash is not None for i in row]


def test_life_of_a_request() -> None:
    engine = Engine()
    request = engine.add()

    assert engine.step(request, 16)
    assert len(engine.row(request)) == 4  # as plain vLLM
    assert engine.step(request, 10)
    row = engine.row(request)
    assert len(row) == 7 + 2  # M blocks reserved with the last chunk
    assert engine.num_held == 9
    assert 0 not in row

    engine.decode(request)
    after = engine.row(request)
    assert after[:7] == [0] * 7  # freed, null in place
    assert after[7:9] == row[7:]
    assert len(after) == 10  # decoding starts in a fresh block
    assert engine.num_held == 3

    engine.decode(request, 3)
    assert engine.row(request) == after
    engine.decode(request)
    assert len(engine.row(request)) == 11
    engine.decode(request, 30)
    assert len(engine.row(request)) == 7 + 2 + cdiv(35, BLOCK_SIZE)
    assert engine.num_held == 2 + cdiv(35, BLOCK_SIZE)

    engine.free(request)
    assert engine.num_held == 0
    assert engine.harness.manager.num_evicted == 1
    assert not engine.harness.manager.num_skipped


@pytest.mark.parametrize("prompt_tokens", [25, 28], ids=["part-of-a-block", "whole-blocks"])
def test_decoding_never_fills_the_last_prompt_block(prompt_tokens: int) -> None:
    engine = Engine()
    request = engine.add(after=prompt_tokens - 16)
    engine.prefill(request)
    for generated in range(1, 12):
        engine.decode(request)
        assert len(engine.row(request)) == 7 + 2 + cdiv(generated, BLOCK_SIZE)
        assert engine.num_held == 2 + cdiv(generated, BLOCK_SIZE)


def test_prompt_blocks_outlive_the_step_that_reads_them() -> None:
    """Async scheduling: the next step is scheduled while the compacting one still runs."""
    engine = Engine()
    request = engine.add()
    assert engine.step(request, 16)
    manager = engine.kv_cache_manager
    assert manager.allocate_slots(request, 10) is not None
    request.num_computed_tokens, request.num_in_flight_tokens = 26, 10
    assert manager.allocate_slots(request, 1) is not None
    row = engine.row(request)
    assert 0 not in row
    assert len(row) == 10
    assert engine.num_held == 10
    # The output of the compacting step arrived; only the first decode step is in flight.
    request.num_computed_tokens, request.num_in_flight_tokens = 27, 1
    request.append_output_token_ids(GENERATED)
    assert manager.allocate_slots(request, 1) is not None
    assert engine.row(request) == [0] * 7 + row[7:]
    assert engine.num_held == 3


def test_prompt_blocks_keep_their_hashes_and_nothing_later_is_hashed() -> None:
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    row = engine.row(request)
    assert engine.hashed(row) == [True] * 6 + [False] * 3
    engine.decode(request, 20)
    assert engine.hashed(row[:7]) == [True] * 6 + [False]
    assert not any(engine.hashed(engine.row(request)[7:]))
    engine.free(request)
    assert sum(engine.hashed(list(range(engine.usable + 1)))) == 6


def test_the_same_image_is_a_prefix_hit_after_eviction() -> None:
    engine = Engine()
    first, second = engine.add(), engine.add(after=13)
    engine.prefill(first)
    prompt_blocks = engine.row(first)
    engine.decode(first, 5)
    blocks, hit = engine.harness.prefix_hit(second)
    # Six blocks are cached, but the image ends at 16 and later queries must be computed.
    assert hit == 16
    assert blocks.get_block_ids() == (prompt_blocks[:4],)
    engine.prefill(second)
    assert engine.row(second)[:4] == prompt_blocks[:4]
    assert engine.num_held == 2 + 2 + 8 + 2  # first: M and decode; second: N and M
    engine.decode(second)
    assert engine.num_held == 2 + 2 + 2 + 1


@pytest.mark.parametrize(
    ("before", "image", "after", "expected"),
    [
        (2, 14, 10, 16),  # ends on a block
        (2, 13, 11, 12),  # ends inside a block: that block is computed again
        (2, 2, 22, 4),
        (1, 2, 23, 0),
        (2, 23, 1, 24),
    ],
)
def test_hits_end_where_the_observed_queries_start(
    before: int, image: int, after: int, expected: int
) -> None:
    engine = Engine()
    first, second = (engine.add(before, image, after) for _ in range(2))
    engine.prefill(first)
    assert engine.harness.prefix_hit(second)[1] == expected


def test_a_shorter_observation_window_allows_longer_hits() -> None:
    engine = Engine(max_observation_tokens=3)  # queries 23, 24, 25
    first, second = engine.add(), engine.add()
    engine.prefill(first)
    assert engine.harness.prefix_hit(second)[1] == 20


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"image": 0, "after": 24}, id="text-only"),
        pytest.param({"max_tokens": 1}, id="no-decode"),
        pytest.param({"resumable": True}, id="streaming-input"),
        pytest.param({"modality": "audio"}, id="audio"),
    ],
)
def test_hits_of_requests_that_are_not_evicted_are_not_trimmed(changes: dict[str, int]) -> None:
    engine = Engine()
    first, second = (engine.add(**changes) for _ in range(2))  # type: ignore[arg-type]
    engine.prefill(first)
    assert engine.harness.manager.max_hit_tokens(second) is None
    assert engine.harness.prefix_hit(second)[1] == 24


def test_shared_prompt_blocks_stay_with_the_other_request() -> None:
    engine = Engine()
    first, second = engine.add(), engine.add()
    engine.prefill(first)
    engine.prefill(second)
    shared = engine.row(second)[:4]
    assert engine.row(first)[:4] == shared
    engine.decode(first)
    pool = engine.harness.block_pool
    assert [pool.blocks[i].ref_cnt for i in shared] == [1] * 4
    assert engine.row(second)[:4] == shared
    engine.decode(second)
    assert [pool.blocks[i].ref_cnt for i in shared] == [0] * 4


@pytest.mark.parametrize(
    ("changes", "skip"),
    [
        pytest.param({"image": 0, "after": 24}, Skip.TEXT_ONLY, id="text-only"),
        pytest.param({"modality": "audio"}, Skip.TEXT_ONLY, id="audio"),
        pytest.param({"before": 12, "after": 0}, Skip.NO_POST_VISION_TOKENS, id="image-last"),
        pytest.param({"max_tokens": 1}, Skip.NO_DECODE, id="no-decode"),
        pytest.param({"resumable": True}, Skip.STREAMING_INPUT, id="streaming-input"),
        pytest.param({"image": 3, "after": 2}, Skip.NO_SAVING, id="no-saving"),
    ],
)
def test_requests_that_are_not_evicted_are_plain(changes: dict[str, int], skip: Skip) -> None:
    engine = Engine()
    request = engine.add(**changes)  # type: ignore[arg-type]
    engine.prefill(request)
    for _ in range(20):
        length = cdiv(request.num_computed_tokens, BLOCK_SIZE)
        row = engine.row(request)
        assert len(row) == length == engine.num_held
        assert 0 not in row
        engine.decode(request)
    assert all(engine.hashed(engine.row(request)[: request.num_computed_tokens // BLOCK_SIZE]))
    assert engine.harness.manager.num_skipped == Counter({skip: 1})
    assert engine.harness.manager.num_evicted == 0


def test_a_refusal_is_remembered_when_its_reason_is_gone() -> None:
    """The request grows beyond the sizes that save nothing, but the worker has decoded since."""
    engine = Engine(budget=0.5)
    request = engine.add(before=1, image=4, after=2)  # 7 tokens: N = 2, M = 1, one full page
    engine.prefill(request)
    assert engine.harness.manager.plan(request).skip is Skip.NO_SAVING
    engine.decode(request, 40)
    assert len(engine.row(request)) == cdiv(47, BLOCK_SIZE)
    assert engine.harness.manager.plan(request).skip is Skip.NO_SAVING
    assert engine.harness.manager.num_skipped == Counter({Skip.NO_SAVING: 1})


def test_a_preempted_request_starts_over_with_all_its_tokens() -> None:
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    engine.decode(request, 9)
    assert engine.row(request)[:7] == [0] * 7
    engine.free(request)
    assert engine.num_held == 0
    assert engine.row(request) == []
    assert request.num_tokens == 36  # 26 and 10 generated
    assert engine.harness.prefix_hit(request)[1] == 16
    engine.prefill(request)
    assert len(engine.row(request)) == 9 + 3
    assert 0 not in engine.row(request)
    engine.decode(request)
    assert engine.row(request)[:9] == [0] * 9
    assert engine.num_held == 3 + 1
    assert engine.harness.manager.num_evicted == 2


def test_admission_asks_for_prompt_and_kept_blocks() -> None:
    """N + M blocks must be free for a request that is admitted only as a whole."""
    engine = Engine(num_blocks=1 + 9 + 4)
    other = engine.add(image=0, after=15)
    engine.prefill(other)
    assert engine.num_held == 5
    request = engine.add()
    assert not engine.step(request, 16, full_sequence_must_fit=True)
    assert engine.row(request) == []
    engine.free(other)
    assert engine.step(request, 16, full_sequence_must_fit=True)


def test_a_failed_allocation_changes_nothing() -> None:
    engine = Engine(num_blocks=1 + 9 + 1)
    request = engine.add()
    assert engine.step(request, 16)
    other = engine.add(image=0, after=6, variant=1)
    engine.prefill(other)
    assert engine.num_held == 6
    before = engine.row(request)
    assert not engine.step(request, 10)  # 3 prompt blocks and 2 kept ones, but 4 are free
    assert engine.row(request) == before
    assert engine.num_held == 6
    assert engine.harness.manager.num_evicted == 0
    engine.free(other)
    assert engine.step(request, 10)
    assert engine.harness.manager.num_evicted == 1


def test_a_prompt_that_could_never_fit_with_its_kept_blocks_is_not_evicted() -> None:
    engine = Engine(num_blocks=1 + 8)
    request = engine.add()
    engine.prefill(request)
    assert len(engine.row(request)) == 7
    assert engine.harness.manager.num_skipped == Counter({Skip.POOL_TOO_SMALL: 1})


def test_missing_blocks_are_those_that_a_prefill_takes_from_the_pool() -> None:
    engine = Engine()
    manager = engine.harness.manager
    first, second, other = engine.add(), engine.add(), engine.add(variant=1)
    assert [manager.missing_blocks(r) for r in (first, second, other)] == [7, 7, 7]
    assert engine.step(first, 16)
    assert [manager.missing_blocks(r) for r in (first, second, other)] == [3, 3, 7]
    assert engine.step(first, 10)
    assert [manager.missing_blocks(r) for r in (first, second, other)] == [0, 1, 7]
    engine.free(first)
    assert [manager.missing_blocks(r) for r in (first, second, other)] == [7, 7, 7]


def test_freeing_an_unknown_or_unallocated_request() -> None:
    engine = Engine()
    engine.free(engine.add())
    assert engine.num_held == 0


def test_without_prefix_caching() -> None:
    engine = Engine(enable_caching=False)
    request = engine.add()
    engine.prefill(request)
    assert len(engine.row(request)) == 9
    engine.decode(request, 5)
    assert engine.num_held == 4
    assert not any(engine.hashed(list(range(41))))
    engine.free(request)
    assert engine.num_held == 0


def test_a_request_the_scheduler_does_not_know_is_plain() -> None:
    """For example another manager's dummy request."""
    engine = Engine()
    request = engine.add()
    engine.harness.requests.clear()
    assert engine.kv_cache_manager.allocate_slots(request, 26) is not None
    assert len(engine.row(request)) == 7


# --------------------------------------------------------------------------------------------------
# Random histories
# --------------------------------------------------------------------------------------------------

PrefixKey = tuple[tuple[int, ...], tuple[tuple[int, str], ...]]


@dataclass(eq=False)
class Expected:
    """What the model knows of one request since its prefill (re)started."""

    request: Request
    images: list[tuple[int, int, str]]
    row: list[int] = field(default_factory=list)  # block ids, 0 is null
    num_cached: int = 0  # leading blocks whose hashes were considered
    prompt_tokens: int = 0  # E
    num_prompt: int = 0  # N
    num_kept: int = 0  # M; 0: not evicted
    skip: Skip | None = None
    num_possible: int = 0  # M under pressure
    is_decided: bool = False
    is_freed: bool = False


class BlockAccounting(RuleBasedStateMachine):
    """A scheduler like vLLM's AsyncScheduler, and beside it the model."""

    seen: Counter[str]  # what happened in all examples together; set by the test

    @initialize(
        num_blocks=st.integers(6, 50),
        budget=st.sampled_from(["0.25", "0.1", "0.34", "0.5", "0.75", "1"]),
        min_prompt_tokens=st.sampled_from([0, 24, 0]),
        max_observation_tokens=st.sampled_from([None, None, 1, 3]),
        max_steps_in_flight=st.sampled_from([2, 1]),
        must_fit=st.booleans(),
        when=st.sampled_from(["always", "pressure"]),
    )
    def start(
        self,
        num_blocks: int,
        budget: str,
        min_prompt_tokens: int,
        max_observation_tokens: int | None,
        max_steps_in_flight: int,
        must_fit: bool,
        when: str,
    ) -> None:
        self.budget = Fraction(budget)
        self.min_prompt_tokens = min_prompt_tokens
        self.max_observation_tokens = max_observation_tokens
        self.max_steps_in_flight = max_steps_in_flight
        self.must_fit = must_fit
        self.usable = num_blocks - 1
        config = KVCompressConfig(
            policy=VLCachePolicy(max_observation_tokens=max_observation_tokens),
            budget=float(budget),
            when=when,
            min_prompt_tokens=min_prompt_tokens,
        )
        self.by_pressure = when == "pressure"
        self.harness = EvictionHarness(
            make_kv_cache_manager(config, num_blocks, BLOCK_SIZE, MAX_MODEL_LEN)
        )
        self.kv_cache_manager = self.harness.kv_cache_manager
        self.pool = self.harness.block_pool
        self.num_added = 0
        self.expected: dict[str, Expected] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        # Scheduled steps whose output is not processed: (request, tokens, yields a token).
        self.in_flight: list[list[tuple[Request, int, bool]]] = []
        self.refs: Counter[int] = Counter()
        self.cached: dict[PrefixKey, set[int]] = {}
        self.key_of_block: dict[int, PrefixKey] = {}
        self.num_evicted = 0
        self.num_skipped: Counter[Skip] = Counter()
        self.num_freed = 0
        self.reported: Counter[str] = Counter()

    # Requests come and go.

    @rule(
        before=st.sampled_from([0, 1, 4, 5]),
        image=st.sampled_from([8, 13, 3, 22, 0]),
        identifier=st.sampled_from(["cat", "dog"]),
        after=st.sampled_from([9, 18]) | st.integers(0, 24),
        variant=st.integers(0, 1),
        max_tokens=st.sampled_from([60, 9, 2, 1]),
        resumable=st.sampled_from([False] * 7 + [True]),
        modality=st.sampled_from(["image"] * 7 + ["audio"]),
    )
    def add_request(
        self,
        before: int,
        image: int,
        identifier: str,
        after: int,
        variant: int,
        max_tokens: int,
        resumable: bool,
        modality: str,
    ) -> None:
        prompt = image_prompt(before, image, after, variant) or [1]
        images = [(before, image, identifier)] if image else []
        request = make_request(
            f"request-{self.num_added}",
            prompt,
            images,
            block_size=BLOCK_SIZE,
            max_tokens=max_tokens,
            resumable=resumable,
            modality=modality,
        )
        self.num_added += 1
        self.harness.requests[request.request_id] = request
        self.expected[request.request_id] = Expected(request, images)
        self.waiting.append(request)

    @precondition(lambda self: self.running)
    @rule(kind=st.sampled_from(["abort", "preempt", "preempt", "reset"]), data=st.data())
    def interrupt(self, kind: str, data: st.DataObject) -> None:
        if kind == "abort":
            self.finish(data.draw(st.sampled_from([*self.running, *self.waiting])))
        elif kind == "preempt":  # anyone, as under the priority policy
            self.preempt(data.draw(st.sampled_from(self.running)))
        else:  # of the prefix cache, which preempts everyone
            while self.running:
                self.preempt(self.running[-1], drop_stale_output=True)
            assert self.kv_cache_manager.reset_prefix_cache()
            self.cached.clear()
            self.key_of_block.clear()
        self.seen[kind] += 1

    def finish(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_STOPPED
        self.release(request)
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        del self.harness.requests[request.request_id]
        del self.expected[request.request_id]

    def preempt(self, request: Request, drop_stale_output: bool = False) -> None:
        if self.expected[request.request_id].is_freed:
            self.seen["preempt evicted"] += 1
        self.release(request)
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.drop_stale_output = drop_stale_output or (
            request.drop_stale_output and request.num_stale_output_tokens > 0
        )
        request.num_stale_output_tokens = request.num_in_flight_tokens
        request.num_output_placeholders = 0

    def release(self, request: Request) -> None:
        self.kv_cache_manager.free(request)
        old = self.expected[request.request_id]
        self.refs.subtract(block for block in old.row if block)
        self.expected[request.request_id] = Expected(request, old.images)

    # Steps.

    @precondition(lambda self: len(self.in_flight) < self.max_steps_in_flight and self.expected)
    @rule(data=st.data())
    def schedule_step(self, data: st.DataObject) -> None:
        self.schedule(data)

    def schedule(self, data: st.DataObject) -> None:
        if self.by_pressure and data.draw(st.integers(0, 2)) == 0:
            gauge = self.harness.manager.pressure
            gauge.is_on = not gauge.is_on
        step: list[tuple[Request, int]] = []
        index, someone_was_preempted = 0, False
        while index < len(self.running):
            request = self.running[index]
            index += 1
            num_new = self.num_schedulable(request)
            if num_new <= 0 or self.is_out_of_budget(data):
                continue
            num_new = self.draw_chunk(data, num_new)
            while not self.allocate(request, num_new):
                victim = self.running[-1]
                self.preempt(victim)
                someone_was_preempted = True
                if victim is request:
                    break
            if request in self.running:
                step.append((request, num_new))
        for request in [] if someone_was_preempted else list(self.waiting):
            if request.num_stale_output_tokens and not request.drop_stale_output:
                continue
            if self.is_out_of_budget(data):
                break
            blocks, hit = self.predicted_hit(request)
            num_new = self.draw_chunk(data, request.num_tokens - hit)
            if not self.allocate(request, num_new, blocks, hit):
                break
            request.num_computed_tokens = hit
            request.status = RequestStatus.RUNNING
            self.waiting.remove(request)
            self.running.append(request)
            step.append((request, num_new))
        self.on_step(step)
        self.in_flight.append([self.scheduled(request, num_new) for request, num_new in step])

    def on_step(self, step: list[tuple[Request, int]]) -> None:
        """A step is about to run; for tests that add a worker."""

    def num_schedulable(self, request: Request) -> int:
        known = request.num_tokens + request.num_output_placeholders
        if (
            request.num_output_placeholders > 0
            and request.num_computed_tokens + 2 - request.num_output_placeholders
            >= request.num_prompt_tokens + request.max_tokens
        ):
            return 0
        return min(known, MAX_MODEL_LEN - 1) - request.num_computed_tokens

    @staticmethod
    def is_out_of_budget(data: st.DataObject) -> bool:
        return data.draw(st.integers(0, 7)) == 7

    @staticmethod
    def draw_chunk(data: st.DataObject, most: int) -> int:
        return most if most == 1 else data.draw(st.just(most) | st.integers(1, most))

    @staticmethod
    def scheduled(request: Request, num_new: int) -> tuple[Request, int, bool]:
        request.num_computed_tokens += num_new
        request.num_in_flight_tokens += num_new
        known = request.num_tokens + request.num_output_placeholders
        yields_token = request.num_computed_tokens >= known
        request.num_output_placeholders += yields_token
        return request, num_new, yields_token

    @precondition(lambda self: self.in_flight)
    @rule()
    def process_step(self) -> None:
        self.process_output()

    def process_output(self) -> None:
        for request, num_tokens, yields_token in self.in_flight.pop(0):
            if request.request_id not in self.expected:
                continue
            request.num_in_flight_tokens -= num_tokens
            is_stale = request.num_stale_output_tokens > 0
            if is_stale:
                self.seen["stale output"] += 1
                request.num_stale_output_tokens -= num_tokens
                if request.drop_stale_output:
                    continue
            if not yields_token:
                continue
            request.append_output_token_ids(GENERATED)
            if not is_stale:
                request.num_output_placeholders -= 1
            if request.status == RequestStatus.RUNNING:
                num_known = request.num_computed_tokens - request.num_output_placeholders
                self.kv_cache_manager.cache_blocks(request, num_known)
                self.cache(self.expected[request.request_id], num_known)
            if (
                request.num_output_tokens >= request.max_tokens
                or request.num_tokens >= MAX_MODEL_LEN
            ):
                self.finish(request)
                self.seen["finish"] += 1

    @precondition(lambda self: self.expected)
    @rule(num_steps=st.integers(2, 8), data=st.data())
    def run_steps(self, num_steps: int, data: st.DataObject) -> None:
        for _ in range(num_steps):
            if len(self.in_flight) == self.max_steps_in_flight:
                self.process_output()
            self.schedule(data)
            self.check_everything()

    # The model: what each call must do.

    def decide(self, expected: Expected) -> None:
        """The rules of admission, written down once more, for the tokens known now."""
        request = expected.request
        visual = (
            []
            if request.mm_features and request.mm_features[0].modality == "audio"
            else (expected.images)
        )
        vision_end = max((offset + length for offset, length, _ in visual), default=None)
        tokens = request.num_tokens
        num_prompt = cdiv(tokens, BLOCK_SIZE)
        num_kept = ceil(self.budget * num_prompt)
        skip = None
        if vision_end is None:
            skip = Skip.TEXT_ONLY
        elif vision_end >= request.num_prompt_tokens:
            skip = Skip.NO_POST_VISION_TOKENS
        elif request.num_prompt_tokens < self.min_prompt_tokens:
            skip = Skip.SHORT_PROMPT
        elif num_kept >= tokens // BLOCK_SIZE:
            skip = Skip.NO_SAVING
        elif num_prompt + num_kept + 1 > self.usable:
            skip = Skip.POOL_TOO_SMALL
        elif request.resumable:
            skip = Skip.STREAMING_INPUT
        elif request.max_tokens <= 1:
            skip = Skip.NO_DECODE
        expected.prompt_tokens, expected.num_prompt = tokens, num_prompt
        expected.num_kept, expected.skip = (0 if skip else num_kept), skip
        expected.num_possible = expected.num_kept

    def decide_by_pressure(self, expected: Expected) -> None:
        """What a step says of a prefill that has not ended before it."""
        if self.by_pressure and not expected.is_decided and expected.num_possible:
            is_on = self.harness.manager.pressure.is_on
            expected.num_kept = expected.num_possible if is_on else 0
            expected.skip = None if is_on else Skip.NO_PRESSURE

    def prefix_key(self, expected: Expected, num_tokens: int) -> PrefixKey:
        tokens = tuple(expected.request.all_token_ids[:num_tokens])
        images = tuple((start, name) for start, _, name in expected.images if start < num_tokens)
        return tokens, images

    def predicted_hit(self, request: Request) -> tuple[KVCacheBlocks, int]:
        expected = self.expected[request.request_id]
        self.decide(expected)
        hit = 0
        while hit + BLOCK_SIZE <= request.num_tokens - 1 and (
            self.prefix_key(expected, hit + BLOCK_SIZE) in self.cached
        ):
            hit += BLOCK_SIZE
        if expected.num_kept:
            offset, length, _ = expected.images[-1]
            observed_from = offset + length
            if self.max_observation_tokens is not None:
                observed_from = max(observed_from, request.num_tokens - self.max_observation_tokens)
            limit = observed_from // BLOCK_SIZE * BLOCK_SIZE
            self.seen["trimmed hit"] += hit > limit
            hit = min(hit, limit)
        blocks, actual = self.harness.prefix_hit(request)
        assert actual == hit
        ids = blocks.get_block_ids()[0]
        assert len(ids) == hit // BLOCK_SIZE
        for index, block in enumerate(ids):
            key = self.prefix_key(expected, (index + 1) * BLOCK_SIZE)
            assert block in self.cached[key]
        return blocks, hit

    def row_length(self, expected: Expected, num_tokens: int) -> int:
        if not expected.num_kept or num_tokens < expected.prompt_tokens:
            return cdiv(num_tokens, BLOCK_SIZE)
        generated = num_tokens - expected.prompt_tokens
        return expected.num_prompt + expected.num_kept + cdiv(generated, BLOCK_SIZE)

    @property
    def num_free(self) -> int:
        return self.usable - sum(count > 0 for count in self.refs.values())

    def allocate(
        self,
        request: Request,
        num_new: int,
        hit_blocks: KVCacheBlocks | None = None,
        hit: int = 0,
    ) -> bool:
        """Call vLLM, predict the outcome, compare; True if the blocks were allocated."""
        expected = self.expected[request.request_id]
        self.decide_by_pressure(expected)
        hit_ids = hit_blocks.get_block_ids()[0] if hit_blocks is not None else []
        is_admission = hit_blocks is not None
        computed = request.num_computed_tokens + hit
        end = computed + num_new
        allocated = self.kv_cache_manager.allocate_slots(
            request,
            num_new,
            num_new_computed_tokens=hit,
            new_computed_blocks=hit_blocks,
            full_sequence_must_fit=is_admission and self.must_fit,
        )

        processed = computed - request.num_in_flight_tokens
        if expected.is_decided and expected.num_kept and not expected.is_freed:
            if processed >= expected.prompt_tokens:
                prompt = expected.row[: expected.num_prompt]
                self.refs.subtract(prompt)
                self.seen["shared prompt freed"] += any(self.refs[block] for block in prompt)
                expected.row[: expected.num_prompt] = [0] * expected.num_prompt
                expected.is_freed = True
                self.num_freed += sum(not self.refs[block] for block in prompt)
                self.seen["prompt freed"] += 1
            else:
                self.seen["freeing waits for a step in flight"] += 1
        # Cached blocks that nobody holds count as free until they are hit.
        revived = sum(not self.refs[block] for block in hit_ids)
        held = len(expected.row) + len(hit_ids)
        num_fresh = max(0, self.row_length(expected, end) - held)
        # The end of an evicted prefill leaves room for the first decode block.
        reserve = not expected.is_decided and expected.num_kept > 0
        fits = num_fresh + revived + (reserve and end >= expected.prompt_tokens) <= self.num_free
        if is_admission and self.must_fit:
            whole = self.row_length(expected, request.num_tokens) - held
            fits = fits and whole + revived + reserve <= self.num_free
        assert (allocated is not None) == fits
        if allocated is None:
            self.seen["allocation failed"] += 1
            return False

        if hit_ids:
            self.seen["prefix hit"] += 1
            self.refs.update(hit_ids)
            expected.row.extend(hit_ids)
            expected.num_cached = len(hit_ids)
        (fresh,) = allocated.get_block_ids()
        assert len(fresh) == num_fresh
        assert len(set(fresh)) == num_fresh
        for block in fresh:
            assert block != 0
            assert self.refs[block] == 0, f"block {block} is held already"
            if (key := self.key_of_block.pop(block, None)) is not None:
                self.seen["cached block reused"] += 1
                self.cached[key].discard(block)
                if not self.cached[key]:
                    del self.cached[key]
        self.refs.update(fresh)
        expected.row.extend(fresh)
        if not expected.is_decided and end >= expected.prompt_tokens:
            expected.is_decided = True
            if expected.skip is None:
                self.num_evicted += 1
                self.seen["evicted"] += 1
                self.seen["evicted after preemption"] += request.num_output_tokens > 0
            else:
                self.num_skipped[expected.skip] += 1
                self.seen[f"skip {expected.skip.value}"] += 1
        self.cache(expected, min(end, request.num_tokens))
        return True

    def cache(self, expected: Expected, num_tokens: int) -> None:
        if expected.is_decided and expected.num_kept:
            num_tokens = min(num_tokens, expected.prompt_tokens)
        for index in range(expected.num_cached, num_tokens // BLOCK_SIZE):
            block = expected.row[index]
            assert block != 0, "a freed block would be hashed"
            key = self.prefix_key(expected, (index + 1) * BLOCK_SIZE)
            self.cached.setdefault(key, set()).add(block)
            self.key_of_block[block] = key
        expected.num_cached = max(expected.num_cached, num_tokens // BLOCK_SIZE)

    # What must hold after every rule.

    @invariant()
    def check_everything(self) -> None:
        self.check_rows()
        self.check_holders()
        self.check_hashes()
        assert self.harness.manager.num_evicted == self.num_evicted
        assert self.harness.manager.num_skipped == self.num_skipped
        self.check_stats()

    def check_stats(self) -> None:
        manager = self.harness.manager
        held = [e for e in self.expected.values() if e.is_decided and e.num_kept]
        assert manager.blocks_held == sum(block > 0 for e in held for block in e.row)
        if (stats := manager.take_stats()) is not None:
            self.reported["evicted"] += stats.evicted
            self.reported["freed"] += stats.freed_blocks
            self.reported["held"] = stats.blocks_held
            self.reported.update({f"skip {reason}": n for reason, n in stats.skipped.items()})
            assert manager.take_stats() is None
        expected = Counter({f"skip {s.value}": n for s, n in self.num_skipped.items()})
        expected.update(evicted=self.num_evicted, freed=self.num_freed, held=manager.blocks_held)
        assert self.reported == expected

    def check_rows(self) -> None:
        for expected in self.expected.values():
            row = self.harness.row(expected.request)
            assert row == expected.row
            num_prompt, num_kept = expected.num_prompt, expected.num_kept
            if expected.is_decided and num_kept:
                assert row[:num_prompt].count(0) == (num_prompt if expected.is_freed else 0)
                assert 0 not in row[num_prompt:]
                generated = expected.request.num_computed_tokens - expected.prompt_tokens
                assert len(row) == num_prompt + num_kept + cdiv(generated, BLOCK_SIZE)
                for block in row[num_prompt:]:
                    assert self.refs[block] == 1
                    assert block not in self.key_of_block
            else:
                assert 0 not in row
                assert len(row) == cdiv(expected.request.num_computed_tokens, BLOCK_SIZE)

    def check_holders(self) -> None:
        assert self.pool.get_num_free_blocks() == self.num_free
        held_in_use = self.usable - self.num_free
        assert self.kv_cache_manager.usage == pytest.approx(held_in_use / self.usable)
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == self.refs[block.block_id]
        places: dict[int, tuple[int, PrefixKey]] = {}
        for expected in self.expected.values():
            for index, block in enumerate(expected.row):
                if block and self.refs[block] > 1:
                    # Shared only as the same hashed block of the same prefix.
                    key = self.prefix_key(expected, (index + 1) * BLOCK_SIZE)
                    assert self.key_of_block[block] == key
                    assert places.setdefault(block, (index, key)) == (index, key)

    def check_hashes(self) -> None:
        hashed = {block.block_id for block in self.pool.blocks if block.block_hash is not None}
        assert hashed == set(self.key_of_block)

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        while self.in_flight:
            self.process_output()
        while self.expected:
            self.finish([*self.running, *self.waiting][0])
        assert self.pool.get_num_free_blocks() == self.usable
        assert all(block.ref_cnt == 0 for block in self.pool.blocks[1:])
        manager = self.harness.manager
        assert not manager.req_to_blocks
        assert not manager.num_cached_block
        assert not manager._decided
        assert not manager._prompt_freed
        assert self.kv_cache_manager.reset_prefix_cache()


def test_random_histories() -> None:
    seen = BlockAccounting.seen = Counter()
    run_state_machine_as_test(
        BlockAccounting,
        settings=settings(
            max_examples=250,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # The histories must reach what they are meant to try.
    for event in (
        "evicted",
        "evicted after preemption",
        "prompt freed",
        "shared prompt freed",
        "freeing waits for a step in flight",
        "prefix hit",
        "trimmed hit",
        "cached block reused",
        "allocation failed",
        "preempt",
        "preempt evicted",
        "stale output",
        "finish",
        "abort",
        "reset",
        *(f"skip {skip.value}" for skip in Skip),
    ):
        assert seen[event], f"no history had: {event} ({dict(seen)})"
