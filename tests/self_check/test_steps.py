# SPDX-License-Identifier: Apache-2.0
"""Steps in processes of their own: whatever happens in one, the next one runs."""

import os
import signal
import time
from pathlib import Path

import pytest

from vl_cache_vllm.self_check import steps
from vl_cache_vllm.self_check.steps import StepError, run_step


def double(number: int) -> int:
    return 2 * number


def fail() -> None:
    raise KeyError("the reason")


def leave() -> None:
    raise SystemExit("an engine gave up")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(pid_file: Path) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(120)
    pid_file.write_text(str(child))
    time.sleep(120)


def large() -> bytes:
    return b"x" * (8 << 20)


@pytest.fixture(params=[True, False], ids=["forked", "spawned"])
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(steps, "forks_can_use_cuda", lambda: request.param)
    return request.param


def test_results(forked: bool) -> None:
    assert run_step(double, 21, seconds=60) == 42
    assert len(run_step(large, seconds=60)) == 8 << 20


def test_a_step_that_raises_says_why() -> None:
    with pytest.raises(StepError, match="KeyError: 'the reason'"):
        run_step(fail, seconds=60)
    with pytest.raises(StepError, match="an engine gave up"):
        run_step(leave, seconds=60)


def test_a_step_that_crashes_says_how() -> None:
    with pytest.raises(StepError, match="SIGKILL"):
        run_step(crash, seconds=60)


def test_a_step_and_its_children_end_at_the_time_limit(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pytest.raises(StepError, match=r"time limit of 1 s in .*hang \(test_steps.py:\d+\)"):
        run_step(hang, pid_file, seconds=1)

    def is_alive() -> bool:
        try:
            state = (Path("/proc") / pid_file.read_text() / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False
        return state.rpartition(")")[2].split()[0] not in "ZX"

    deadline = time.monotonic() + 10
    while is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive()
    assert run_step(double, 1, seconds=60) == 2


def test_a_context_of_cuda_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps.forks_can_use_cuda()
    monkeypatch.setattr(os, "readlink", lambda path: "/dev/nvidia-uvm")
    assert not steps.forks_can_use_cuda()


def test_torch_is_asked_in_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert not steps.forks_can_use_cuda()
