# SPDX-License-Identifier: Apache-2.0
"""The README's tables of the smoke test and the overhead are what was measured."""

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


def test_smoke() -> None:
    both = [results("smoke")[side] for side in ("stock", "ours")]
    for name, key, form in (
        ("output tokens per second", "output_tokens_per_second", "{:.0f}"),
        ("median step", "step_milliseconds_median", "{:.1f} ms"),
        ("mean sequences decoding at once", "mean_decoding_sequences", "{}"),
    ):
        cells = " | ".join(form.format(side[key]) for side in both)
        assert f"| {name} | {cells} |" in README
