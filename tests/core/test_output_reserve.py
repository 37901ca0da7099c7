# SPDX-License-Identifier: Apache-2.0
"""What is expected of running answers."""

import math
from collections import Counter
from collections.abc import Container, Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.core.later_evictions import AnswerBound
from vl_cache_vllm.core.output_reserve import (
    EvictedOutput,
    EvictedOutputs,
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
    assert expected_of(answers, generated, max_tokens) == expected


def expected_of(answers: OutputLengths, generated: int, max_tokens: int) -> int:
    (found,) = answers.expected(np.array([generated]), np.array([max_tokens])).tolist()
    return found


def test_only_the_latest_count() -> None:
    answers = ended(90)
    for _ in range(OutputLengths.LATEST):
        answers.add(15, 100)
    assert expected_of(answers, 0, 100) == 15


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
    assert expected_of(answers, generated, 70) == expected


class Output(NamedTuple):
    """One of the outputs of `Growth`."""

    kept_blocks: int
    tokens: int
    coming: int
    most_blocks: int
    period: int = 0


def growth(outputs: list[Output]) -> Growth:
    return Growth(*np.array(outputs).T)


NUMBER = st.integers(0, 40)
GROWTHS = st.builds(Output, NUMBER, NUMBER, NUMBER, NUMBER, st.just(0))
BOUNDED = st.builds(Output, NUMBER, NUMBER, NUMBER, NUMBER, st.sampled_from([0, 8, 12]))


def blocks_of(output: Output) -> Iterator[int]:
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


def peak_of(outputs: list[Output], moments: Container[int]) -> int:
    """Token by token: an output ends after the moment in which it got the last."""
    sizes: Counter[int] = Counter()
    for output in outputs:
        sizes.update(dict(enumerate(blocks_of(output))))
    return max((size for moment, size in sizes.items() if moment in moments), default=0)


@settings(deadline=None)
@given(st.lists(GROWTHS, min_size=1, max_size=12))
def test_peak_is_that_of_the_answers_played_out(outputs: list[Output]) -> None:
    assert peak_blocks(growth(outputs), 4) == peak_of(outputs, range(41))


@settings(deadline=None)
@given(st.lists(BOUNDED, min_size=1, max_size=12))
def test_outputs_that_are_evicted_again_shrink(outputs: list[Output]) -> None:
    """At their ends and at the next two evictions of each; a peak in between is not missed."""
    moments = {output.coming for output in outputs}
    for output in outputs:
        if output.period:
            until = -output.tokens % output.period
            moments |= {until, until + output.period}
    peak = peak_blocks(growth(outputs), 4)
    assert peak == peak_of(outputs, moments)
    if len({output.period for output in outputs} - {0}) == 1:  # all later ones are like these
        near = range(min(moments, default=0) + 12)
        assert peak >= peak_of(outputs, near)


def request_of(request_id: str, prompt: int, generated: int, priority: int = 0) -> Any:
    return SimpleNamespace(
        request_id=request_id,
        num_tokens=prompt + generated,
        num_output_tokens=generated,
        max_tokens=40,
        priority=priority,
    )


def expected_output(num_tokens: int, generated: int, bound: AnswerBound | None) -> Output:
    """Of a request with blocks of 4 whose first 24 tokens were evicted to 2 of 7 blocks."""
    outputs = EvictedOutputs(4)
    request = request_of("a", num_tokens - generated, generated)
    outputs.put(request, EvictedOutput(24, 2, 7, bound), 0)
    return Output(*(int(column.item()) for column in OutputReserve(4)._growth(*outputs.columns())))


@pytest.mark.parametrize(
    ("num_tokens", "generated", "bound", "expected"),
    [
        pytest.param(26, 0, None, Output(2, 2, 40, 7), id="prompt-and-answer"),
        pytest.param(36, 10, None, Output(2, 12, 30, 7), id="halfway"),
        pytest.param(66, 40, None, Output(2, 42, 0, 7), id="at-its-end"),
        # Later evictions keep three blocks.
        pytest.param(26, 0, AnswerBound(28, 2, 3), Output(3, 2, 40, 7, 8), id="bounded"),
    ],
)
def test_growth_of_an_evicted_request(
    num_tokens: int, generated: int, bound: AnswerBound | None, expected: Output
) -> None:
    assert expected_output(num_tokens, generated, bound) == expected


HELD = 5


def reserve_of(evicted: list[Any], coming: list[Any], newcomer: Any, used: int) -> int:
    """The reserve if some requests were evicted to 2 of 7 blocks, and others will be."""
    output = EvictedOutput(24, 2, 7, AnswerBound(28, 2, 3))
    outputs = EvictedOutputs(4)
    for request in evicted:
        outputs.put(request, output, HELD)
    others = [(request, output, HELD) for request in coming]
    return OutputReserve(4).free_blocks_for(newcomer, outputs, others, lambda _: 0, used)


@pytest.mark.parametrize("num_evicted", [0, 3, 4])
def test_one_request_at_a_time_is_evicted_again(num_evicted: int) -> None:
    """Beside what all hold, there is room for what the next one keeps."""
    requests = [request_of(name, 26, 0) for name in "abcd"]
    evicted, coming = requests[:num_evicted], requests[num_evicted:]
    assert reserve_of(evicted, coming, requests[0], used=4 * HELD) == 3


def test_less_urgent_requests_are_not_counted() -> None:
    """They make room: what they hold is as good as free."""
    urgent, others = request_of("a", 26, 0), [request_of(name, 26, 0, 1) for name in "bcd"]
    alone = reserve_of([], [urgent], urgent, used=HELD)
    assert alone == 3
    for num_evicted in range(4):
        evicted, coming = others[:num_evicted], [urgent, *others[num_evicted:]]
        assert reserve_of(evicted, coming, urgent, used=4 * HELD) == alone - 3 * HELD
    assert reserve_of(others, [], request_of("e", 26, 0, 0), used=3 * HELD) == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.integers(0, 9)), max_size=60))
def test_outputs_that_come_and_go(steps: list[tuple[int, bool, int]]) -> None:
    """The columns are those of a dictionary, in any order."""
    outputs, expected = EvictedOutputs(4), dict[str, tuple[int, int]]()
    for number, is_put, held in steps:
        request = request_of(str(number), number, held)
        if is_put:
            outputs.put(request, EvictedOutput(4 * number, 1, 7), held)
            expected[request.request_id] = number, held
        elif held > 5 and request.request_id in expected:
            outputs.set_held(request.request_id, held)
            expected[request.request_id] = expected[request.request_id][0], held
        else:
            outputs.discard(request.request_id)
            expected.pop(request.request_id, None)
        array, tokens = outputs.columns()
        found = zip(array[0].tolist(), array[6].tolist(), tokens.tolist(), strict=True)
        assert sorted((e // 4, h) for e, h, _ in found) == sorted(expected.values())
        assert outputs.blocks_held == sum(h for _, h in expected.values())
