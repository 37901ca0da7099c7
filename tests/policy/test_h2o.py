# SPDX-License-Identifier: Apache-2.0
"""H2O observes every query and keeps half heavy hitters, half recent tokens."""

import torch

from vl_cache_vllm.ops.select import select
from vl_cache_vllm.policy import POLICIES, Attention, Prompt
from vl_cache_vllm.policy.h2o import H2OPolicy


def test_all_queries_observe() -> None:
    policy = H2OPolicy()
    assert POLICIES["h2o"] is H2OPolicy
    assert policy.observation_start(500, 1000) == 0
    assert H2OPolicy(max_observation_tokens=64).observation_start(500, 1000) == 936


def test_half_heavy_hitters_half_recent() -> None:
    policy = H2OPolicy()
    attention = torch.tensor([[[0.0, 9.0, 1.0, 8.0, 2.0, 0.0, 0.0, 0.0]]])
    positions = select(
        policy.token_scores(Attention(attention), Prompt(8)),
        torch.tensor([8]),
        torch.tensor([4]),
        policy.recent_ratio,
        4,
    )
    assert positions.tolist() == [[[1, 3, 6, 7]]]


def test_uniform_budgets() -> None:
    assert H2OPolicy().layer_weights(torch.rand(3).double(), 0.1, Prompt(100)).tolist() == [1.0] * 3
