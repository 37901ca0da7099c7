# SPDX-License-Identifier: Apache-2.0
"""When blocks count as scarce."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec

from vl_cache_vllm.core.pressure import PressureGauge, max_blocks


@pytest.mark.parametrize(
    ("used", "demands", "expected"),
    [
        pytest.param(0, [], False, id="idle"),
        pytest.param(89, [], False, id="just-below"),
        pytest.param(90, [], True, id="held-blocks-reach-it"),
        pytest.param(50, [20, 19], False, id="waiting-ones-fit"),
        pytest.param(50, [20, 20], True, id="waiting-ones-do-not-fit"),
        pytest.param(0, [500], True, id="one-that-is-larger-than-the-pool"),
    ],
)
def test_pressure_begins_at_high(used: int, demands: list[int], expected: bool) -> None:
    gauge = PressureGauge(0.9, 0.7)
    gauge.update(used, demands, 100)
    assert gauge.is_on == expected


def test_hysteresis() -> None:
    gauge = PressureGauge(0.9, 0.7)
    seen = []
    for used in (80, 95, 80, 71, 70, 80, 89, 90):
        gauge.update(used, [], 100)
        seen.append(gauge.is_on)
    assert seen == [False, True, True, True, False, False, False, True]


def test_equal_thresholds() -> None:
    gauge = PressureGauge(0.5, 0.5)
    seen = []
    for used in (49, 50, 51, 50):
        gauge.update(used, [], 100)
        seen.append(gauge.is_on)
    assert seen == [False, True, True, False]


@given(
    st.lists(st.tuples(st.integers(0, 100), st.lists(st.integers(0, 60), max_size=9)), max_size=9),
    st.sampled_from([(75, 25), (50, 50), (100, 0)]),
)
def test_reading_part_of_the_demands_changes_nothing(
    steps: list[tuple[int, list[int]]], thresholds: tuple[int, int]
) -> None:
    high, low = thresholds
    gauge, is_on = PressureGauge(high / 100, low / 100), False
    for used, demands in steps:
        load = used + sum(demands)
        is_on = load > low if is_on else load >= high
        gauge.update(used, demands, 100)
        assert gauge.is_on == is_on


def test_a_long_queue_is_not_read_to_its_end() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    gauge = PressureGauge(0.9, 0.7)
    for _ in range(2):
        gauge.update(0, endless(), 100)
        assert gauge.is_on


@pytest.mark.parametrize(
    ("mode", "block_size", "drafts", "expected"),
    [
        pytest.param("none", 4096, 0, (1, 1), id="one-state"),
        pytest.param("none", 4096, 3, (4, 4), id="one-state-and-those-of-drafts"),
        pytest.param("align", 64, 0, (2, 3), id="states-of-two-steps"),
        pytest.param("align", 64, 3, (5, 6), id="these-and-those-of-drafts"),
    ],
)
def test_states_of_linear_attention(
    mode: str, block_size: int, drafts: int, expected: tuple[int, int]
) -> None:
    """A request holds a few states, however long it is."""
    spec = MambaSpec(
        block_size=block_size,
        shapes=((3, 8),),
        dtypes=(torch.float32,),
        mamba_cache_mode=mode,
        num_speculative_blocks=drafts,
    )
    pool = BlockPool(num_gpu_blocks=10, enable_caching=True, hash_block_size=block_size)
    manager = MambaManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=64
    )
    for for_a_moment, most in zip((False, True), expected, strict=True):
        assert max_blocks(manager, 4000, for_a_moment) == most
        assert max_blocks(manager, 1, for_a_moment) <= most
