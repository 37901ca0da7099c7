# SPDX-License-Identifier: Apache-2.0
"""`look_ahead` against a loop in Python, and bit for bit against torch."""

import math

import pytest
import torch

from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.ops.decay import MAX_FRAME, decay_frame
from vl_cache_vllm.ops.look_ahead import look_ahead

pytestmark = pytest.mark.usefixtures("implementation")

LENGTHS = pytest.mark.parametrize("length", [0.02, 0.5, 1.0, 3.0, 50.0, 1e6])


@pytest.mark.parametrize("tokens", [1, 2, 63, 200])
@LENGTHS
def test_equals_a_loop(tokens: int, length: float) -> None:
    torch.manual_seed(tokens)
    scores = torch.rand(2, 3, tokens) ** 4
    before = scores.clone()
    found = look_ahead(scores, length)
    assert found.dtype == torch.float32
    assert torch.equal(scores, before)
    for layer in range(2):
        for head in range(3):
            row = scores[layer, head].tolist()
            expected = [
                max(row[i] * math.exp((i - j) / length) for i in range(j + 1))
                for j in range(tokens)
            ]
            torch.testing.assert_close(found[layer, head], torch.tensor(expected))


@pytest.mark.parametrize("tokens", [511, 512, 513, 1700])
@pytest.mark.parametrize("length", [0.5, 1.0, 80.0, 1e6])
def test_equals_torch_bit_for_bit(tokens: int, length: float) -> None:
    scores = torch.rand(1, 2, tokens, generator=torch.Generator().manual_seed(tokens)) ** 8
    scores[0, 0] = (4 * scores[0, 0]).floor()  # equal ones, and zeros between them
    scores[0, 1] *= 1e-38
    with dispatch.use("torch"):
        expected = look_ahead(scores, length)
    assert torch.equal(look_ahead(scores, length), expected)


def test_scores_are_inherited_over_frames() -> None:
    scores = torch.zeros(1, 1, 3 * MAX_FRAME)
    scores[..., 5] = 1.0
    found = look_ahead(scores, 400.0)[0, 0]
    for position in (4, 5, MAX_FRAME - 1, MAX_FRAME, 3 * MAX_FRAME - 1):
        expected = math.exp((5 - position) / 400.0) if position >= 5 else 0.0
        assert float(found[position]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tokens", [1, 64])
def test_a_length_near_zero_changes_nothing(tokens: int) -> None:
    scores = torch.rand(2, 3, tokens)
    found = look_ahead(scores, 1e-320)
    assert torch.equal(found, scores)
    assert found.data_ptr() != scores.data_ptr()


def test_what_precedes_inherits_nothing() -> None:
    scores = torch.tensor([[[0.0, 0.0, 1.0, 0.0, 0.0]]])
    found = look_ahead(scores, 2.0)[0, 0].tolist()
    assert found == pytest.approx([0, 0, 1, math.exp(-0.5), math.exp(-1)])


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1.0, 3e38])
@LENGTHS
def test_a_score_is_never_changed_by_its_own_factors(value: float, length: float) -> None:
    """Float64 holds the largest and the smallest float32 times every factor of a frame."""
    scores = torch.full((1, 1, 600), value)
    assert torch.equal(look_ahead(scores, length), scores)


@LENGTHS
def test_frames_fit_float64(length: float) -> None:
    decay = decay_frame(length, torch.device("cpu"))
    assert decay.size & (decay.size - 1) == 0
    assert decay.growth.max() < 1.7e308 / 3.5e38
    assert decay.shrinkage.min() > 1e-300
