# SPDX-License-Identifier: Apache-2.0
"""The measurement of host time runs requests that are evicted, and reports every part."""

from pathlib import Path

import pytest

from benchmarks import host_time, shape


def test_every_part_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_time, "STEPS", 3)
    settings = host_time.eviction_settings("always", None)
    rows = host_time.measure(shape.build(tmp_path), settings, running=2)
    assert {(row["part"], row["changed"]) for row in rows} == {
        ("worker", False),
        ("worker", True),
        ("scheduler", False),
        ("scheduler", True),
        ("admission", False),
    }
    assert all(row["baseline_us"] > 0 for row in rows if row["part"] != "worker")
    assert all(row["overhead_us"] > 0 for row in rows if row["part"] == "worker")
