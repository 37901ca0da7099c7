# SPDX-License-Identifier: Apache-2.0
"""What workers observe at once is bounded, and nobody who is not observed is evicted."""

from types import SimpleNamespace
from typing import Any

from vllm.v1.request import Request, RequestStatus

from tests.core.test_block_manager import Engine
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import Skip
from vl_cache_vllm.core.observation_budget import (
    ObservationBudget,
    observation_budget_tokens,
)
from vl_cache_vllm.messages import put_admitted, take_admitted

PROMPT = 26  # tokens of `Engine.add`; the observed ones are the last ten


def bounded(tokens: int, **settings: Any) -> Engine:
    engine = Engine(**settings)
    engine.harness.manager.bind(engine.harness.requests.get, (), tokens)
    return engine


def start(engine: Engine, num_tokens: int = PROMPT, **parameters: int) -> Request | None:
    """A waiting request's first step, if it is scheduled."""
    request = engine.add(**parameters)
    assert request.status == RequestStatus.WAITING
    if not engine.step(request, num_tokens):
        return None
    request.status = RequestStatus.RUNNING
    return request


def test_others_wait_until_the_first_is_evicted() -> None:
    engine = bounded(PROMPT)
    first = start(engine)
    assert first is not None
    assert engine.harness.manager.decisions.observation_budget.take_new() == [first.request_id]
    second = engine.add(variant=1)
    for _ in range(2):
        assert not engine.step(second, PROMPT)
        assert not engine.step(second, PROMPT, full_sequence_must_fit=True)
    assert engine.row(second) == []
    engine.decode(first)  # its eviction is processed
    assert engine.step(second, PROMPT)
    assert len(engine.orders()) == 2
    assert engine.harness.eviction_stats.evicted == 2
    assert engine.harness.manager.decisions.observation_budget.take_new() == [second.request_id]


def test_as_many_as_find_room_are_observed_at_once() -> None:
    engine = bounded(2 * PROMPT + 5, num_blocks=81)
    started = [start(engine, variant=variant) for variant in range(3)]
    assert [request is not None for request in started] == [True, True, False]


def test_chunks_before_the_first_observed_query_need_no_room() -> None:
    engine = bounded(PROMPT)
    assert start(engine) is not None
    early = start(engine, 16, variant=1)
    assert early is not None
    assert early.request_id not in engine.harness.manager.decisions.observation_budget


def test_one_that_runs_is_not_evicted_rather_than_kept_waiting() -> None:
    engine = bounded(PROMPT)
    late = start(engine, 16)
    other = start(engine, variant=1)
    assert late is not None and other is not None
    assert engine.step(late, 10)
    assert len(engine.row(late)) == 7  # no kept blocks
    manager = engine.harness.manager
    assert engine.harness.eviction_stats.skipped == {Skip.NO_OBSERVATION_ROOM.value: 1}
    assert manager.decisions.observation_budget.take_new() == [other.request_id]
    engine.decode(late, 3)
    assert engine.row(late)[0] != 0
    engine.free(late)
    assert not manager.decisions._unobserved


def test_who_is_not_evicted_needs_no_room() -> None:
    engine = bounded(PROMPT)
    assert start(engine) is not None
    text = start(engine, before=PROMPT, image=0, after=0, variant=1)
    assert text is not None
    brief = start(engine, max_tokens=1, variant=2)
    assert brief is not None


def test_a_request_that_ends_makes_room() -> None:
    engine = bounded(PROMPT)
    first = start(engine)
    assert first is not None
    engine.free(first)  # aborted, or preempted
    assert engine.harness.manager.decisions.observation_budget.take_new() == []
    assert start(engine, variant=1) is not None


def test_a_prompt_that_alone_exceeds_the_room_is_not_evicted() -> None:
    engine = bounded(PROMPT - 1)
    assert start(engine) is not None
    assert engine.harness.eviction_stats.skipped == {Skip.NO_OBSERVATION_ROOM.value: 1}


def test_without_a_bound_nobody_is_told() -> None:
    engine = Engine()
    engine.prefill(engine.add())
    assert engine.harness.manager.decisions.observation_budget.take_new() == []
    output: Any = SimpleNamespace()
    assert take_admitted(output) is None
    put_admitted(output, ["a"])
    assert take_admitted(output) == ["a"]


def test_rooms() -> None:
    room = ObservationBudget(10)
    room.admit("a", 7)
    assert "a" in room and not room.is_empty
    assert room.has_room(3) and not room.has_room(4)
    room.release("a")
    room.release("a")
    assert room.is_empty and room.has_room(10) and not room.has_room(11)
    assert ObservationBudget().has_room(1 << 40)


def test_room_of_an_engine() -> None:
    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device_type="cuda"),
        model_config=SimpleNamespace(max_model_len=4096),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
    )

    def layers_of(policy: str) -> Any:
        settings = KVCompressConfig.from_dict({"policy": policy})
        return [SimpleNamespace(num_kv_heads=8, kv_compress=settings)] * 32

    layers = layers_of("vlcache")
    assert observation_budget_tokens(config, layers) == 262144
    assert observation_budget_tokens(config, layers_of("vlcache-plus")) == 131072  # with maxima
    config.scheduler_config.max_num_batched_tokens = 1 << 20
    assert observation_budget_tokens(config, layers) == 4096 + (1 << 20)
    config.device_config.device_type = "cpu"
    assert observation_budget_tokens(config, layers) is None
