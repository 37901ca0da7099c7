# SPDX-License-Identifier: Apache-2.0
"""Records: a passing one of exactly this combination lets KV compression start."""

import types
from pathlib import Path
from typing import Any

import pytest
import vllm.platforms

from vl_cache_vllm import support
from vl_cache_vllm.self_check import record


class Platform:
    """Two kinds of GPUs, as vLLM's platform tells of them."""

    names = ("H100", "H100")

    def device_count(self) -> int:
        return len(self.names)

    def get_device_name(self, device: int = 0) -> str:
        return self.names[device]

    def is_cuda(self) -> bool:
        return True

    def has_device_capability(self, capability: int) -> bool:
        return capability <= 90


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Platform:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(record, "driver_version", lambda: "580.1")
    platform = Platform()
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    return platform


def test_nothing_is_recorded_at_first(platform: Platform) -> None:
    reason = record.missing_check()
    assert reason is not None and "H100" in reason
    assert "run vl-cache-check once" in reason


def test_a_passing_record_is_enough(platform: Platform, tmp_path: Path) -> None:
    path = record.write(record.combination(), [], seconds={"operations": 1.0})
    assert path.parent == tmp_path / "cache" / record.FOLDER
    assert path.stat().st_mode & 0o044 == 0o044
    assert record.missing_check() is None
    found = record.read(record.combination())
    assert found is not None and found["seconds"] == {"operations": 1.0}
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_failing_record_names_its_rows(platform: Platform) -> None:
    record.write(record.combination(), ["select", "compact"])
    reason = record.missing_check()
    assert reason is not None and "failing: select, compact" in reason
    assert not record.has_passed(record.combination())


@pytest.mark.parametrize("key", ["gpu", "driver", "cuda", "torch", "triton", "vllm", "source"])
def test_every_part_of_the_combination_counts(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    record.write(record.combination(), [])
    changed = {**record.combination(), key: "another"}
    assert record.read(changed) is None
    monkeypatch.setattr(record, "combination", lambda device=0: changed)
    assert record.missing_check() is not None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"combination": {}, "passed": true}'])
def test_a_damaged_record_is_none(platform: Platform, text: str) -> None:
    path = record.write(record.combination(), [])
    path.write_text(text)
    assert record.read(record.combination()) is None
    assert record.missing_check() is not None


def test_a_record_under_anothers_name_is_none(platform: Platform) -> None:
    path = record.write(record.combination(), [])
    other = {**record.combination(), "driver": "1"}
    path.rename(record.path_of(other))
    assert record.read(other) is None


def test_every_kind_of_gpu_needs_a_record(platform: Platform) -> None:
    platform.names = ("H100", "L40S", "L40S")
    record.write(record.combination(0), [])
    reason = record.missing_check()
    assert reason is not None and "CUDA_VISIBLE_DEVICES=1 vl-cache-check" in reason
    record.write(record.combination(1), [])
    assert record.missing_check() is None


def test_the_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "package" / "self_check" / "record.py"
    kernel = tmp_path / "package" / "kernels" / "one.py"
    for path in (module, kernel):
        path.parent.mkdir(parents=True)
        path.write_text("a = 1\n")
    monkeypatch.setattr(record, "__file__", str(module))
    before = record.source_digest()
    assert record.source_digest() == before
    kernel.write_text("a = 2\n")
    assert record.source_digest() != before


def gpu_reasons() -> list[str]:
    """Of a configuration that only the check can refuse."""
    attention = types.SimpleNamespace(backend_per_kind={}, backend=None)
    config: Any = types.SimpleNamespace(
        attention_config=attention,
        cache_config=types.SimpleNamespace(cache_dtype="auto"),
        use_v2_model_runner=True,
        model_config=types.SimpleNamespace(is_mm_prefix_lm=False, is_hybrid=False, use_mla=False),
    )
    return support._gpu_reasons(config)


def test_start_up(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(support.TRY_GPU, raising=False)
    (reason,) = gpu_reasons()
    assert "vl-cache-check" in reason
    monkeypatch.setenv(support.TRY_GPU, "1")
    assert gpu_reasons() == []
    monkeypatch.delenv(support.TRY_GPU)
    record.write(record.combination(), [])
    assert gpu_reasons() == []


def test_other_vendors_are_refused(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(support.TRY_GPU, raising=False)
    monkeypatch.setattr(platform, "is_cuda", lambda: False)
    assert gpu_reasons() == ["GPUs that are not NVIDIA's"]
