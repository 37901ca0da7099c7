# SPDX-License-Identifier: Apache-2.0
"""The soak test: its seeded requests, its comparisons, and the tables of its results."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from checks.soak import __main__ as soak
from checks.soak.load import Load, Request, Response

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def load() -> Load:
    return Load(Path("model"), seed=3, num_samples=4)


def run(load: Load) -> soak.Soak:
    nothing: Any = None
    return soak.Soak(nothing, nothing, load)


def test_requests_depend_only_on_the_seed(load: Load) -> None:
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
def test_comparison_with_the_idle_run(
    load: Load, text: str, margins: list[float], preempted: bool, counted: str
) -> None:
    soaked = run(load)
    soaked.idle = [Response(tokens=list("abc"), margins=margins)]
    request = Request(load.chat("What?", 1), sample=0)
    soaked._compare(request, Response(tokens=list(text)), preempted, "test")
    assert soaked.counts[counted] == 1
    assert bool(soaked.failures) == (counted == "mismatches")


@pytest.mark.parametrize(
    ("logged", "failing", "repeated", "failed"),
    [
        pytest.param(f"{soak.CACHE_MISS} for request cmpl-{{id}}-1f", 1, 1, False, id="miss"),
        pytest.param(f"{soak.CACHE_MISS} for request cmpl-{{id}}-1f", 9, 2, True, id="always"),
        pytest.param(f"{soak.CACHE_MISS} for request cmpl-other", 1, 0, True, id="another's"),
        pytest.param("Traceback for request cmpl-{id}-1f", 1, 0, True, id="another-error"),
    ],
)
def test_only_a_miss_of_the_image_cache_is_repeated(
    load: Load, tmp_path: Path, logged: str, failing: int, repeated: int, failed: bool
) -> None:
    class Fake:
        log = tmp_path / "log"
        sent = 0

        async def send(self, request: Request) -> Response:
            self.sent += 1
            if self.sent > failing:
                return Response(status=200, completion_tokens=4)
            self.log.write_text(f"INFO started\n{logged.format(id=self.sent)}\n")
            return Response(status=500, error="Internal server error", request_id=str(self.sent))

    fake: Any = Fake()
    soaked = soak.Soak(fake, fake, load)
    asyncio.run(soaked.ask(Request(load.chat("What?", 1, max_tokens=4)), "test"))
    assert soaked.counts["repeated"] == repeated
    assert bool(soaked.failures) == failed
    assert soaked.counts["answered"] == (not failed)


def test_memory_growth_in_the_second_half(load: Load) -> None:
    soaked = run(load)
    rounds = 4 * len(soak.PHASES)
    soaked.phases = [
        {"requests": 100, "memory_mb": {"worker": max(900 - 50 * i, 500) + 2 * i}}
        for i in range(rounds)
    ]
    assert soaked.growth() == {"worker": 20.0}
    soaked.phases = soaked.phases[: rounds // 2]
    assert soaked.growth() == {}


def test_the_document_has_the_committed_tables() -> None:
    report = json.loads((ROOT / "benchmarks/results/soak.json").read_text())
    assert report["failures"] == []
    docs = (ROOT / "docs/reliability.md").read_text()
    assert soak.markdown(report) in docs
    assert soak.faults_markdown(report) in docs
