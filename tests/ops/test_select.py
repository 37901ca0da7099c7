# SPDX-License-Identifier: Apache-2.0
"""`select` against sorting in Python."""

import math
from fractions import Fraction

import pytest
import torch

from vl_cache_vllm.ops.select import Candidates, select, select_all

pytestmark = pytest.mark.usefixtures("implementation")


def naive_select(scores: list[float], kept: int, recent_ratio: str) -> list[int]:
    """The kept positions of one KV head, as docs/method.md, "Token scores", defines them."""
    num_tokens = len(scores)
    recent = math.ceil(Fraction(recent_ratio) * kept)
    window = list(range(num_tokens - recent, num_tokens))
    rest = sorted(range(num_tokens - recent), key=lambda position: (-scores[position], position))
    return sorted([*rest[: kept - recent], *window])


def all_of(scores: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each layer, where all of them can be selected."""
    return torch.full(scores.shape[:1], scores.shape[2])


def check(
    scores: torch.Tensor,
    kept_tokens: list[int],
    recent_ratio: str,
    max_kept: int,
    num_tokens: list[int] | None = None,
) -> None:
    ends = num_tokens or all_of(scores).tolist()
    result = select(
        scores, torch.tensor(ends), torch.tensor(kept_tokens), float(recent_ratio), max_kept
    )
    assert result.dtype == torch.int32
    assert result.shape == (*scores.shape[:2], max_kept)
    for layer, kept in enumerate(kept_tokens):
        for head in range(scores.shape[1]):
            expected = naive_select(scores[layer, head, : ends[layer]].tolist(), kept, recent_ratio)
            assert result[layer, head, :kept].tolist() == expected, (layer, head)


@pytest.mark.parametrize("recent_ratio", ["0", "0.1", "0.3", "0.99", "1"])
@pytest.mark.parametrize("num_kv_heads", [1, 3])
@pytest.mark.parametrize(
    "kept_tokens",
    [[1, 1, 1], [7, 30, 63], [63, 63, 63], [10, 20, 30]],
    ids=lambda kept: "-".join(map(str, kept)),
)
def test_equals_sorting(recent_ratio: str, num_kv_heads: int, kept_tokens: list[int]) -> None:
    scores = torch.rand(3, num_kv_heads, 63, generator=torch.Generator().manual_seed(0))
    check(scores, kept_tokens, recent_ratio, max_kept=63)


@pytest.mark.parametrize("recent_ratio", ["0", "0.1", "1"])
def test_tokens_behind_a_layers_end_are_never_selected(recent_ratio: str) -> None:
    scores = torch.rand(4, 2, 63, generator=torch.Generator().manual_seed(2))
    ends = [63, 40, 7, 33]
    for layer, end in enumerate(ends):
        scores[layer, :, end:] = 9.0
    check(scores, [30, 40, 1, 32], recent_ratio, 40, ends)
    check(scores.fill_(0.0), [30, 40, 1, 32], recent_ratio, 40, ends)


@pytest.mark.parametrize("recent_ratio", ["0", "0.1", "0.5"])
@pytest.mark.parametrize("distinct", [1, 2, 5], ids=lambda n: f"{n}-distinct-scores")
def test_ties_go_to_the_lower_position(recent_ratio: str, distinct: int) -> None:
    generator = torch.Generator().manual_seed(distinct)
    scores = torch.randint(distinct, (3, 2, 63), generator=generator).float()
    check(scores, [5, 31, 60], recent_ratio, max_kept=60)


def test_zero_and_negative_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-2, 3, (2, 2, 17), generator=generator).float()
    scores[0, 0, ::2] = -0.0  # equals 0.0: a tie, not a lower score
    check(scores, [6, 9], "0.1", max_kept=9)


def test_more_tokens_than_are_sorted_stably_by_chance() -> None:
    scores = torch.zeros(2, 1, 5003)
    scores[1, 0, 4000] = 1.0
    check(scores, [512, 513], "0.1", max_kept=513)


@pytest.mark.parametrize(
    ("recent_ratio", "kept", "recent"),
    [(0.1, 10, 1), (0.1, 30, 3), (0.1, 1000, 100), (0.14, 50, 7), (0.28, 25, 7), (0.56, 50, 28)],
)
def test_a_whole_recent_window_is_not_rounded_up(
    recent_ratio: float, kept: int, recent: int
) -> None:
    """0.14 * 50 is 7.000000000000001 in binary, but the window has 7 tokens."""
    scores = torch.linspace(1, 0, 2 * kept)[None, None]
    result = select(scores, all_of(scores), torch.tensor([kept]), recent_ratio, kept)[0, 0].tolist()
    assert result == [*range(kept - recent), *range(2 * kept - recent, 2 * kept)]


@pytest.mark.parametrize("kept", [1, 9, 11, 29, 31])
def test_a_fractional_recent_window_is_rounded_up(kept: int) -> None:
    scores = torch.linspace(1, 0, 63)[None, None]
    result = select(scores, all_of(scores), torch.tensor([kept]), 0.1, kept)[0, 0].tolist()
    recent = -(-kept // 10)
    assert result == [*range(kept - recent), *range(63 - recent, 63)]


def test_recent_tokens_are_part_of_the_budget() -> None:
    scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    result = select(scores, all_of(scores), torch.tensor([4]), 0.5, 4)[0, 0].tolist()
    assert result == [0, 1, 8, 9]


def test_max_kept_below_the_number_of_tokens_only_shortens_the_result() -> None:
    scores = torch.rand(3, 2, 63, generator=torch.Generator().manual_seed(4))
    kept = torch.tensor([3, 20, 11])
    wide, narrow = (
        select(scores, all_of(scores), kept, 0.1, 63),
        select(scores, all_of(scores), kept, 0.1, 20),
    )
    for layer, count in enumerate(kept.tolist()):
        assert torch.equal(wide[layer, :, :count], narrow[layer, :, :count])


@pytest.mark.parametrize("recent_ratio", ["0", "0.25"])
@pytest.mark.parametrize("kept", [1, 6, 20, 40])
def test_precedence_is_sorted_before_scores(recent_ratio: str, kept: int) -> None:
    generator = torch.Generator().manual_seed(kept)
    scores = torch.randint(3, (2, 2, 50), generator=generator).float()
    scores[0, 0, 7], scores[1, 1, 9] = torch.inf, -torch.inf
    precedence = torch.randint(3, (50,), generator=generator)
    result = select(
        scores, all_of(scores), torch.tensor([kept, kept]), float(recent_ratio), kept, precedence
    )
    recent = math.ceil(Fraction(recent_ratio) * kept)
    window = list(range(50 - recent, 50))
    for layer in range(2):
        for head in range(2):
            row = scores[layer, head].tolist()
            rest = sorted(range(50 - recent), key=lambda p: (-precedence[p], -row[p], p))
            expected = sorted([*rest[: kept - recent], *window])
            assert result[layer, head].tolist() == expected


def test_precedence_does_not_reach_behind_a_layers_end() -> None:
    scores = torch.rand(2, 2, 50, generator=torch.Generator().manual_seed(8))
    precedence = (torch.arange(50) >= 20).long()
    kept = torch.tensor([4, 4])
    result = select(scores, torch.tensor([22, 50]), kept, 0.0, 4, precedence)
    for head in range(2):
        best = scores[0, head, :20].topk(2).indices.sort().values.tolist()
        assert result[0, head].tolist() == [*best, 20, 21]
        assert (result[1, head] >= 20).all()


def test_equal_precedence_changes_nothing() -> None:
    scores = torch.rand(2, 3, 63)
    kept = torch.tensor([10, 30])
    for level in (0, 2):
        alike = select(scores, all_of(scores), kept, 0.1, 30, torch.full((63,), level))
        plain = select(scores, all_of(scores), kept, 0.1, 30)
        for layer, count in enumerate(kept.tolist()):
            assert torch.equal(alike[layer, :, :count], plain[layer, :, :count])


def test_requests_do_not_change_each_other() -> None:
    """Requests of different lengths and numbers of layers, some with precedences."""
    generator = torch.Generator().manual_seed(0)
    candidates = []
    for layers, width, most, ratio, grouped in (
        (1, 63, 20, 0.1, False),
        (3, 2000, 512, 0.0, True),
        (2, 1025, 1025, 0.3, False),
        (4, 40, 8, 1.0, True),
    ):
        ends = torch.randint(most, width + 1, (layers,), generator=generator)
        kept = torch.randint(1, most + 1, (layers,), generator=generator)
        groups = torch.randint(0, 3, (width,), generator=generator) if grouped else None
        scores = torch.rand(layers, 2, width, generator=generator)
        candidates.append(Candidates(scores, ends, kept, ratio, most, groups))
    for one, found in zip(candidates, select_all(candidates), strict=True):
        expected = select(
            one.scores,
            one.num_tokens,
            one.kept_tokens,
            one.recent_ratio,
            one.max_kept,
            one.precedence,
        )
        assert found.shape == expected.shape
        for layer, kept in enumerate(one.kept_tokens.tolist()):
            assert torch.equal(found[layer, :, :kept], expected[layer, :, :kept])
