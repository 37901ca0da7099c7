# SPDX-License-Identifier: Apache-2.0
"""The stages of the GPU benchmark, and its comparisons on a CPU."""

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
from benchmarks.kernels import ATTENTION_SHAPES, SyntheticPrompt


@pytest.fixture
def run_log(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace `gpu.call` by a stand-in; returns the list of its commands."""
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


def test_continues_with_the_missing_stages(
    tmp_path: Path, run_log: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [one("a", 1), one("b", 8), one("c", 1, "fails"), one("d", 2)]
    assert gpu.run(stages, tmp_path, minutes=4) == ["c"]
    assert [command[2] for command in run_log] == ["works", "fails", "works"]
    assert "b: not enough time, left for the next call" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["a.json", "d.json"]

    run_log.clear()
    assert gpu.run(stages, tmp_path, minutes=20) == ["c"]
    assert [Path(command[-1]).stem for command in run_log] == ["b", "c"]
    assert "a: has a result" in capsys.readouterr().out


def test_every_stage_fits_into_a_call_and_is_a_valid_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(stage.minutes <= 9.5 for stage in gpu.STAGES)
    assert gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(stage.name in listed for stage in gpu.STAGES)
    from benchmarks import kernels, offline, turns
    from benchmarks.serving import __main__ as serving

    modules = (offline, serving, turns)
    parsers = {m.__name__.removesuffix(".__main__"): m._parser for m in modules}
    for stage in gpu.STAGES:
        module, *arguments = stage.command
        if module in parsers:
            parsers[module]().parse_args([*arguments, "--json", "file"])
        else:
            assert module in (agreement.__name__, oracle.__name__, kernels.__name__)


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


def test_a_stage_and_its_children_are_stopped_at_the_time_limit(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    ignores_interrupt = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    )
    code = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {ignores_interrupt!r}])
try:
    pathlib.Path({str(started)!r}).write_text(str(child.pid))
    time.sleep(60)
except KeyboardInterrupt:
    print("cleaned up")
"""
    assert gpu.call([sys.executable, "-c", code], tmp_path / "log", 3.0) == -1
    assert "cleaned up" in (tmp_path / "log").read_text()

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
def test_engines_on_a_cpu_agree(tmp_path: Path) -> None:
    """The code that compares engines on a GPU, with the two engines of a CPU."""
    from testing import tiny_models

    rows = agreement.compare(tiny_models.build("llava", tmp_path / "model", image_size=336))
    assert [row["engine"] for row in rows] == ["torch", "cpp"]
    assert all(row["evictions"] == 6 for row in rows)
    assert rows[1]["least_overlap"] > 0.99


def test_overlap_of_kept_tokens() -> None:
    first = {"kept_positions": [[[1, 2, 3], [4, 5, 6]]]}
    other = {"kept_positions": [[[1, 2, 9], [4, 5, 6]]]}
    assert agreement.overlap(first, first) == 1.0
    assert agreement.overlap(first, other) == pytest.approx(5 / 6)


def by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool = True
) -> torch.Tensor:
    """A substitute for xformers, which has no attention for CPUs."""
    mask = causal_lower_right(query.shape[1], key.shape[1]) if is_causal else None
    parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask)
    return found.transpose(1, 2)


@pytest.mark.parametrize("tokens", [208, 1056])
def test_observe_agrees_with_the_probabilities_of_an_attention(tokens: int) -> None:
    prompt = SyntheticPrompt(ATTENTION_SHAPES["tiny"], tokens, 16, torch.device("cpu"))
    assert oracle.compare(prompt, by_torch)["tokens"] == tokens
    with pytest.raises(AssertionError, match="column_error"):
        oracle.compare(prompt, lambda *tensors: by_torch(*tensors, is_causal=False))
    with pytest.raises(AssertionError, match="nan"):
        oracle.compare(prompt, lambda *tensors: by_torch(*tensors) * torch.nan)


def test_missing_xformers_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(SystemExit, match="pip install --no-deps xformers"):
        oracle.main([])
