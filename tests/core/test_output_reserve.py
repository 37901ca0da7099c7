# SPDX-License-Identifier: Apache-2.0
"""What is expected of running answers."""

import math
from collections import Counter
from collections.abc import Container, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.core.later_evictions import AnswerBound
from vl_cache_vllm.core.output_reserve import (
    EvictedOutput,
    Growth,
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


NUMBER = st.integers(0, 40)
GROWTHS = st.builds(Growth, NUMBER, NUMBER, NUMBER, NUMBER, st.just(0))
BOUNDED = st.builds(Growth, NUMBER, NUMBER, NUMBER, NUMBER, st.sampled_from([0, 8, 12]))


def blocks_of(output: Growth) -> Iterator[int]:
    """After each token that is still to come, from now on."""
    tokens, most = output.tokens, 0
    while output.period and tokens > output.period:
        tokens -= output.period
    for coming in range(output.coming + 1):
        size = output.kept_blocks + cdiv(tokens, 4)
        if coming == 0:
            most = max(size, output.most_blocks)
        yield min(size, most)
        if output.period and tokens == output.period:
            tokens = 0
        tokens += 1


def peak_of(outputs: list[Growth], moments: Container[int]) -> int:
    """Token by token: an output ends after the moment in which it got the last."""
    sizes: Counter[int] = Counter()
    for output in outputs:
        sizes.update(dict(enumerate(blocks_of(output))))
    return max((size for moment, size in sizes.items() if moment in moments), default=0)


@settings(deadline=None)
@given(st.lists(GROWTHS, max_size=12))
def test_peak_is_that_of_the_answers_played_out(outputs: list[Growth]) -> None:
    assert peak_blocks(outputs, 4) == peak_of(outputs, range(41))


@settings(deadline=None)
@given(st.lists(BOUNDED, max_size=12))
def test_outputs_that_are_evicted_again_shrink(outputs: list[Growth]) -> None:
    """At their ends and at the next two evictions of each; a peak in between is not missed."""
    moments = {output.coming for output in outputs}
    for output in outputs:
        if output.period:
            until = -output.tokens % output.period
            moments |= {until, until + output.period}
    assert peak_blocks(outputs, 4) == peak_of(outputs, moments)
    if len({output.period for output in outputs} - {0}) == 1:  # all later ones are like these
        near = range(min(moments, default=0) + 12)
        assert peak_blocks(outputs, 4) >= peak_of(outputs, near)


def expected_output(num_tokens: int, generated: int, bound: AnswerBound | None) -> Growth:
    """Of a request with blocks of 4 whose first 24 tokens were evicted to 2 of 7 blocks."""
    request: Any = SimpleNamespace(
        num_tokens=num_tokens, num_output_tokens=generated, max_tokens=40
    )
    return OutputReserve(4)._expected_output(request, EvictedOutput(24, 2, 7, bound))


@pytest.mark.parametrize(
    ("num_tokens", "generated", "bound", "expected"),
    [
        pytest.param(26, 0, None, Growth(2, 2, 40, 7), id="prompt-and-answer"),
        pytest.param(36, 10, None, Growth(2, 12, 30, 7), id="halfway"),
        pytest.param(66, 40, None, Growth(2, 42, 0, 7), id="at-its-end"),
        # Later evictions keep three blocks.
        pytest.param(26, 0, AnswerBound(28, 2, 3), Growth(3, 2, 40, 7, 8), id="bounded"),
    ],
)
def test_growth_of_an_evicted_request(
    num_tokens: int, generated: int, bound: AnswerBound | None, expected: Growth
) -> None:
    assert expected_output(num_tokens, generated, bound) == expected


def test_one_request_at_a_time_is_evicted_again() -> None:
    """Beside what all hold, there is room for what the next one keeps."""
    bound = AnswerBound(28, 2, 3)
    request: Any = SimpleNamespace(num_tokens=26, num_output_tokens=0, max_tokens=40, priority=0)
    holders = [(request, EvictedOutput(24, 2, 7, bound), 5) for _ in range(4)]
    assert OutputReserve(4).free_blocks_for(request, holders, lambda _: 0, used=4 * 5) == 3
