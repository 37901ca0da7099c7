# SPDX-License-Identifier: Apache-2.0
"""Two minutes of ``make soak``: mixed load in a small pool, then processes killed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import KVTransferConfig

from checks.soak import __main__ as soak
from testing import lmcache, offloading, tiny_models

pytestmark = pytest.mark.server


def test_soak(models_dir: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llava", models_dir / "llava-112", image_size=112)
    faults = ("worker killed", "engine core killed")
    report = soak.measure(model, tmp_path, minutes=0.5, seed=1, phase_seconds=4.0, faults=faults)
    assert report["failures"] == []
    assert report["counts"]["requests"] > 100
    assert list(report["faults"]) == list(faults)


def test_soak_with_offloading(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts leave the small pool for host memory and come back; copies run late."""
    monkeypatch.setenv("PYTHONPATH", str(Path(offloading.__file__).parents[1]))
    report = soak_with(offloading.config(64 << 20), models_dir, tmp_path)
    assert report["counts"]["requests"] > 100


def test_soak_with_lmcache(models_dir: Path, tmp_path: Path) -> None:
    """Its server lives on when the engine core is killed."""
    with lmcache.running(tmp_path / "lmcache.log") as server:
        report = soak_with(lmcache.config(server.port), models_dir, tmp_path)
        assert server.process.poll() is None
        assert server.count("Stored") and server.count("Retrieved")
    assert report["counts"]["requests"] > 100


def soak_with(transfer: KVTransferConfig, models_dir: Path, logs: Path) -> dict[str, Any]:
    model = tiny_models.build("llava", models_dir / "llava-112", image_size=112)
    names = "kv_connector", "kv_role", "kv_connector_extra_config", "kv_load_failure_policy"
    config = json.dumps({name: dataclasses.asdict(transfer)[name] for name in names})
    report = soak.measure(
        model,
        logs,
        minutes=0.5,
        seed=2,
        phase_seconds=4.0,
        faults=("engine core killed",),
        stock=False,
        more=(f"--kv-transfer-config={config}",),
    )
    assert report["failures"] == []
    return report
