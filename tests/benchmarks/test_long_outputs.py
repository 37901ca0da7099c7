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
    long_outputs.main(
        ["--output-len", "100", "--requests", "5", "--every", "32", "--json", str(out), "--arms"]
        + arms
    )
    report = json.loads(out.read_text())
    (stock,), (ours,) = (report["results"][arm] for arm in arms)
    assert stock["output_len"] == ours["output_len"] == 100
    assert stock["pool_blocks"] == ours["pool_blocks"]
    assert "evictions" not in stock
    assert ours["evictions"]["prefill"] == 5
    assert ours["evictions"]["every"] >= 5
    assert ours["running"] > stock["running"]
    assert 0 < ours["step_p50_ms"] and 0 < ours["eviction_step_p50_ms"]
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].startswith("| output tokens | engine |")
    assert table[3].startswith("| 100 | pressure-every |")
