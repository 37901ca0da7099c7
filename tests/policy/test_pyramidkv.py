# SPDX-License-Identifier: Apache-2.0
"""PyramidKV's layer budgets: B = C - w, min = B / 20, max = 2 B - min.

Source: docs/method.md, "Other policies".
"""

import pytest
import torch

from vl_cache_vllm.policy import POLICIES, Attention, Prompt, Shard
from vl_cache_vllm.policy.pyramidkv import PyramidKVPolicy
from vl_cache_vllm.policy.snapkv import SnapKVPolicy


def weights(policy: PyramidKVPolicy, layers: int, budget: float, tokens: int) -> list[float]:
    return policy.layer_weights(torch.rand(layers).double(), budget, Prompt(tokens)).tolist()


def test_worked_example() -> None:
    # C = 0.1 * 1520 = 152 tokens, B = 120, min 6, max 234, each with the window of 32.
    found = weights(PyramidKVPolicy(), 4, 0.1, 1520)
    assert found == pytest.approx([266.0, 190.0, 114.0, 38.0])


@pytest.mark.parametrize("layers", [2, 3, 32])
@pytest.mark.parametrize("beta", [1.0, 3.5, 20.0])
@pytest.mark.parametrize(("budget", "tokens"), [(0.1, 1000), (0.4, 333), (1.0, 64)])
def test_budgets_fall_linearly_and_add_up(
    layers: int, beta: float, budget: float, tokens: int
) -> None:
    found = weights(PyramidKVPolicy(beta=beta), layers, budget, tokens)
    rest = budget * tokens - 32
    assert found[-1] == pytest.approx(32 + rest / beta)
    assert found[0] == pytest.approx(32 + 2 * rest - rest / beta)
    assert sum(found) == pytest.approx(layers * budget * tokens)
    steps = torch.tensor(found).diff()
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-3, rtol=1e-4)


def test_nothing_beyond_the_window_is_divided_equally() -> None:
    assert weights(PyramidKVPolicy(), 3, 0.1, 320) == [32.0, 32.0, 32.0]
    assert weights(PyramidKVPolicy(), 3, 0.01, 320) == [32.0, 32.0, 32.0]


def test_scores_are_snapkv() -> None:
    assert POLICIES["pyramidkv"] is PyramidKVPolicy
    attention, prompt = torch.rand(2, 3, 99), Prompt(99)
    assert torch.equal(
        PyramidKVPolicy().token_scores(Attention(attention), prompt),
        SnapKVPolicy().token_scores(Attention(attention), prompt),
    )


def test_bad_beta() -> None:
    with pytest.raises(ValueError, match=r"beta must be at least 1, got 0\.5"):
        PyramidKVPolicy(beta=0.5)


def test_a_pipeline_stage_has_its_part_of_the_slope() -> None:
    density = torch.ones(8, dtype=torch.float64)
    whole = PyramidKVPolicy().layer_weights(density, 0.5, Prompt(500))
    for layers in ((0, 1, 2, 3), (4, 5, 6, 7), (1, 4, 7)):  # the last: of a hybrid model
        prompt = Prompt(500, shard=Shard(layers, 0, 8))
        part = PyramidKVPolicy().layer_weights(density[: len(layers)], 0.5, prompt)
        torch.testing.assert_close(part, whole[list(layers)])
