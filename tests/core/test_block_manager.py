# SPDX-License-Identifier: Apache-2.0
"""Block accounting, driven through vLLM's own cache manager.

The documented behaviour, one promise a test; random histories are in `test_scheduler_machine`.
"""

from collections import Counter
from typing import Any

import pytest
from vllm.utils.math_utils import cdiv
from vllm.v1.request import Request, RequestStatus

from tests.helpers.blocks import (
    EvictionHarness,
    image_prompt,
    make_kv_cache_manager,
    make_request,
)
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import Skip
from vl_cache_vllm.core.stats import EvictionStats
from vl_cache_vllm.policy.vlcache import VLCachePolicy

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
GENERATED = 7  # the one token that is ever generated, so that answers share prefixes too


class Engine:
    """A scheduler of one request at a time: just enough to tell single stories."""

    def __init__(
        self,
        budget: float = 0.25,
        num_blocks: int = 41,
        enable_caching: bool = True,
        max_observation_tokens: int | None = None,
        output_reserve: bool = True,
        evict_after: int = 0,
        **settings: Any,
    ) -> None:
        config = KVCompressConfig(
            policy=VLCachePolicy(
                max_observation_tokens=max_observation_tokens, evict_after=evict_after
            ),
            budget=budget,
            output_reserve=output_reserve,
            **settings,
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
        **extra_args: Any,
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
            extra_args=extra_args,
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

    def orders(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """E and the kept blocks of each request that the steps since the last call evicted."""
        orders = self.harness.manager.take_orders()
        return {name: (order.evicted_tokens, order.kept_blocks) for name, order in orders.items()}

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
    assert len(row) == 7  # still vLLM's own
    assert 0 not in row
    ((evicted, kept),) = engine.orders().values()
    assert evicted == 24  # the whole blocks
    assert len(set(kept)) == 2 and not set(kept).intersection(row)
    assert engine.num_held == 7 + 2

    engine.decode(request)
    assert engine.row(request) == [0] * 6 + row[6:]  # freed, null in place; the last block stays
    assert engine.num_held == 2 + 1

    engine.decode(request)
    assert engine.row(request) == [0] * 6 + row[6:]
    engine.decode(request)
    assert len(engine.row(request)) == 8
    engine.decode(request, 32)
    assert len(engine.row(request)) == cdiv(61, BLOCK_SIZE)
    assert engine.num_held == 2 + cdiv(61 - 24, BLOCK_SIZE)
    assert not engine.orders()

    engine.free(request)
    assert engine.num_held == 0
    assert engine.harness.eviction_stats.evicted == 1
    assert not engine.harness.eviction_stats.skipped


@pytest.mark.parametrize("prompt_tokens", [25, 28], ids=["part-of-a-block", "whole-blocks"])
def test_decoding_goes_on_where_the_prompt_ended(prompt_tokens: int) -> None:
    engine = Engine()
    request = engine.add(after=prompt_tokens - 16)
    engine.prefill(request)
    evicted = prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
    for length in range(prompt_tokens + 1, prompt_tokens + 12):
        engine.decode(request)
        row = engine.row(request)
        assert len(row) == cdiv(length, BLOCK_SIZE)
        assert row.count(0) == evicted // BLOCK_SIZE
        assert engine.num_held == 2 + cdiv(length - evicted, BLOCK_SIZE)


def test_an_order_is_taken_once() -> None:
    engine = Engine()
    request = engine.add()
    assert engine.step(request, 16)
    assert engine.orders() == {}
    assert engine.step(request, 10)
    assert list(engine.orders()) == [request.request_id]
    assert engine.orders() == {}


def test_a_request_that_ends_in_the_step_of_its_order() -> None:
    """Aborted, or preempted for one that is more urgent: the workers never hear of the order."""
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    assert engine.num_held == 7 + 2
    engine.free(request)
    assert engine.orders() == {}
    assert engine.num_held == 0
    assert engine.harness.manager.blocks_held == 0


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
    assert len(row) == 7
    assert engine.num_held == 7 + 2
    # The output of the compacting step arrived; only the first decode step is in flight.
    request.num_computed_tokens, request.num_in_flight_tokens = 27, 1
    request.append_output_token_ids(GENERATED)
    assert manager.allocate_slots(request, 1) is not None
    assert engine.row(request) == [0] * 6 + row[6:]
    assert engine.num_held == 2 + 1


def test_prompt_blocks_keep_their_hashes_and_nothing_later_is_hashed() -> None:
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    row = engine.row(request)
    (_, kept) = engine.orders()[request.request_id]
    assert engine.hashed(row) == [True] * 6 + [False]
    engine.decode(request, 20)
    assert engine.hashed(row[:7]) == [True] * 6 + [False]
    assert not any(engine.hashed(engine.row(request)[6:]))
    assert not any(engine.hashed(list(kept)))
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


@pytest.mark.parametrize(("after", "expected"), [(8, 20), (9, 20), (10, 24)])
def test_two_tokens_are_left_to_compute(after: int, expected: int) -> None:
    """A prefill of one, of 25 tokens behind a hit of 24, would be padded with room for drafts."""
    engine = Engine(max_observation_tokens=1)
    first, second = (engine.add(after=after) for _ in range(2))
    engine.prefill(first)
    assert engine.harness.prefix_hit(second)[1] == expected


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
    assert engine.harness.manager.decisions.max_hit_tokens(second) is None
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
    assert engine.harness.eviction_stats.skipped == Counter({skip.value: 1})
    assert engine.harness.eviction_stats.evicted == 0


def test_a_refusal_is_remembered_when_its_reason_is_gone() -> None:
    """The request grows beyond the sizes that save nothing, but the worker has decoded since."""
    engine = Engine(budget=0.5)
    request = engine.add(before=1, image=4, after=2)  # 7 tokens: N = 2, M = 1, one full page
    engine.prefill(request)
    assert engine.harness.manager.decisions.plan(request).skip is Skip.NO_SAVING
    engine.decode(request, 40)
    assert len(engine.row(request)) == cdiv(47, BLOCK_SIZE)
    assert engine.harness.manager.decisions.plan(request).skip is Skip.NO_SAVING
    assert engine.harness.eviction_stats.skipped == Counter({Skip.NO_SAVING.value: 1})


def test_a_preempted_request_starts_over_with_all_its_tokens() -> None:
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    engine.orders()
    engine.decode(request, 9)
    assert engine.row(request)[:6] == [0] * 6
    engine.free(request)
    assert engine.num_held == 0
    assert engine.row(request) == []
    assert request.num_tokens == 36  # 26 and 10 generated
    assert engine.harness.prefix_hit(request)[1] == 16
    engine.prefill(request)
    assert len(engine.row(request)) == 9
    assert 0 not in engine.row(request)
    assert engine.num_held == 9 + 3
    engine.decode(request)
    assert engine.row(request)[:9] == [0] * 9
    assert engine.num_held == 3 + 1
    engine.orders()
    assert engine.harness.eviction_stats.evicted == 2


def test_an_order_that_a_preemption_withdraws_is_not_counted() -> None:
    engine = Engine()
    request = engine.add()
    engine.prefill(request)
    engine.free(request)  # later in the same step
    assert engine.orders() == {}
    assert engine.harness.eviction_stats == EvictionStats()
    engine.prefill(request)
    assert len(engine.orders()) == 1
    stats = engine.harness.eviction_stats
    assert (stats.evicted, stats.evictions, stats.retained.count) == (1, {"prefill": 1}, 1)


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
    assert engine.orders() == {}
    assert engine.row(request) == before
    assert engine.num_held == 6
    assert engine.harness.eviction_stats.evicted == 0
    engine.free(other)
    assert engine.step(request, 10)
    assert len(engine.orders()) == 1
    assert engine.harness.eviction_stats.evicted == 1


def test_a_prompt_that_could_never_fit_with_its_kept_blocks_is_not_evicted() -> None:
    engine = Engine(num_blocks=1 + 8)
    request = engine.add()
    engine.prefill(request)
    assert len(engine.row(request)) == 7
    assert engine.harness.eviction_stats.skipped == Counter({Skip.POOL_TOO_SMALL.value: 1})


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
    assert engine.num_held == 7 + 2
    engine.decode(request, 5)
    assert engine.num_held == 2 + cdiv(31 - 24, BLOCK_SIZE)
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


def admit(engine: Engine, **parameters: int) -> list[Request]:
    """Prefill requests until one is not admitted; all get their first token."""
    admitted: list[Request] = []
    while True:
        request = engine.add(variant=1 + len(engine.harness.requests), **parameters)
        if not engine.step(request, request.num_tokens, full_sequence_must_fit=True):
            del engine.harness.requests[request.request_id]
            return admitted
        engine.decode(request)
        admitted.append(request)


def answers(engine: Engine, running: list[Request], num_tokens: int) -> bool:
    """Decode in turn; False if one finds no block."""
    return all(engine.step(request, 1) for _ in range(num_tokens) for request in running)


def finish(engine: Engine, request: Request, status: RequestStatus) -> None:
    request.status = status
    engine.free(request)
    del engine.harness.requests[request.request_id]


def test_admission_keeps_blocks_for_answers() -> None:
    """Each will hold its 2 kept blocks and 5 behind them: 5 times 7 of 40."""
    engine = Engine()
    running = admit(engine, max_tokens=18)
    assert len(running) == 5
    assert answers(engine, running, 16)


def test_without_the_reserve_what_fits_now_is_admitted() -> None:
    engine = Engine(output_reserve=False)
    running = admit(engine, max_tokens=18)
    assert len(running) == 11
    assert not answers(engine, running, 16)


def test_as_many_are_admitted_as_without_eviction() -> None:
    """However long their answers may become."""
    assert len(admit(Engine(), max_tokens=10**6)) == 5
    assert len(admit(Engine(budget=1.0), max_tokens=10**6)) == 5


def short_answers(engine: Engine, status: RequestStatus) -> None:
    """Eight of 4 tokens, where 20 are allowed."""
    for variant in range(100, 108):
        request = engine.add(variant=variant, max_tokens=20)
        engine.prefill(request)
        engine.decode(request, 3)
        finish(engine, request, status)


def test_short_answers_are_learnt_from() -> None:
    engine = Engine()
    short_answers(engine, RequestStatus.FINISHED_STOPPED)
    assert len(admit(engine, max_tokens=20)) == 10  # 4 blocks each: 2 kept, 2 + 4 tokens


def test_answers_that_a_client_cut_short_count() -> None:
    """With a stop string vLLM ends every answer so."""
    engine = Engine()
    short_answers(engine, RequestStatus.FINISHED_ABORTED)
    assert len(admit(engine, max_tokens=20)) == 10


def test_text_is_admitted_beside_answers_only_where_they_find_room() -> None:
    engine = Engine()
    running = admit(engine, max_tokens=18)[:-1]
    finish(engine, list(engine.harness.requests.values())[-1], RequestStatus.FINISHED_ABORTED)
    text = engine.add(image=0, before=12, after=36)  # 12 blocks, and 28 of the answers
    assert engine.step(text, 48, full_sequence_must_fit=True)
    assert answers(engine, running, 16)
    other = engine.add(image=0, before=12, after=37, variant=1)
    assert not engine.step(other, 49, full_sequence_must_fit=True)
