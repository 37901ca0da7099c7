# SPDX-License-Identifier: Apache-2.0
"""The V1 adapter's bookkeeping of requests, over a stand-in for the runner."""

from collections.abc import Container, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import Request

from tests.helpers.blocks import image_prompt, make_request
from tests.helpers.fakes import FakeV1Runner, RecordingWorker
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.step import BatchRow, StepPlan
from vl_cache_vllm.worker.v1 import V1Adapter

BLOCK_SIZE = 4


class Worker:
    """A runner with the adapter; steps are (request, computed, scheduled, block ids)."""

    def __init__(self, **policy: Any) -> None:
        config = KVCompressConfig(policy=VLCachePolicy(**policy), budget=0.25)
        self.recording = RecordingWorker(config, BLOCK_SIZE)
        self.runner = FakeV1Runner()
        self.adapter = V1Adapter(self.runner, self.recording, EvictedGroup(0, {}))  # type: ignore[arg-type]

    def step(
        self,
        *rows: tuple[Request, int, int, list[int]],
        resumed: Container[str] = (),
        orders: Mapping[str, int] | None = None,
    ) -> tuple[list[BatchRow], StepPlan]:
        """A step in which ``orders`` evict: E by request id, to two blocks each."""
        self.recording.orders = {
            name: EvictionOrder(evicted, (90, 91)) for name, evicted in (orders or {}).items()
        }
        self.runner.schedule(
            [(request, computed, ids) for request, computed, _, ids in rows], resumed
        )
        self.adapter.build_attention_metadata(
            num_scheduled_tokens={request.request_id: n for request, _, n, _ in rows}
        )
        assert self.recording.planned is not None
        return self.recording.planned


def request(name: str = "a", before: int = 2, image: int = 14, after: int = 10) -> Request:
    """By default 26 tokens, the image in 2..15."""
    return make_request(
        name,
        image_prompt(before, image, after),
        [(before, image, "image-0")],
        block_size=BLOCK_SIZE,
    )


def blocks(count: int, first: int = 1) -> list[int]:
    return list(range(first, first + count))


def test_a_dummy_run_is_left_alone() -> None:
    worker = Worker()
    worker.adapter.build_attention_metadata(num_tokens=3)
    worker.adapter.build_attention_metadata(num_scheduled_tokens=None)
    assert worker.recording.planned is None


def test_rows_carry_the_batch_in_its_order() -> None:
    worker = Worker()
    a, b = request("a"), request("b", before=1)
    rows, _ = worker.step((a, 0, 20, blocks(5)), (b, 0, 7, blocks(2, first=9)))
    assert [row.state.request_id for row in rows] == ["a", "b"]
    assert [(row.num_computed, row.num_scheduled) for row in rows] == [(0, 20), (0, 7)]
    assert [row.state.vision_end for row in rows] == [16, 15]
    assert [row.state.prefill_tokens for row in rows] == [26, 25]
    first_states = [row.state for row in rows]
    # V1 moves requests between rows.
    rows, _ = worker.step((b, 7, 9, blocks(4, first=9)), (a, 20, 1, blocks(6)))
    assert [row.state for row in rows] == first_states[::-1]


def test_a_finished_request_is_forgotten_and_its_id_may_come_again() -> None:
    worker = Worker()
    a = request()
    (row,), plan = worker.step((a, 0, 26, blocks(7)), orders={"a": 24})
    assert plan.pending_evictions
    old = row.state
    worker.runner.requests.clear()
    b = request("b")
    worker.step((b, 0, 20, blocks(5)))
    worker.step((b, 20, 6, blocks(7)), orders={"b": 24})
    assert worker.recording.requests.get("a") is None
    worker.runner.requests.clear()
    (row,), plan = worker.step((request("a"), 0, 26, blocks(7)), orders={"a": 24})
    assert row.state is not old
    assert plan.pending_evictions


