# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts, and its way to the front end."""

from collections import Counter
from dataclasses import asdict

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vl_cache_vllm.core.later_evictions import Trigger
from vl_cache_vllm.core.stats import EvictionStats, OrderedEviction, Samples
from vl_cache_vllm.messages import EvictionReport, put_stats, take_stats

REPORT = {
    "observation_seconds": 0.01,
    "compaction_seconds": 0.002,
    "layers_retained": {0: 0.1, 1: 0.3},
}


def some_stats() -> EvictionStats:
    stats = EvictionStats(blocks_held=5, pressure=True)
    stats.skipped.update(text_only=2, no_post_vision_tokens=1)
    stats.add_eviction(OrderedEviction(Trigger.PREFILL, True, 2, blocks=7, freed_tokens=16))
    stats.add_reports([REPORT])
    return stats


def test_evictions_are_counted() -> None:
    stats = some_stats()
    assert stats.evicted == 1
    assert stats.evictions == {"prefill": 1}
    assert stats.skipped == {"text_only": 2, "no_post_vision_tokens": 1}
    assert stats.retained == Samples(1, 2 / 7, [2 / 7])
    assert stats.freed_tokens == 16
    assert stats.freed_blocks == 0  # not yet: the step that compacts is not done
    assert stats.layers_retained == {0: 0.1, 1: 0.3}


def test_a_request_that_is_evicted_again_is_one_request() -> None:
    stats = some_stats()
    stats.add_eviction(OrderedEviction(Trigger.EVERY, False, 3, blocks=5, freed_tokens=8))
    stats.add_eviction(OrderedEviction(Trigger.PRESSURE, True, 1, blocks=4, freed_tokens=12))
    assert stats.evicted == 2
    assert stats.evictions == {"prefill": 1, "every": 1, "pressure": 1}
    assert stats.retained.values == [2 / 7, 3 / 5, 1 / 4]
    assert stats.freed_tokens == 36


def test_a_prompt_observed_for_nothing_counts_its_observation() -> None:
    stats = EvictionStats()
    stats.add_reports([asdict(EvictionReport(0.02))])
    assert stats == EvictionStats(observation_seconds=Samples(1, 0.02, [0.02]))


def test_a_sum_has_the_counts_of_both_and_the_state_of_the_later() -> None:
    later = EvictionStats(skipped=Counter(text_only=1), freed_blocks=7, blocks_held=3)
    later.add_eviction(OrderedEviction(Trigger.EVERY, False, 1, blocks=2, freed_tokens=4))
    later.add_reports([REPORT | {"layers_retained": {1: 0.5, 2: 0.25}}])
    total, before = some_stats(), some_stats()
    total += later
    assert total == EvictionStats(
        evicted=1,
        evictions=Counter(prefill=1, every=1),
        skipped=Counter(text_only=3, no_post_vision_tokens=1),
        freed_blocks=7,
        freed_tokens=20,
        retained=Samples(2, 2 / 7 + 1 / 2),
        observation_seconds=Samples(2, 0.02),
        compaction_seconds=Samples(2, 0.004),
        layers_retained={0: 0.1, 1: 0.8, 2: 0.25},
        blocks_held=3,
        pressure=None,
    )
    assert some_stats() == before


def test_totals_do_not_grow() -> None:
    """A front end whose log is never asked for must not collect measurements."""
    total = EvictionStats()
    for _ in range(1000):
        total += some_stats()
    assert total.retained.count == 1000 and not total.retained.values
    assert len(total.layers_retained) == 2


def test_stats_survive_the_way_between_processes() -> None:
    carrier = SchedulerStats(num_running_reqs=3)
    put_stats(carrier, some_stats().to_dict())
    outputs = EngineCoreOutputs(scheduler_stats=carrier)
    decoded = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs))
    assert decoded.scheduler_stats.num_running_reqs == 3
    values = take_stats(decoded.scheduler_stats)
    assert values is not None and EvictionStats.from_dict(values) == some_stats()
    assert decoded.scheduler_stats.kv_connector_stats is None
    assert take_stats(decoded.scheduler_stats) is None


def test_a_connectors_statistics_stay() -> None:
    carrier = SchedulerStats(kv_connector_stats={"connector": 1})
    put_stats(carrier, some_stats().to_dict())
    assert take_stats(carrier) is not None
    assert carrier.kv_connector_stats == {"connector": 1}


def test_another_carriers_data_stay() -> None:
    stats = SchedulerStats(kv_connector_stats={"connector": 1})
    assert take_stats(stats) is None
    assert stats.kv_connector_stats == {"connector": 1}
