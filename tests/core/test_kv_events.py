# SPDX-License-Identifier: Apache-2.0
"""What a router learns from KV events (``--kv-events-config``), through vLLM's real scheduler."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

from tests.core.test_scheduler_machine import BLOCK_SIZE, SchedulerMachine, Wish, story, wish
from vl_cache_vllm.policy.vlcache import VLCachePolicy


class Router:
    """The index of one engine's prefix cache, as a router keeps it by hash."""

    def __init__(self, machine: SchedulerMachine) -> None:
        self.machine = machine
        self.known: set[Any] = set()
        self.ever_known: set[Any] = set()
        self.repeated = 0  # hashes that were announced while they were known
        machine.pool.enable_kv_cache_events = True
        machine.scheduler.kv_event_publisher.publish = self.publish

    def publish(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlockStored):
                self.repeated += len(self.known.intersection(event.block_hashes))
                assert event.parent_block_hash in {None, *self.ever_known}
                assert len(event.token_ids) == BLOCK_SIZE * len(event.block_hashes)
                self.known.update(event.block_hashes)
                self.ever_known.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.known.difference_update(event.block_hashes)
            else:
                assert isinstance(event, AllBlocksCleared)
                self.known.clear()

    def check(self) -> None:
        """The index is the prefix cache."""
        self.publish(KVEventBatch(ts=0.0, events=self.machine.pool.take_events()))
        cached = self.machine.pool.cached_block_hash_to_block._cache
        assert self.known == {maybe_convert_block_hash(get_block_hash(key)) for key in cached}


def serve(wishes: Sequence[Wish]) -> Router:
    """Each request to its end before the next one comes."""
    machine = story({}, VLCachePolicy())
    router = Router(machine)
    for one in wishes:
        machine.add_request(one, False)
        while machine.scheduler.requests:
            machine.advance()
            machine.check_everything()
            router.check()
    machine.teardown()
    return router


def test_what_is_cached_is_not_announced_again() -> None:
    """The observed part of a cached prompt is computed a second time, but it is no news."""
    once, twice = serve([wish()]), serve([wish(), wish()])
    assert twice.repeated == 0
    assert len(once.known) == 6  # of 26 tokens, in blocks of four
    assert twice.known == once.known


def test_only_the_new_part_of_a_prompt_is_announced() -> None:
    """The second question goes on where the first one ends, inside a block."""
    router = serve([wish(after=9), wish(after=18)])
    assert router.repeated == 0
    assert len(router.known) == (2 + 14 + 18) // BLOCK_SIZE


def test_one_copy_is_cached_and_a_hit_renews_it() -> None:
    machine = story({}, VLCachePolicy())
    for _ in range(2):
        machine.add_request(wish(), False)
        while machine.scheduler.requests:
            machine.advance()
    cached = machine.pool.cached_block_hash_to_block._cache
    assert len(cached) == 6
    assert not any(isinstance(blocks, dict) for blocks in cached.values())
    # They are the last of the free queue, the end of the prefix before its beginning.
    queue = [block.block_id for block in machine.pool.free_block_queue.get_all_free_blocks()]
    in_order = [block.block_id for block in cached.values()]
    assert sorted(queue[-6:]) == sorted(in_order)
    machine.teardown()


EVICTED = st.builds(
    lambda variant, name, after, max_tokens: wish(
        variant=variant, name=name, after=after, max_tokens=max_tokens
    ),
    variant=st.integers(0, 1),
    name=st.sampled_from(["cat", "dog"]),
    after=st.sampled_from([9, 10, 13, 18]),
    max_tokens=st.sampled_from([2, 9]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(EVICTED, min_size=2, max_size=8), st.integers(0, 12), st.booleans())
def test_a_router_never_errs(wishes: list[Wish], num_blocks: int, is_async: bool) -> None:
    """In pools so small that the prefix cache forgets, and requests beside each other."""
    setup = {"is_async": True, "steps_in_flight": 2} if is_async else {}
    machine = story(setup, VLCachePolicy(), num_blocks)
    router = Router(machine)
    for index, one in enumerate(wishes):
        machine.add_request(one, False)
        if index % 2:
            continue  # two at a time
        for _ in range(60):
            if not machine.scheduler.requests:
                break
            machine.advance()
            machine.check_everything()
            router.check()
    machine.teardown()
    assert router.repeated == 0