def test_a_request_keeps_its_state_from_one_eviction_to_the_next() -> None:
    worker = Worker()
    a = request()
    (row,), plan = worker.step((a, 0, 26, blocks(7)), orders={"a": 24})
    ((first, before),) = ((e.order, e.evicted_before) for e in plan.pending_evictions)
    assert (first.evicted_tokens, before) == (24, 0)
    state = row.state
    for computed in range(26, 32):
        a.append_output_token_ids(7)
        (row,), plan = worker.step((a, computed, 1, blocks(1 + computed // BLOCK_SIZE)))
        assert row.state is state and not plan.pending_evictions
    a.append_output_token_ids(7)
    (row,), plan = worker.step((a, 32, 1, blocks(9)), orders={"a": 32})
    (eviction,) = plan.pending_evictions
    assert row.state is state
    assert (eviction.evicted_before, eviction.kept_before, eviction.tokens) == (24, 2, 33)
    assert (state.evicted_tokens, state.kept_blocks, state.num_evictions) == (32, 2, 2)


def test_an_id_that_comes_again_at_once() -> None:
    """Aborted and resubmitted between two steps, with a longer prefix hit than was computed."""
    worker = Worker()
    (row,), _ = worker.step((request(), 0, 8, blocks(2)))
    old = row.state
    worker.runner.requests.clear()
    (row,), _ = worker.step((request(), 16, 4, blocks(5)))
    assert row.state is not old


@pytest.mark.parametrize("hit", [0, 16], ids=["no-hit", "prefix-hit"])
def test_a_request_that_starts_over(hit: int) -> None:
    worker = Worker()
    a = request()
    worker.step((a, 0, 26, blocks(7)), orders={"a": 24})
    a.append_output_token_ids(7)
    worker.step((a, 26, 1, blocks(7)))
    a.append_output_token_ids(7)
    (row,), plan = worker.step(
        (a, hit, 28 - hit, blocks(7, first=20)), resumed={"a"}, orders={"a": 28}
    )
    assert row.state.prefill_tokens == 28
    (eviction,) = plan.pending_evictions
    assert (eviction.tokens, eviction.evicted_before, eviction.tail) == (28, 0, 0)
    assert eviction.num_queries == 28 - 16


def test_restart_where_it_left_off_after_a_refusal() -> None:
    """The image ends the prompt and a block: not evicted, every block cached. Preempted right
    after its prefill, it comes back with one post-vision token and a hit of the whole prompt."""
    worker = Worker()
    a = request(before=6, image=14, after=0)
    _, plan = worker.step((a, 0, 20, blocks(5)))
    assert not plan.pending_evictions
    a.append_output_token_ids(7)
    (row,), plan = worker.step((a, 20, 1, [*blocks(5), 30]), resumed={"a"}, orders={"a": 20})
    assert [eviction.tokens for eviction in plan.pending_evictions] == [21]
    assert row.state.prefill_tokens == 21
    assert plan.observations


def test_restart_where_it_left_off_after_an_eviction() -> None:
    """Only the last query is observed, so that the hit may cover the whole old prompt."""
    worker = Worker(max_observation_tokens=1)
    a = request(after=12)
    _, plan = worker.step((a, 0, 28, blocks(7)), orders={"a": 28})
    assert plan.pending_evictions
    a.append_output_token_ids(7)
    (row,), plan = worker.step((a, 28, 1, [*blocks(7), 30]), resumed={"a"}, orders={"a": 28})
    # Otherwise it is an eviction of a request that decodes, the second of its state.
    ((tokens, before),) = ((e.tokens, e.evicted_before) for e in plan.pending_evictions)
    assert (tokens, before) == (29, 0)
    assert row.state.prefill_tokens == 29


def test_tokens_that_an_early_stage_has_not_heard_of() -> None:
    """What was sampled while the request was preempted reaches the scheduler alone."""
    worker = Worker()
    a = request()
    worker.step((a, 0, 26, blocks(7)), orders={"a": 24})
    worker.recording.cached_requests = SimpleNamespace(req_ids=["a"], num_output_tokens=[2])
    (row,), plan = worker.step((a, 0, 28, blocks(7, first=20)), resumed={"a"}, orders={"a": 28})
    assert row.state.prefill_tokens == 28
    assert [eviction.tokens for eviction in plan.pending_evictions] == [28]
