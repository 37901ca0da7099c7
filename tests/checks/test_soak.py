# SPDX-License-Identifier: Apache-2.0
"""The soak's seeded requests, what it compares, and the tables made of its results."""

import json
from pathlib import Path
from typing import Any

import pytest

from checks.soak import __main__ as soak
from checks.soak.load import Answer, Load, Request

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load() -> Load:
    return Load(Path("model"), seed=3, num_samples=4)


def run(load: Load) -> soak.Soak:
    nothing: Any = None
    return soak.Soak(nothing, nothing, load)


def test_requests_are_a_function_of_the_seed(load: Load) -> None:
    again, other = (Load(Path("model"), seed, num_samples=4) for seed in (3, 4))

    def draw(load: Load) -> list[Request]:
        return [run(load).draw(phase) for phase in soak.PHASES for _ in range(20)]

    drawn = draw(load)
    assert draw(again) == drawn != draw(other)
    assert {request.manner for request in drawn} > {"read", "leave mid-upload", "read slowly"}
    assert {request.status for request in drawn} == {200, 400, 404}


@pytest.mark.parametrize(
    ("text", "margins", "preempted", "counted"),
    [
        pytest.param("abc", [1, 1, 1], False, "compared", id="the-same"),
        pytest.param("abx", [1, 1, 1], False, "mismatches", id="another-token"),
        pytest.param("abx", [1, 1, 0], False, "compared", id="after-a-near-tie"),
        pytest.param("axc", [1, 1, 0], False, "mismatches", id="before-a-near-tie"),
        pytest.param("ab", [1, 1, 1], False, "mismatches", id="too-short"),
        pytest.param("abx", [1, 1, 1], True, "not compared", id="perhaps-preempted"),
    ],
)
def test_comparison_with_the_quiet_run(
    load: Load, text: str, margins: list[float], preempted: bool, counted: str
) -> None:
    soaked = run(load)
    soaked.quiet = [Answer(tokens=list("abc"), margins=margins)]
    request = Request(load.chat("What?", 1), sample=0)
    soaked._compare(request, Answer(tokens=list(text)), preempted, "test")
    assert soaked.counts[counted] == 1
    assert bool(soaked.failures) == (counted == "mismatches")


def test_growth_of_memory_in_the_later_half(load: Load) -> None:
    soaked = run(load)
    rounds = 4 * len(soak.PHASES)
    soaked.phases = [
        {"requests": 100, "memory_mb": {"worker": max(900 - 50 * i, 500) + 2 * i}}
        for i in range(rounds)
    ]
    assert soaked.growth() == {"worker": 20.0}
    soaked.phases = soaked.phases[: rounds // 2]
    assert soaked.growth() == {}


def test_tables_are_the_results() -> None:
    report = json.loads((ROOT / "benchmarks/results/soak.json").read_text())
    assert report["failures"] == []
    docs = (ROOT / "docs/reliability.md").read_text()
    assert soak.markdown(report) in docs
    assert soak.faults_markdown(report) in docs
