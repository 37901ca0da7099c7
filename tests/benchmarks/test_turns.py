# SPDX-License-Identifier: Apache-2.0
"""Interleaved steps: every engine executes every step, and ratios compare the same step."""

import time
from typing import Any

import pytest

from benchmarks import offline, turns


class _Engine:
    """Steps that become slower, as decode steps do."""

    def __init__(self, slowness: float, log: list[str], name: str) -> None:
        self.slowness, self.log, self.name = slowness, log, name
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.steps = 0

    def add_request(self, request_id: str, request: Any, params: Any) -> None:
        self.added.append(request_id)

    def abort_request(self, ids: list[str]) -> None:
        self.aborted = ids

    def get_num_unfinished_requests(self) -> int:
        return len(self.added)

    def step(self) -> None:
        self.log.append(self.name)
        self.steps += 1
        time.sleep(0.002 * self.slowness * self.steps)


def test_every_engine_executes_a_step_before_any_executes_the_next() -> None:
    log: list[str] = []
    slowness = {"stock": 1.0, "again": 1.0, "whole": 1.0, "ours": 0.5}
    engines = {name: _Engine(slow, log, name) for name, slow in slowness.items()}
    prefill, decode = turns.InterleavedEngines(engines).run(["a", "b"], None, decode_steps=6)
    rounds = [log[start : start + 4] for start in range(0, len(log), 4)]
    assert all(sorted(names) == sorted(engines) for names in rounds)
    assert len({tuple(names) for names in rounds}) > 2  # the order varies
    for name, engine in engines.items():
        assert engine.added == engine.aborted == ["0", "1"]
        assert (len(prefill[name]), len(decode[name]), engine.steps) == (2, 6, 9)
    rows = {row["engine"]: row for row in turns.compare(decode, step="decode")}
    assert list(rows) == ["again", "whole", "ours"]
    assert rows["ours"]["ratio"] == pytest.approx(2, rel=0.3)
    assert rows["again"]["ratio"] == pytest.approx(1, rel=0.2)


def test_an_interval_contains_the_median_and_narrows() -> None:
    assert turns.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert turns.interval([7.0]) == (7.0, 7.0)
    few, many = turns.interval(range(21)), turns.interval(range(401))
    assert few == (5, 15)
    assert many == (180, 220)


class _Counter(_Engine):
    """Every request gets a token in every step."""

    def __init__(self) -> None:
        super().__init__(0, [], "")
        self.missing: dict[str, int] = {}

    def add_request(self, request_id: str, request: Any, params: Any) -> None:
        self.missing[request_id] = params.max_tokens

    def abort_request(self, ids: list[str]) -> None:
        self.missing.clear()

    def get_num_unfinished_requests(self) -> int:
        return sum(number > 0 for number in self.missing.values())

    def step(self) -> None:
        self.missing = {name: number - 1 for name, number in self.missing.items()}


@pytest.mark.parametrize("batch", [[1], [1, 8], [1, 8, 40]])
def test_no_request_ends_before_the_last_step(
    batch: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "vllm_requests", lambda images, number: ["request"] * number)
    options = turns._parser().parse_args(["--images", "1", "--max-images", "64"])
    options.batch, options.decode_steps = batch, 7
    engines = turns.InterleavedEngines({"stock": _Counter(), "ours": _Counter()})
    rows = turns.measure(engines, options)
    decode = [row for row in rows if row["step"] == "decode"]
    assert [row["batch"] for row in decode] == batch
    assert all(row["steps"] == 7 for row in decode)
