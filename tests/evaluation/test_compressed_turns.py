# SPDX-License-Identifier: Apache-2.0
"""The study of compressed turns, and what its decision says of the results."""

import json
from pathlib import Path

from evaluation import compressed_turns

ROOT = Path(__file__).parents[2]


def test_the_decision_has_the_committed_numbers() -> None:
    rows = json.loads((ROOT / "benchmarks/results/compressed-turns.json").read_text())["rows"]
    text = (ROOT / "docs/adr/0027-compressed-turns.md").read_text()
    right = {
        (row["bench"], row["way"]): 100 * round(row["right"] * row["counted"]) / row["counted"]
        for row in rows
    }
    for way in ("compressed", "evicted anew"):
        for budget in compressed_turns.BUDGETS:
            values = (right[bench, f"{way} {budget}"] for bench in compressed_turns.TASKS)
            numbers = " | ".join(f"{value:.1f}" for value in values)
            assert f"| {way}, {budget:.0%} | {numbers} |" in text


def test_a_second_question_about_what_the_first_one_dropped() -> None:
    rows = {row["way"]: row for row in compressed_turns.measure("page-reader", 6)}
    assert rows["full"]["right"] == 1.0 and rows["full"]["counted"] >= 3
    assert rows["compressed 0.1"]["right_tokens"] < rows["evicted anew 0.1"]["right_tokens"]
