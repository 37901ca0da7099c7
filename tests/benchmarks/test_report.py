# SPDX-License-Identifier: Apache-2.0
"""The results page is what the committed results say."""

import copy
from typing import Any

import pytest

from benchmarks import report


def test_the_page_is_up_to_date() -> None:
    assert report.PAGE.read_text() == report.page()


def test_the_readme_says_the_same() -> None:
    readme = report.README.read_text()
    assert readme == report.readme()
    assert report.headline(report.load("serving")["results"]) in readme
    overhead = report.load("overhead")["rows"]
    assert {row["step"] for row in overhead} == {"prefill", "decode"}
    assert report.overhead_table(overhead) in readme


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The committed results, to be changed."""
    names = ("serving", "serving-ample", "serving-early", "offline", "turns", "overhead")
    loaded = {name: copy.deepcopy(report.load(name)) for name in names}
    monkeypatch.setattr(report, "load", loaded.__getitem__)
    return loaded


def test_a_goal_that_is_missed_is_said_to_be(results: dict[str, Any]) -> None:
    def verdicts() -> str:
        names = ("serving", "serving-ample", "offline", "turns", "overhead")
        return report.goals(*(results[name] for name in names))

    offline = results["offline"]["results"]
    for whole, stock in zip(offline["whole"], offline["stock"], strict=True):
        whole["repeats"]["end_to_end"] = [1.02 * t for t in stock["repeats"]["end_to_end"]]
    for arm in ("stock", "ours"):
        for row in results["serving"]["results"][arm]:
            row["output_throughput"] = 100.0
    text = verdicts()
    assert "1.00x | **missed**" in text
    assert "2.0% apart at most | **missed**" in text
    for whole, stock in zip(offline["whole"], offline["stock"], strict=True):
        whole["repeats"]["end_to_end"] = [t / 1.005 for t in stock["repeats"]["end_to_end"]]
    assert "0.5% apart at most | met" in verdicts()


def test_what_is_not_measured_has_no_verdict(results: dict[str, Any]) -> None:
    others = (results[name] for name in ("offline", "turns", "overhead"))
    text = report.goals(results["serving"], None, *others)
    assert f"output throughput | {report.NOT_MEASURED} |  |" in text


def test_a_loss_is_listed(results: dict[str, Any]) -> None:
    engines = results["offline"]["results"]
    stock, ours = engines["stock"][0], engines["ours"][0]
    ours["repeats"]["prefill"] = [1.25 * time for time in stock["repeats"]["prefill"]]
    assert "prefill 1.25 times stock's" in report.page()


def test_one_bad_repeat_is_not_hidden_by_the_median() -> None:
    assert report.at_least([[1.1, 1.2, 1.3], [1.0, 1.5, 1.5]], 1.0)[1] is True
    said, met = report.at_least([[1.1, 0.9, 1.3], [1.0, 1.5, 1.5]], 1.0)
    assert (said, met) == ("1.10x at least, 0.90x in the worst repeat", "medians only")
    assert report.at_least([[1.1, 0.9, 0.95]], 1.0)[1] is False


def test_an_interval_that_reaches_too_far_is_not_hidden_either(results: dict[str, Any]) -> None:
    rows = [row for row in results["turns"]["rows"] if row["engine"] == "ours"]
    for row in rows:
        row |= {"ratio": 1.2, "interval": [1.1, 1.3]}
    turns = {"rows": rows}
    assert report.in_turns(turns, "ours", "decode", 1.0)[1] is True
    rows[-1]["interval"] = [0.99, 1.4]
    said = "1.200x at least, 0.990x at an interval's lower end"
    assert report.in_turns(turns, "ours", "decode", 1.0) == (said, "medians only")
    rows[-1]["ratio"] = 0.99
    assert report.in_turns(turns, "ours", "decode", 1.0)[1] is False
    rows[-1] |= {"interval": [0.8, 0.98], "milliseconds": 60.0, "stock_milliseconds": 50.0}
    assert "in turns" not in report.losses({}, results["offline"], {"rows": rows[:-1]})
    assert "decode in turns 1.01 times stock's" in report.losses({}, results["offline"], turns)


def test_a_median_of_a_moment_is_none() -> None:
    full: report.Row = {"saturated": {"seconds": 60.0, "running": 8.0}}
    brief: report.Row = {"saturated": {"seconds": 2.6, "running": 3.0}}
    assert report.more_running(full, full) == 1.0
    for other in (brief, {"most_running": 12}):
        assert report.more_running(full, other) is None
        assert report.number(report.running(other)) == "-"
