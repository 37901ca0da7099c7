# SPDX-License-Identifier: Apache-2.0
"""The load ramp: its arrivals, and a short one."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import load_ramp


def test_arrivals_follow_the_rates() -> None:
    times = load_ramp.arrivals([1.0, 20.0, 1.0], [100, 100, 100])
    assert times == sorted(times) == load_ramp.arrivals([1.0, 20.0, 1.0], [100, 100, 100])
    counts = [sum(begin <= when < begin + 100 for when in times) for begin in (0, 100, 200)]
    assert sum(counts) == len(times)
    assert 70 < counts[0] < 130 and 1800 < counts[1] < 2200 and 70 < counts[2] < 130


@pytest.mark.slow
def test_a_short_ramp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers depend on the machine's speed, their order does not."""
    out = tmp_path / "ramp.json"
    options = ["--rates", "4", "40", "--seconds", "0.5", "0.2", "--output-len", "40"]
    load_ramp.main([*options, "--json", str(out), "--arms", "always", "pressure"])
    results = json.loads(out.read_text())["results"]
    requests = {name: result["requests"] for name, result in results.items()}
    assert len(requests["always"]) == len(requests["pressure"]) > 5
    assert not any(row["kept_all"] for row in requests["always"])
    assert not all(row["kept_all"] for row in requests["pressure"])
    for rows in requests.values():
        assert all(0 < row["ttft"] <= row["latency"] for row in rows)
    assert all(result["samples"] for result in results.values())
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size[0] > 500
    assert "| pressure | 40 |" in capsys.readouterr().out
