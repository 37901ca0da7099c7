# SPDX-License-Identifier: Apache-2.0
"""Statistics of a trace, compared with plain loops."""

import numpy as np
import pytest

from tests.helpers.made_up import record
from vl_cache_vllm.inspector.trace import LEVELS, Eviction, histogram, levels

TWO_IMAGES = {"visual": ((2, 11), (13, 19)), "grids": ((2, 3, 3, 3), (13, 2, 2, 3))}


def test_kept_share_of_every_selection() -> None:
    line = record(**TWO_IMAGES)
    eviction = Eviction.from_records([line])
    for layer in (None, 0, 1, 2):
        for head in (None, 0, 1):
            chosen = [
                line["kept_positions"][i][j]
                for i in range(3)
                for j in range(2)
                if layer in (None, i) and head in (None, j)
            ]
            expected = [
                sum(t in positions or t >= line["evicted_tokens"] for positions in chosen)
                / len(chosen)
                for t in range(line["tokens"])
            ]
            assert eviction.kept_share(layer, head) == pytest.approx(expected)


def test_kept_tokens_by_kind() -> None:
    line = record(**TWO_IMAGES)
    visual, text = Eviction.from_records([line]).kept_by_kind()
    images = {*range(2, 11), *range(13, 19)}
    for layer, heads in enumerate(line["kept_positions"]):
        seen = [sum(p in images for p in positions) for positions in heads]
        assert visual[layer] == pytest.approx(sum(seen) / len(seen))
        tail = line["tokens"] - line["evicted_tokens"]
        assert visual[layer] + text[layer] == line["kept_tokens"][layer] + tail


def test_records_of_several_workers_are_joined() -> None:
    """Two stages of two and one layers, two ranks of a KV head each, in any order."""
    line = record()
    per_head = ("kept_positions", "attention", "scores")
    records = []
    for first, end in ((2, 3), (0, 2)):
        for rank in (1, 0):
            own = line | {"rank": rank}
            own |= {name: line[name][first:end] for name in ("layers", "density", "kept_tokens")}
            own |= {name: [[h[rank]] for h in line[name][first:end]] for name in per_head}
            records.append(own)
    again = records[0] | {"scores": [[[0.0] * 26]]}  # evicted again after a preemption
    joined, whole = Eviction.from_records([*records, again]), Eviction.from_records([line])
    assert (joined.kept == whole.kept).all()
    assert (joined.attention == whole.attention).all()
    assert (joined.scores == whole.scores).all()
    assert joined.layers == (0, 1, 2)
    assert (joined.density, joined.kept_tokens) == (whole.density, whole.kept_tokens)


def test_grids_belong_to_the_image_that_holds_them() -> None:
    eviction = Eviction.from_records([record(**TWO_IMAGES)])
    assert [g.first for g in eviction.grids_of(0)] == [2]
    assert [(g.rows, g.columns, g.row_stride) for g in eviction.grids_of(1)] == [(2, 2, 3)]
    tiles = record(grids=((2, 2, 4, 4), (10, 2, 4, 4)))
    assert len(Eviction.from_records([tiles]).grids_of(0)) == 2
    assert Eviction.from_records([record(grids=())]).grids_of(0) == ()


def test_retained_is_the_share_of_blocks() -> None:
    assert Eviction.from_records([record()]).retained == 2 / 7


@pytest.mark.parametrize("seed", range(5))
def test_levels_are_close_to_their_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 3, (2, 3, 50)).astype(np.float32) * (rng.random((2, 3, 50)) > 0.1)
    quantised, low, high = levels(values)
    assert ((quantised == 0) == (values == 0)).all()
    assert quantised.max() == LEVELS
    step = (high / low) ** (1 / 254)
    for level, value in zip(quantised.ravel().tolist(), values.ravel().tolist(), strict=True):
        if level:
            value = max(value, low)  # what is smaller shares the lowest level
            assert low * step ** (level - 1) == pytest.approx(value, rel=step**0.5 - 1 + 1e-5)


def test_levels_of_nothing_of_one_value_and_of_a_huge_range() -> None:
    assert levels(np.zeros((1, 1, 3)))[0].tolist() == [[[0, 0, 0]]]
    assert levels(np.full((1, 1, 3), 2.0)) == (pytest.approx(np.full((1, 1, 3), LEVELS)), 2.0, 2.0)
    quantised, low, _ = levels(np.array([1e-30, 1e-4, 1.0]))
    assert quantised.tolist()[0] == 1
    assert quantised.tolist()[2] == LEVELS
    assert low == pytest.approx(1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_histogram(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 2, 300) * (rng.random(300) > 0.1)
    kept = rng.random(300) < 0.3
    found = histogram(values, kept, bins=7)
    assert len(found.edges) == 8
    ratios = found.edges[2:-1] / found.edges[1:-2]
    assert ratios == pytest.approx(np.full(5, ratios[0]))
    for group, shares, zero in (
        (kept, found.kept, found.zero[0]),
        (~kept, found.evicted, found.zero[1]),
    ):
        own = values[group].tolist()
        for i, share in enumerate(shares.tolist()):
            low, high = found.edges[i], found.edges[i + 1]
            assert share == pytest.approx(sum(low <= v < high for v in own if v) / len(own))
        assert zero == pytest.approx(own.count(0.0) / len(own))
        assert shares.sum() + zero == pytest.approx(1)


@pytest.mark.parametrize("values", [np.zeros(4), np.ones(4), np.array([0, 0, 0, 5.0])])
def test_histogram_of_few_values(values: np.ndarray) -> None:
    found = histogram(values, np.array([True, True, False, False]))
    assert found.kept.sum() + found.zero[0] == pytest.approx(1)
    assert found.evicted.sum() + found.zero[1] == pytest.approx(1)
    assert (np.diff(found.edges) > 0).all()
