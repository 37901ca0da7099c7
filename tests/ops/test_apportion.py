# SPDX-License-Identifier: Apache-2.0
"""Apportionment against exact rational arithmetic."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.ops.conftest import TRITON
from vl_cache_vllm.ops.apportion import apportion

pytestmark = [
    pytest.mark.usefixtures("implementation"),
    pytest.mark.parametrize(  # there is none in C++
        "implementation", ["torch", TRITON], indirect=True
    ),
]

NEAR_TIE = Fraction(1, 10**9)
Caps = int | list[int]  # one for all layers, or one for each


def as_list(caps: Caps, weights: list[float]) -> list[int]:
    return caps if isinstance(caps, list) else [caps] * len(weights)


def exact_quotas(weights: list[float], total: int, caps: list[int]) -> list[Fraction]:
    """``clip(scale * w, 1, cap)`` summing to ``total``, with the scale found exactly."""
    exact = [Fraction(weight) for weight in weights]

    def clipped(scale: Fraction) -> list[Fraction]:
        return [
            min(max(scale * weight, Fraction(1)), Fraction(cap))
            for weight, cap in zip(exact, caps, strict=True)
        ]

    # The scales at which some layer leaves the floor or reaches the cap.
    kinks = sorted(
        {1 / weight for weight in exact} | {c / w for c, w in zip(caps, exact, strict=True)}
    )
    low = kinks[0]
    for high in kinks:
        if sum(clipped(high)) >= total:
            break
        low = high
    lower_sum, upper_sum = sum(clipped(low)), sum(clipped(high))
    if lower_sum == upper_sum:
        return clipped(high)
    return clipped(low + (total - lower_sum) * (high - low) / (upper_sum - lower_sum))


@dataclass(frozen=True)
class Reference:
    """Exact result, and whether float64 may legitimately come to another one."""

    quotas: list[Fraction]
    pages: list[int]
    is_near_tie: bool


def exact_apportion(weights: list[float], total: int, caps: Caps) -> Reference:
    quotas = exact_quotas(weights, total, as_list(caps, weights))
    assert sum(quotas) == total
    pages = [floor(quota) for quota in quotas]
    missing = total - sum(pages)
    order = sorted(range(len(quotas)), key=lambda i: (pages[i] - quotas[i], i))
    last_in, first_out = order[missing - 1 : missing], order[missing : missing + 1]
    is_near_tie = False
    if last_in and first_out:
        # Of those as near to the last one in as the first one out is. Equal weights give equal
        # floating-point quotas: a tie among them is decided by the layer.
        boundary = quotas[first_out[0]] % 1
        tied = {w for w, q in zip(weights, quotas, strict=True) if abs(q % 1 - boundary) < NEAR_TIE}
        is_near_tie = quotas[last_in[0]] % 1 - boundary < NEAR_TIE and len(tied) > 1
        # A whole quota whose floating-point value is slightly above or below is no tie with b.
    for layer in order[:missing]:
        pages[layer] += 1
    return Reference(quotas, pages, is_near_tie)


def distribute(weights: list[float], total: int, caps: Caps) -> list[int]:
    caps = as_list(caps, weights)
    result = apportion(
        torch.tensor([weights], dtype=torch.float64), [total], torch.tensor([caps]), [sum(caps)]
    )
    assert result.dtype == torch.int64
    return result[0].tolist()


def check(weights: list[float], total: int, caps: Caps) -> list[int]:
    pages = distribute(weights, total, caps)
    assert sum(pages) == total
    for count, cap in zip(pages, as_list(caps, weights), strict=True):
        assert 1 <= count <= cap
    reference = exact_apportion(weights, total, caps)
    for i, (count, quota) in enumerate(zip(pages, reference.quotas, strict=True)):
        assert abs(count - quota) < 1 + NEAR_TIE, (i, count, float(quota))
    if not reference.is_near_tie:
        assert pages == reference.pages
    return pages


@pytest.mark.parametrize(
    ("weights", "total", "cap", "expected"),
    [
        pytest.param([0.1, 0.1, 0.1], 3, 8, [1, 1, 1], id="floor-everywhere"),
        pytest.param([0.1, 0.9, 0.3], 24, 8, [8, 8, 8], id="cap-everywhere"),
        pytest.param([0.4, 0.1, 0.1], 6, 8, [4, 1, 1], id="design-example"),
        pytest.param([0.25, 0.25, 0.5], 8, 8, [2, 2, 4], id="whole-quotas"),
        pytest.param([1.0, 0.01, 0.01], 9, 20, [7, 1, 1], id="floor-binds"),
        pytest.param([1.0, 0.01, 0.01], 12, 8, [8, 2, 2], id="cap-binds"),
        pytest.param([1.0, 0.5, 0.001], 9, 6, [5, 3, 1], id="largest-remainder-with-floor"),
        pytest.param([1.0, 0.1, 0.0001], 9, 6, [6, 2, 1], id="cap-and-floor-bind"),
        pytest.param([0.5, 0.5, 0.5], 4, 8, [2, 1, 1], id="tie-to-the-lower-layer"),
        pytest.param([0.5, 0.5, 0.5], 5, 8, [2, 2, 1], id="two-of-three-tied"),
        pytest.param([0.2, 0.5, 0.5, 0.5], 8, 8, [1, 3, 2, 2], id="tie-among-some"),
        pytest.param([0.3], 5, 8, [5], id="one-layer"),
        pytest.param([0.7], 1, 1, [1], id="one-page"),
        pytest.param([0.01, 1.0], 2, 1, [1, 1], id="cap-is-one"),
        pytest.param([1.0, 1.0, 1.0], 9, [2, 9, 9], [2, 4, 3], id="one-layer-has-less"),
        pytest.param([8.0, 1.0, 1.0], 9, [2, 1, 9], [2, 1, 6], id="two-layers-have-less"),
        pytest.param([1.0, 2.0, 4.0], 12, [3, 4, 5], [3, 4, 5], id="all-that-there-is"),
    ],
)
def test_examples(weights: list[float], total: int, cap: Caps, expected: list[int]) -> None:
    assert check(weights, total, cap) == expected


@pytest.mark.parametrize(
    ("total", "cap"), [(2, 8), (25, 8), (3, 0), (0, 8), (-3, 8)], ids=lambda n: str(n)
)
def test_impossible_divisions_are_refused(total: int, cap: int) -> None:
    with pytest.raises(ValueError, match=f"cannot distribute {total} pages over 3 layers"):
        distribute([0.1, 0.2, 0.3], total, cap)


@st.composite
def divisions(draw: st.DrawFn, weight: st.SearchStrategy[float]) -> tuple[list[float], int, int]:
    num_layers = draw(st.integers(1, 48))
    # Few distinct values, so that layers often tie.
    values = draw(st.lists(weight, min_size=1, max_size=num_layers))
    weights = draw(st.lists(st.sampled_from(values), min_size=num_layers, max_size=num_layers))
    cap = draw(st.one_of(st.integers(1, 8), st.integers(1, 1000)))
    total = draw(st.integers(num_layers, num_layers * cap))
    return weights, total, cap


POLICY_WEIGHTS = st.floats(0.01, 1.0, allow_nan=False)  # the clip of Algorithm 1
ANY_WEIGHTS = st.floats(1e-6, 1e3, allow_nan=False)
ROUND_WEIGHTS = st.integers(1, 100).map(lambda percent: percent / 100)


@examples(300)
@given(divisions(POLICY_WEIGHTS))
def test_random_weights_of_the_policy(division: tuple[list[float], int, int]) -> None:
    check(*division)


@examples(300)
@given(divisions(ANY_WEIGHTS))
def test_random_weights_of_any_size(division: tuple[list[float], int, int]) -> None:
    check(*division)


@examples(300)
@given(divisions(ROUND_WEIGHTS))
def test_random_round_weights(division: tuple[list[float], int, int]) -> None:
    check(*division)


@examples(300)
@given(divisions(ROUND_WEIGHTS), st.data())
def test_random_caps(division: tuple[list[float], int, int], data: st.DataObject) -> None:
    """Layers that were evicted before have different numbers of pages."""
    weights, _, cap = division
    caps = data.draw(
        st.lists(st.integers(1, cap), min_size=len(weights), max_size=len(weights)), "caps"
    )
    check(weights, data.draw(st.integers(len(weights), sum(caps)), "total"), caps)


@examples(200)
@given(divisions(POLICY_WEIGHTS))
def test_never_against_the_weights(division: tuple[list[float], int, int]) -> None:
    """Equal layers get equal pages but for one, the lower first; a heavier one at least as many."""
    weights, total, cap = division
    pages = distribute(weights, total, cap)
    for i in range(len(weights)):
        for j in range(i + 1, len(weights)):
            if weights[i] == weights[j]:
                assert pages[j] <= pages[i] <= pages[j] + 1
            elif abs(weights[i] - weights[j]) > 1e-9:
                heavy, light = (i, j) if weights[i] > weights[j] else (j, i)
                assert pages[heavy] >= pages[light]


@examples(100)
@given(divisions(POLICY_WEIGHTS), st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]))
def test_only_proportions_count(division: tuple[list[float], int, int], factor: float) -> None:
    weights, total, cap = division
    assert distribute(weights, total, cap) == distribute([factor * w for w in weights], total, cap)


@examples(100)
@given(st.integers(1, 48), st.data())
@example(32, None)
def test_equal_weights_differ_by_at_most_one(num_layers: int, data: st.DataObject | None) -> None:
    total = (
        100 * num_layers - 1
        if data is None
        else data.draw(st.integers(num_layers, 200 * num_layers))
    )
    share, rest = divmod(total, num_layers)
    expected = [share + 1] * rest + [share] * (num_layers - rest)
    assert distribute([0.1] * num_layers, total, 200) == expected


def test_at_a_cap_no_page_is_lost_to_rounding() -> None:
    """0.3 and 0.1 are no binary fractions, so quotas at floor and cap carry noise."""
    for num_layers in (2, 3, 7, 32):
        weights = [0.1 + 0.3 * (layer % 3) for layer in range(num_layers)]
        for cap in (1, 2, 10, 63):
            for total in range(num_layers, num_layers * cap + 1, max(1, num_layers * cap // 50)):
                check(weights, total, cap)


@pytest.mark.parametrize(
    ("weights", "total", "cap", "expected"),
    [
        pytest.param([0.125, 0.875, 0.625], 18, 9, [2, 9, 7], id="halves"),  # 3/2, 9, 15/2
        pytest.param([0.125, 0.5, 0.125], 10, 9, [2, 7, 1], id="thirds"),  # 5/3, 20/3, 5/3
        pytest.param([0.125, 0.25, 0.875], 12, 9, [1, 3, 8], id="fifths"),  # 6/5, 12/5, 42/5
    ],
)
def test_exact_ties_go_to_the_lower_layer_whatever_its_weight(
    weights: list[float], total: int, cap: int, expected: list[int]
) -> None:
    """All weights are binary fractions, so the ties are exact."""
    assert exact_apportion(weights, total, cap).pages == expected
    assert distribute(weights, total, cap) == expected


@pytest.mark.parametrize(
    "weights",
    [
        [1e-320, 1e-321, 5e-324],
        [1e-320, 1.0, 1e300],
        [float("inf"), 1.0, 2.0],
        [float("nan"), 1.0, 2.0],
        [0.0, 0.0, 0.0],
    ],
    ids=str,
)
def test_weights_beyond_reason_still_add_up(weights: list[float]) -> None:
    """Of a policy's, which may be anybody's: wrong, but not so that the cache is overrun."""
    caps = torch.tensor([[6, 6, 6]])
    pages = apportion(torch.tensor([weights], dtype=torch.float64), [10], caps, [18])
    assert int(pages.sum()) == 10
    assert int(pages.min()) >= 1 and int(pages.max()) <= 6


def test_requests_do_not_change_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    caps = torch.randint(3, 9, (5, 7), generator=generator)
    totals = [7, 13, 19, 20, 21]
    found = apportion(weights, totals, caps, caps.sum(1).tolist())
    for row, own, total, cap in zip(found, weights, totals, caps, strict=True):
        assert row.tolist() == distribute(own.tolist(), total, cap.tolist())
    with pytest.raises(ValueError, match="cannot distribute 6 pages over 7 layers"):
        apportion(weights, [7, 13, 6, 20, 21], caps, caps.sum(1).tolist())
