# SPDX-License-Identifier: Apache-2.0
"""The benchmark of long outputs, with a few short ones."""

import json
from pathlib import Path

import pytest

from benchmarks import long_outputs


@pytest.mark.slow
def test_bounded_outputs_hold_fewer_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "long.json"
    arms = ["stock", "pressure-every"]
    options = ["--output-len", "100", "--requests", "5", "--every", "32"]
    long_outputs.main([*options, "--json", str(out), "--arms", *arms])
    report = json.loads(out.read_text())
    (stock,), (ours,) = (report["results"][arm] for arm in arms)
    assert stock["output_len"] == ours["output_len"] == 100
    assert stock["pool_blocks"] == ours["pool_blocks"]
    assert "evictions" not in stock
    assert ours["evictions"]["prefill"] == 5
    assert ours["evictions"]["every"] >= 5
    assert ours["running"] > stock["running"]
    assert ours["step_p50_ms"] > 0 and ours["eviction_step_p50_ms"] > 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].startswith("| output tokens | engine |")
    assert table[3].startswith("| 100 | pressure-every |")
