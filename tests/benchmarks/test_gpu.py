# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's stages: what exists is not run again, what does not fit waits."""

import importlib.metadata
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import agreement, oracle
from benchmarks.kernels import SHAPES, Prompt


@pytest.fixture
def run_log(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run, by a stand-in that writes what it is told to."""
    commands: list[list[str]] = []

    def call(command: list[str], log: Path, seconds: float, **how: object) -> int:
        commands.append(command)
        log.touch()
        if "fails" in command:
            return 3
        Path(command[-1]).write_text(json.dumps({"command": " ".join(command)}))
        return 0

    monkeypatch.setattr(gpu, "call", call)
    return commands


def one(name: str, minutes: float, command: str = "works") -> gpu.Stage:
    return gpu.Stage(name, "something", minutes, (command,))


def test_goes_on_where_it_stopped(
    tmp_path: Path, run_log: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [one("a", 1), one("b", 8), one("c", 1, "fails"), one("d", 2)]
    assert gpu.run(stages, tmp_path, minutes=4) == ["c"]
    assert [command[2] for command in run_log] == ["works", "fails", "works"]
    assert "b: left for the next call" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["a.json", "d.json"]

    run_log.clear()
    assert gpu.run(stages, tmp_path, minutes=20) == ["c"]
    assert [Path(command[-1]).stem for command in run_log] == ["b", "c"]
    assert "a: done before" in capsys.readouterr().out


def test_every_stage_fits_into_a_call_and_is_a_command_of_ours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(stage.minutes <= 9.5 for stage in gpu.STAGES)
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(stage.name in listed for stage in gpu.STAGES)
    from benchmarks import kernels, offline, turns
    from benchmarks.serving import __main__ as serving

    parsers = {module.__name__: module._parser for module in (offline, serving, turns)}
    for stage in gpu.STAGES:
        module, *arguments = stage.command
        if module in parsers:
            parsers[module]().parse_args([*arguments, "--json", "file"])
        else:
            assert module in (agreement.__name__, oracle.__name__, kernels.__name__)


def test_a_tree_becomes_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.distributions
    assert gpu.install(tmp_path / "unused") == [str(gpu.ROOT)]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **query: iter(()))
    folders = gpu.install(tmp_path)
    assert folders == [str(tmp_path), str(gpu.ROOT)]
    (found,) = installed(path=[str(tmp_path)])
    names = {point.name for point in found.entry_points}
    assert {"vl_cache", "vlcache-plus", "random"} <= names
    code = "import vl_cache_vllm.kernels as k; print(k.__file__)"
    said = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": folders[0]},
        cwd=tmp_path,
        capture_output=True,
    )
    assert said.stdout.decode().strip().startswith(str(tmp_path))


def test_past_its_time_a_stage_and_what_it_started_are_stopped(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {deaf!r}])
try:
    pathlib.Path({str(started)!r}).write_text(str(child.pid))
    time.sleep(60)
except KeyboardInterrupt:
    print("tidied up")
"""
    assert gpu.call([sys.executable, "-c", code], tmp_path / "log", 3.0) == -1
    assert "tidied up" in (tmp_path / "log").read_text()

    def is_alive() -> bool:
        try:
            state = (Path("/proc") / started.read_text() / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state.rpartition(")")[2].split()[0] not in "ZX"

    deadline = time.monotonic() + 10
    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive()


@pytest.mark.slow
def test_engines_of_a_cpu_agree(tmp_path: Path) -> None:
    """With each other: the same code as on a GPU, where it has more to compare."""
    from testing import tiny_models

    rows = agreement.compare(tiny_models.build("llava", tmp_path / "model", image_size=336))
    assert [row["engine"] for row in rows] == ["torch", "cpp"]
    assert all(row["evictions"] == 6 for row in rows)
    assert rows[1]["least_overlap"] > 0.99


def test_what_two_engines_keep_in_common() -> None:
    first = {"kept_positions": [[[1, 2, 3], [4, 5, 6]]]}
    other = {"kept_positions": [[[1, 2, 9], [4, 5, 6]]]}
    assert agreement.overlap(first, first) == 1.0
    assert agreement.overlap(first, other) == pytest.approx(5 / 6)


def by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = True
) -> torch.Tensor:
    """In the place of xformers, which has no attention on CPUs."""
    mask = causal_lower_right(query.shape[1], key.shape[1]) if is_causal else None
    parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
    return found.transpose(1, 2)


@pytest.mark.parametrize("tokens", [208, 1056])
def test_observation_is_what_an_attention_says_of_itself(tokens: int) -> None:
    prompt = Prompt(SHAPES["tiny"], tokens, 16, torch.device("cpu"))
    assert oracle.compare(prompt, by_torch)["tokens"] == tokens
    with pytest.raises(AssertionError, match="column_error"):
        oracle.compare(prompt, lambda *tensors: by_torch(*tensors, is_causal=False))
    with pytest.raises(AssertionError, match="nan"):
        oracle.compare(prompt, lambda *tensors: by_torch(*tensors) * torch.nan)


def test_says_that_xformers_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(SystemExit, match="pip install --no-deps xformers"):
        oracle.main([])
