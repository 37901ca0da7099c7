# SPDX-License-Identifier: Apache-2.0
"""Two minutes of ``make soak``: mixed load in a small pool, then processes killed."""

from pathlib import Path

import pytest

from checks.soak import __main__ as soak
from testing import tiny_models

pytestmark = pytest.mark.server


def test_soak(models_dir: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llava", models_dir / "llava-112", image_size=112)
    faults = ("worker killed", "engine core killed")
    report = soak.measure(model, tmp_path, minutes=0.5, seed=1, phase_seconds=4.0, faults=faults)
    assert report["failures"] == []
    assert report["counts"]["requests"] > 100
    assert list(report["faults"]) == list(faults)
