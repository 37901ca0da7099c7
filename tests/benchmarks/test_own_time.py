# SPDX-License-Identifier: Apache-2.0
"""The clock measures this package's methods, and the patched methods are restored."""

import pytest

from benchmarks.gpu.agreement import synchronisation_forbidden
from benchmarks.own_time import SCHEDULER, VLLM, WORKER, Clock, overrides, own_time, wrapped
from vl_cache_vllm.attention.per_layer import PerLayerAttentionMixin
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.scheduler import EvictionScheduler, EvictionSchedulerMixin
from vl_cache_vllm.worker.evictor import Evictor


def test_methods_are_wrapped_and_restored() -> None:
    before = PerLayerAttentionMixin._layer_view, Evictor.layer_done, EvictionScheduler.schedule
    for context in (own_time, synchronisation_forbidden):
        with context():
            assert Evictor.layer_done is not before[1]
        after = PerLayerAttentionMixin._layer_view, Evictor.layer_done, EvictionScheduler.schedule
        assert after == before
    assert "remove_skipped_blocks" not in vars(EvictionScheduler)


def test_every_method_that_the_scheduler_calls_is_timed() -> None:
    found = dict(overrides(EvictionScheduler, EvictionSchedulerMixin))
    assert {"schedule", "update_from_output", "make_stats"} <= set(found)
    found = dict(overrides(EvictionBlockManager, EvictionBlockManager))
    assert {"allocate_new_blocks", "remove_skipped_blocks", "cache_blocks"} <= set(found)
    assert not set(found) & {"plan", "take_stats", "__init__"}  # called by methods that are timed


class FakeTime:
    """A clock that only the methods below advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


FAKE = FakeTime()


class Base:
    def step(self) -> None:
        FAKE.now += 20
        self.ask()

    def ask(self) -> None: ...


class Ours(Base):
    def step(self) -> None:
        FAKE.now += 10
        super().step()
        FAKE.now += 10

    def ask(self) -> None:
        FAKE.now += 5
        raise LookupError


def test_time_in_the_overridden_method_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.own_time.time", FAKE)
    clock = Clock()
    names = dict(overrides(Ours, Ours))
    assert names == {"step": Base, "ask": Base}
    with (
        wrapped([(Base, "step")], clock.of(VLLM)),
        wrapped([(Ours, name) for name in names], clock.of(SCHEDULER)),
        pytest.raises(LookupError),
    ):
        Ours().step()
    # The exception skips the last line of `Ours.step`.
    assert clock.seconds == {WORKER: 0, SCHEDULER: 15, VLLM: 20}
    assert clock.own == clock.seconds[SCHEDULER]
    clock.reset()
    assert clock.own == 0
