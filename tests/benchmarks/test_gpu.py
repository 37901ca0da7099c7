# SPDX-License-Identifier: Apache-2.0
"""The calls of the GPU benchmark: what they run, what they leave, and their comparisons."""

import dataclasses
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import agreement, caches, fast, report, right, why
from benchmarks.gpu.step import Step
from vl_cache_vllm.self_check.engines import EngineRun
from vl_cache_vllm.self_check.engines import Step as Token
from vl_cache_vllm.self_check.model import ModelSize
from vl_cache_vllm.self_check.record import FOLDER

ALL = (*right.STEPS, *fast.STEPS, *why.STEPS)


def works(number: int = 1) -> dict[str, Any]:
    report.say(f"number {number}")
    return {"number": number}


def finds() -> dict[str, Any]:
    return {"failing": ["a row"]}


def raises() -> dict[str, Any]:
    raise ValueError("the reason")


def hangs() -> dict[str, Any]:
    time.sleep(120)
    return {}


def in_parent(seconds: float) -> dict[str, Any]:
    return {"seconds_given": seconds}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(report.LOG, str(tmp_path / "log"))
    return tmp_path / "log"


def test_no_step_stops_the_next(tmp_path: Path, log: Path) -> None:
    steps = [
        Step("one", "?", 30, works, {"number": 7}),
        Step("two", "?", 30, raises),
        Step("three", "?", 1, hangs),
        Step("four", "?", 30, finds),
        Step("five", "?", 30, in_parent, isolated=False),
        Step("six", "?", 1000, works),
        Step("seven", "?", 30, works),
    ]
    assert gpu.run("right", steps, tmp_path, seconds=60) == ["two", "three", "four"]
    found = json.loads((tmp_path / "right.json").read_text())["steps"]
    assert [*found] == [step.name for step in steps]
    assert found["one"]["number"] == 7
    assert "the reason" in found["two"]["error"]
    assert "hangs (test_gpu.py" in found["three"]["error"]
    assert found["five"]["seconds_given"] <= 30
    assert "skipped" in found["six"]
    assert found["seven"]["number"] == 1
    text = log.read_text()
    assert "number 7" in text and "two: FAILED" in text
    assert {path.name for path in tmp_path.iterdir()} == {"log", "right.json"}


def test_results_are_written_after_every_step(tmp_path: Path, log: Path) -> None:
    seen = []

    def look(seconds: float) -> dict[str, Any]:
        seen.append([*json.loads((tmp_path / "fast.json").read_text())["steps"]])
        return {}

    steps = [
        Step("one", "?", 30, works),
        Step("two", "?", 30, look, isolated=False),
        Step("three", "?", 30, look, isolated=False),
    ]
    assert gpu.run("fast", steps, tmp_path, seconds=100) == []
    assert seen == [["one"], ["one", "two"]]


def test_the_calls_fit_together() -> None:
    """Two machines to start at 90 s, and 10 s to hand over, in 15 minutes."""
    assert sum(gpu.SECONDS.values()) + 2 * 90 + 10 <= 15 * 60
    assert gpu.steps().keys() == gpu.SECONDS.keys()
    assert len({step.name for step in ALL}) == len(ALL)
    assert [step.name for step in right.STEPS[:2]] == ["machine", "check"]
    for call, steps in gpu.steps().items():
        assert all(step.seconds <= gpu.SECONDS[call] for step in steps)


def test_at_most_eight_files_come_back(tmp_path: Path) -> None:
    assert 3 + caches.MAX_PARTS <= 8  # with a file of the caller's
    assert caches.PART_BYTES < 16 << 20
    assert caches.MAX_PARTS * caches.PART_BYTES + (1 << 20) < 78 << 20


def test_caches_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "PART_BYTES", 1000)
    monkeypatch.setattr(caches, "MAX_PARTS", 60)
    monkeypatch.setattr(caches, "MAX_FILE_BYTES", 40_000)
    first, out, second = tmp_path / "first", tmp_path / "out", tmp_path / "second"
    out.mkdir()
    for name, folder in caches.folders(first).items():
        (folder / "a").mkdir(parents=True)
        (folder / "a" / "code").write_bytes(os.urandom(5000) + name.encode())
    (first / "triton" / "huge").write_bytes(bytes(50_000))
    assert caches.pack(first, out) > 0.01
    assert len([*out.iterdir()]) > 10
    assert caches.unpack(out, second) > 0.01
    for name, folder in caches.folders(second).items():
        assert (folder / "a" / "code").read_bytes().endswith(name.encode())
    assert not (second / "triton" / "huge").exists()
    assert caches.unpack(tmp_path, second) == 0

    monkeypatch.setattr(caches, "MAX_PARTS", 2)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert caches.pack(first, empty) == 0
    assert not [*empty.iterdir()]


