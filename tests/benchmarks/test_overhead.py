# SPDX-License-Identifier: Apache-2.0
"""The README's table of the overhead is what was measured."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_overhead() -> None:
    rows = results("overhead")["rows"]
    assert {row["step"] for row in rows} == {"prefill", "decode"}
    for row in rows:
        share = row["own_milliseconds"] / row["milliseconds"]
        line = (
            f"| {row['step']} | {row['visual_tokens']:,} | {row['batch']} "
            f"| {row['milliseconds']:.1f} | {row['own_milliseconds']:.2f} | {100 * share:.1f} % |"
        )
        assert line in README
