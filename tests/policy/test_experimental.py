# SPDX-License-Identifier: Apache-2.0
"""Research options: what is accepted, and with which policies."""

from typing import Any

import pytest

from vl_cache_vllm.policy.experimental import ExperimentalOptions
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.policy.vlcache_plus import VLCachePlusPolicy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"diversity": 1.1}, r"diversity must be in \[0, 1\], got 1.1", id="diversity"),
        pytest.param({"diversity": float("nan")}, "diversity must be in", id="diversity-nan"),
        pytest.param({"elite_window": -0.1}, r"elite_window must be in \[0, 1\]", id="elite"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExperimentalOptions(**options)


def test_elite_queries_need_a_bounded_window_of_several() -> None:
    elite = ExperimentalOptions(elite_window=0.9)
    for bad in (None, 1, 513):
        message = f"elite_window needs max_observation_tokens from 2 to 512, got {bad}"
        with pytest.raises(ValueError, match=message):
            elite.check(VLCachePolicy(max_observation_tokens=bad))
        ExperimentalOptions().check(VLCachePolicy(max_observation_tokens=bad))
    for good in (2, 512):
        elite.check(VLCachePolicy(max_observation_tokens=good))


def test_elite_queries_need_the_sum_over_all_observed_queries() -> None:
    message = "elite_window does not work with vlcache-plus"
    with pytest.raises(ValueError, match=message):
        ExperimentalOptions(elite_window=0.9).check(VLCachePlusPolicy())
    ExperimentalOptions(diversity=0.5).check(VLCachePlusPolicy())


def test_elite_queries_need_an_eviction_at_the_end_of_the_prefill() -> None:
    elite = ExperimentalOptions(elite_window=0.9)
    with pytest.raises(ValueError, match="elite_window needs evict_after 0, got 3"):
        elite.check(VLCachePolicy(max_observation_tokens=16, evict_after=3))