def test_a_call_as_a_command(tmp_path: Path) -> None:
    """From a source tree that is not installed, with caches, on a machine without a GPU."""
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT), report.LOG: "", "VLLM_PLUGINS": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "why", "--out", str(out)]
    done = subprocess.run(
        [*command, "--seconds", "60", "--steps", "memcheck", "kernels"],
        env=environment,
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
    )
    found = json.loads((out / "why.json").read_text())["steps"]
    assert found["memcheck"]["skipped"] == "no compute-sanitizer"
    assert "error" in found["kernels"]  # there is no GPU
    assert done.returncode == 1, done.stderr
    assert "why: failed: kernels" in done.stdout
    assert done.stdout.replace("\n", "") in (out / "why.log").read_text().replace("\n", "")
    assert {path.name for path in out.iterdir()} <= {"why.json", "why.log", "caches.tar.xz.00"}


def test_unknown_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(gpu.PREPARED, str(tmp_path))
    with pytest.raises(SystemExit):
        gpu.main(["why", "--steps", "nothing"])
    assert "unknown steps: nothing" in capsys.readouterr().err


def test_steps_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for call, steps in gpu.steps().items():
        assert gpu.main([call, "--list"]) == 0
        listed = capsys.readouterr().out
        assert [line.split()[0] for line in listed.splitlines()] == [s.name for s in steps]


def test_arguments_of_the_steps_are_valid() -> None:
    import inspect

    for step in ALL:
        extra = {} if step.isolated else {"seconds": 1.0}
        inspect.signature(step.function).bind(**step.arguments, **extra)
    for shape, tokens, queries in right.KERNEL_CELLS:
        assert shape in right.PARAMETERS
        assert max(queries) <= tokens
    fast._options("--images", "2", "8", "--batch", "1", "8")


def test_a_source_tree_is_assembled_like_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.metadata.distributions
    assert gpu.install(tmp_path / "unused") == [str(gpu.ROOT)]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **query: iter(()))
    folders = gpu.install(tmp_path)
    assert folders == [str(tmp_path), str(gpu.ROOT)]
    (found,) = installed(path=[str(tmp_path)])
    names = {point.name for point in found.entry_points}
    assert {"vl_cache", "vlcache-plus", "random"} <= names
    code = "import vl_cache_vllm.kernels as k; print(k.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": folders[0]},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.stdout.decode().strip().startswith(str(tmp_path))


def test_caches_hold_the_record_of_the_check(tmp_path: Path) -> None:
    environment = {**os.environ, **{k: str(v) for k, v in caches.folders(tmp_path).items()}}
    code = "from vl_cache_vllm.self_check import record; print(record.path_of({}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path / "vllm" / FOLDER)), done.stderr


# --------------------------------------------------------------------------------------------------
# Engines under a hostile load

LOAD = agreement.Load(
    ModelSize(num_layers=2, num_heads=4, head_size=32, image_size=112),
    "float32",
    long_images=4,
    num_short=7,
    output_len=30,
    pool_tokens=768,
)


@pytest.mark.slow
def test_engines_agree_under_a_hostile_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a GPU with the two engines of a CPU."""
    pair = [
        (dataclasses.replace(one, operations=name), False)
        for (one, _), name in zip(agreement.setups(), ("torch", "cpp"), strict=True)
    ]
    monkeypatch.setattr(agreement, "setups", lambda: pair)
    found = agreement.measure(LOAD)
    assert found["failing"] == []
    assert all(row["evicted"] >= 3 for row in found["rows"])
    assert all(row["preemptions"] > 0 for row in found["rows"])
    assert found["rows"][1]["tokens_moved"] < 0.01


def an_engine(
    layers: tuple[int, ...] = (32, 64), shift: float = 0.0, **changed: Any
) -> tuple[EngineRun, dict[str, Any]]:
    kept = {0: [[[*range(count)] for _ in range(2)] for count in layers]}
    outputs = [[Token(5, {5: -0.1 + shift, 6: -3.0})] for _ in range(7)]
    row = {"engine": "E", "outputs": 7, "numbers_missing": 0, "preemptions": 1}
    return EngineRun(kept, outputs, [], math.nan, 0), row | changed


def test_one_moved_page_is_no_difference() -> None:
    rows = [an_engine(), an_engine((64, 32))]
    assert agreement.judge(rows, LOAD) == []
    assert rows[1][1]["pages_moved"] == 1


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (an_engine((96, 0)), "E: kept other tokens"),
        (an_engine(shift=-0.5), "E: other outputs"),
        (an_engine(outputs=6), "E: 6 outputs"),
        (an_engine(numbers_missing=1), "E: log-probabilities that are no number"),
    ],
    ids=["pages", "outputs", "missing", "nan"],
)
def test_a_difference_is_found(found: Any, problem: str) -> None:
    assert agreement.judge([an_engine(), found], LOAD) == [problem]


def test_all_differences_are_named() -> None:
    rows = [an_engine(preemptions=0), an_engine((128, 32)), an_engine(shift=-0.5)]
    assert len(agreement.judge(rows, LOAD)) == 3


def test_an_engine_without_a_trace_is_compared_by_its_outputs() -> None:
    quiet = (dataclasses.replace(an_engine(shift=-0.5)[0], kept={}), an_engine()[1])
    assert agreement.judge([an_engine(), quiet], LOAD) == ["E: other outputs"]
