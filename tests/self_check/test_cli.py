# SPDX-License-Identifier: Apache-2.0
"""The command: what it runs, prints, records and returns."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm.platforms

from tests.self_check.test_record import Platform
from vl_cache_vllm.self_check import cli, engines, record, steps
from vl_cache_vllm.self_check.operations import Time
from vl_cache_vllm.self_check.rows import Row, broken, failing

GOOD, BAD = Row("select", "a case", 0.0, 0.0), Row("compact", "a case", 3.0, 0.0)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(record, "driver_version", lambda: "580.1")
    monkeypatch.setattr(cli, "set_environment", lambda: None)
    monkeypatch.setattr(vllm.platforms, "current_platform", Platform())
    return vllm.platforms.current_platform


def finding(monkeypatch: pytest.MonkeyPatch, *rows: Row) -> list[int]:
    """Let the check find these rows; returns a list that grows with each check."""
    calls: list[int] = []

    def check(report: Callable[[str], Any]) -> cli.Result:
        calls.append(1)
        return cli.Result([*rows], [], {"operations": 2.0})

    monkeypatch.setattr(cli, "check", check)
    return calls


def test_a_check_that_passes(
    gpu: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = finding(monkeypatch, GOOD)
    assert cli.main([]) == 0
    assert record.missing_check() is None
    out = capsys.readouterr().out
    assert "1 of 1 rows pass" in out and "H100" in out
    assert str(record.path_of(record.combination())) in out
    assert cli.main(["--if-needed"]) == 0
    assert len(calls) == 1
    assert cli.main([]) == 0
    assert len(calls) == 2


def test_a_check_that_fails(
    gpu: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = finding(monkeypatch, GOOD, BAD)
    assert cli.main([]) == 1
    out = capsys.readouterr().out
    assert "1 of 2 rows pass" in out
    assert "FAIL  compact" in out and "pass  select" not in out
    reason = record.missing_check()
    assert reason is not None and "failing: compact" in reason
    assert cli.main(["--if-needed"]) == 1  # a failed record asks for another check
    assert len(calls) == 2


def test_a_check_without_rows_fails(gpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    finding(monkeypatch)
    assert cli.main([]) == 1


def test_a_record_that_cannot_be_written_fails(
    gpu: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding(monkeypatch, GOOD)
    (tmp_path / record.FOLDER).write_text("not a folder")
    assert cli.main([]) == 1


def test_without_a_gpu(
    gpu: Platform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "is_cuda", lambda: False)
    assert cli.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


def test_every_step_runs(gpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine crashes; the others run and are compared."""
    monkeypatch.setattr(engines, "supported_backends", lambda: ["FLASH_ATTN", "TRITON_ATTN"])
    monkeypatch.setattr(cli, "_preload", lambda: None)
    started: list[Any] = []

    def run_step(function: Callable[..., Any], *args: Any, seconds: float) -> Any:
        assert seconds > 0
        started.append(args[0] if args else function.__name__)
        if function is cli._compare_operations:
            return [GOOD]
        if function is cli._times:
            return [Time("observe", "a case", 1.0, 0.5)]
        if args[0] == engines.EngineSetup("FLASH_ATTN"):
            raise steps.StepError("its process ended with signal SIGABRT")
        evicts = {number: [[[1, 2]]] for number in range(engines.NUM_EVICTED)}
        error = math.nan if args[0].graphs else 0.001
        return engines.EngineRun(evicts if args[0].evicts else {}, [], [], error, 4)

    monkeypatch.setattr(steps, "run_step", run_step)
    lines: list[str] = []
    result = cli.check(lines.append)
    assert [*failing(result.rows)] == [
        broken("engine", "FLASH_ATTN, eager", "StepError: its process ended with signal SIGABRT")
    ]
    assert len(started) == 11  # operations, 9 engines, times
    assert {row.case for row in result.rows} >= {"TRITON_ATTN, graphs", "FLASH_ATTN, graphs"}
    assert "observe" in lines[-1] and "0.500 ms bound" in lines[-1]
    described = cli.describe(result)
    assert described["rows"][0]["passed"] is True
    assert described["times"][0]["bound_milliseconds"] == 0.5
    assert {"operations", "FLASH_ATTN, eager", "times"} <= described["seconds"].keys()

    started.clear()
    result = cli.check(lines.append, seconds=0.5)
    assert sum(row.note == "no time is left" for row in failing(result.rows)) == 9
    assert len(started) == 2


def test_a_gpu_without_backends_fails(gpu: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[str]:
        raise RuntimeError("no driver")

    monkeypatch.setattr(steps, "run_step", lambda function, *args, seconds: [])
    for backends in (none, list):
        monkeypatch.setattr(engines, "supported_backends", backends)
        result = cli.check(lambda line: None)
        assert [row.name for row in failing(result.rows)] == ["attention backends"]
