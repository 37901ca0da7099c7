# SPDX-License-Identifier: Apache-2.0
"""Smoothing and lookahead against naive loops."""

import math

import pytest
import torch

from vl_cache_vllm.policy.pooling import average, look_ahead

TOKENS = pytest.mark.parametrize("tokens", [1, 2, 63, 64, 200])


@TOKENS
@pytest.mark.parametrize("length", [0.5, 3.0, 50.0, 1e6])
def test_look_ahead(tokens: int, length: float) -> None:
    torch.manual_seed(tokens)
    scores = torch.rand(2, 3, tokens) ** 4
    before = scores.clone()
    found = look_ahead(scores, length)
    assert torch.equal(scores, before)
    for layer in range(2):
        for head in range(3):
            row = scores[layer, head].tolist()
            expected = [
                max(row[i] * math.exp((i - j) / length) for i in range(j + 1))
                for j in range(tokens)
            ]
            torch.testing.assert_close(found[layer, head], torch.tensor(expected))


@TOKENS
def test_no_smoothing_changes_nothing(tokens: int) -> None:
    scores = torch.rand(2, 3, tokens)
    assert torch.equal(look_ahead(scores, 1e-320), scores)
    assert average(scores, 1) is scores


def test_what_precedes_inherits_nothing() -> None:
    scores = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    found = look_ahead(scores, 2.0)[0, 0].tolist()
    assert found == pytest.approx([0, 0, 1, math.exp(-0.5), math.exp(-1)])
