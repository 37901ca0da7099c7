# SPDX-License-Identifier: Apache-2.0
"""The results page agrees with the committed results."""

import copy
import dataclasses
from typing import Any

import pytest

from benchmarks import report
from testing.results import Row


def test_the_page_is_up_to_date() -> None:
    page = report.PAGE.read_text()
    assert page == report.page()
    results = report.Results.committed()
    assert report.headline(results) in page
    overhead = results.overhead["rows"]
    assert {row["step"] for row in overhead} == {"prefill", "decode"}
    assert report.overhead_table(overhead) in page
    assert report.overhead_table(results.overhead_amx["rows"]) in page


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The committed results by name. Tests change them, and the page uses the changed ones."""
    names = ("serving", "serving-ample", "serving-early", "offline", "turns", "overhead")
    names += ("overhead-amx", "host-time", "host-time-before")
    loaded = {name: copy.deepcopy(report.load(name)) for name in names}
    monkeypatch.setattr(report, "load", loaded.__getitem__)
    return loaded


def goals(**changed: Any) -> str:
    return report.goals(dataclasses.replace(report.Results.committed(), **changed))


def test_a_missed_goal_is_reported(results: dict[str, Any]) -> None:
    offline = results["offline"]["results"]
    for full, baseline in zip(offline["whole"], offline["stock"], strict=True):
        full["repeats"]["end_to_end"] = [1.02 * t for t in baseline["repeats"]["end_to_end"]]
    for arm in ("stock", "ours"):
        for row in results["serving"]["results"][arm]:
            row["output_throughput"] = 100.0
    text = goals()
    assert "1.00x | **missed**" in text
    assert "largest difference 2.0% | **missed**" in text
    for full, baseline in zip(offline["whole"], offline["stock"], strict=True):
        full["repeats"]["end_to_end"] = [t / 1.005 for t in baseline["repeats"]["end_to_end"]]
    assert "largest difference 0.5% | met" in goals()


def test_a_missing_measurement_has_no_verdict(results: dict[str, Any]) -> None:
    assert f"output throughput | {report.NOT_MEASURED} |  |" in goals(ample=None)


def test_a_loss_is_listed(results: dict[str, Any]) -> None:
    engines = results["offline"]["results"]
    baseline, eviction = engines["stock"][0], engines["ours"][0]
    eviction["repeats"]["prefill"] = [1.25 * time for time in baseline["repeats"]["prefill"]]
    assert "prefill 1.25x the baseline's time" in report.page()


def test_the_median_does_not_hide_one_bad_repeat() -> None:
    assert report.lowest([[1.1, 1.2, 1.3], [1.0, 1.5, 1.5]], 1.0)[1] is True
    text, met = report.lowest([[1.1, 0.9, 1.3], [1.0, 1.5, 1.5]], 1.0)
    assert (text, met) == ("lowest median 1.10x, lowest repeat 0.90x", "medians only")
    assert report.lowest([[1.1, 0.9, 0.95]], 1.0)[1] is False


def test_the_median_does_not_hide_a_wide_interval(results: dict[str, Any]) -> None:
    def decode() -> report.Measured:
        return report.interleaved(everything, 1.0, engine="ours", step="decode")

    def losses(rows: list[Row]) -> str:
        return report.losses(dataclasses.replace(everything, turns={"rows": rows}))

    rows = [row for row in results["turns"]["rows"] if row["engine"] == "ours"]
    for row in rows:
        row |= {"ratio": 1.2, "interval": [1.1, 1.3]}
    everything = dataclasses.replace(
        report.Results.committed(), limited=None, ample=None, early=None, turns={"rows": rows}
    )
    assert decode()[1] is True
    rows[-1]["interval"] = [0.99, 1.4]
    text = "lowest median 1.200x, lowest interval bound 0.990x"
    assert decode() == (text, "medians only")
    rows[-1]["ratio"] = 0.99
    assert decode()[1] is False
    rows[-1] |= {"interval": [0.8, 0.98], "milliseconds": 60.0, "stock_milliseconds": 50.0}
    assert "interleaved" not in losses(rows[:-1])
    assert "eviction: decode 1.01x the baseline's time" in losses(rows)


def test_a_short_saturated_phase_has_no_median() -> None:
    full: Row = {"saturated": {"seconds": 60.0, "running": 8.0}}
    brief: Row = {"saturated": {"seconds": 2.6, "running": 3.0}}
    assert report.running_ratio(full, full) == 1.0
    for other in (brief, {"most_running": 12}):
        assert report.running_ratio(full, other) is None
        assert report.number(report.running(other)) == "-"
