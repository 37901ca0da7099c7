# SPDX-License-Identifier: Apache-2.0
"""What is expected of running answers."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_cache_vllm.core.later_evictions import AnswerBound
from vl_cache_vllm.core.output_reserve import (
    EvictedOutput,
    OutputLengths,
    OutputReserve,
    peak_blocks,
)

ENOUGH = OutputLengths.ENOUGH


def ended(*lengths: int, max_tokens: int = 100, times: int = ENOUGH) -> OutputLengths:
    answers = OutputLengths()
    for length in lengths * times:
        answers.add(length, max_tokens)
    return answers


@pytest.mark.parametrize(
    ("answers", "generated", "max_tokens", "expected"),
    [
        pytest.param(ended(), 0, 100, 100, id="no-history"),
        pytest.param(ended(10, times=ENOUGH - 1), 0, 100, 100, id="too-little-history"),
        pytest.param(ended(10, 20, 31), 0, 100, 21, id="mean-rounded-up"),
        pytest.param(ended(10, 20, 30), 10, 100, 25, id="of-the-longer-ones"),
        pytest.param(ended(10, 20, 30), 30, 100, 100, id="longer-than-all"),
        pytest.param(ended(10, 10, 90), 11, 100, 90, id="short-and-long"),
        pytest.param(ended(10, 20, 30), 0, 1000, 200, id="a-share-of-max-tokens"),
        pytest.param(ended(16, max_tokens=16), 0, 512, 512, id="who-says-how-much-is-believed"),
    ],
)
def test_expected(answers: OutputLengths, generated: int, max_tokens: int, expected: int) -> None:
    assert answers.expected(generated, max_tokens) == expected


def test_only_the_latest_count() -> None:
    answers = ended(90)
    for _ in range(OutputLengths.LATEST):
        answers.add(15, 100)
    assert answers.expected(0, 100) == 15


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(50, 60)), max_size=400), st.integers(0, 50)
)
def test_expected_is_that_of_the_latest(values: list[tuple[int, int]], generated: int) -> None:
    answers = OutputLengths()
    for length, max_tokens in values:
        answers.add(length, max_tokens)
    shares = [Fraction(*value) for value in values[-256:]]
    longer = [share for share in shares if share > Fraction(generated, 70)]
    expected = math.ceil(70 * sum(longer) / len(longer)) if len(longer) >= ENOUGH else 70
    assert answers.expected(generated, 70) == expected


NUMBER = st.integers(0, 20)
ANSWERS = st.lists(st.tuples(NUMBER, NUMBER, NUMBER), max_size=12)


@settings(deadline=None)
@given(ANSWERS)
def test_peak_is_that_of_the_answers_played_out(answers: list[tuple[int, int, int]]) -> None:
    """Step by step: whoever has all its blocks ends after the moment in which it got the last."""
    most = 0
    for moment in range(21):
        sizes = (
            min(holds + moment, max(holds, limit))
            for holds, growth, limit in answers
            if growth >= moment
        )
        most = max(most, sum(sizes))
    assert peak_blocks(answers) == most


def expected_output(
    num_tokens: int, generated: int, bound: AnswerBound | None
) -> tuple[int, int, int]:
    """Of a request with blocks of 4 whose first 24 tokens were evicted to 2 of 7 blocks."""
    request: Any = SimpleNamespace(
        num_tokens=num_tokens, num_output_tokens=generated, max_tokens=40
    )
    return OutputReserve(4)._expected_output(request, EvictedOutput(24, 2, 7, bound))


@pytest.mark.parametrize(
    ("num_tokens", "generated", "bound", "expected"),
    [
        pytest.param(26, 0, None, (2 + 1, 10, 7), id="prompt-and-answer"),
        pytest.param(36, 10, None, (2 + 3, 8, 7), id="halfway"),
        pytest.param(66, 40, None, (2 + 11, 0, 7), id="at-its-end"),
        # At most growth and one block, and the kept ones of the coming eviction.
        pytest.param(26, 0, AnswerBound(28, 2, 3), (2 + 1, 2 + 1 + 3 - 1, 7), id="bounded"),
        pytest.param(26, 0, AnswerBound(28, 20, 3), (2 + 1, 10, 7), id="ends-before-its-bound"),
    ],
)
def test_growth_of_an_evicted_request(
    num_tokens: int, generated: int, bound: AnswerBound | None, expected: tuple[int, int, int]
) -> None:
    assert expected_output(num_tokens, generated, bound) == expected
