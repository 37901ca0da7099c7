# SPDX-License-Identifier: Apache-2.0
"""The benchmark of draft models, and what the documents say of its results."""

import json
from pathlib import Path

import pytest

from evaluation import drafts

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_committed_numbers() -> None:
    rows = json.loads((ROOT / "benchmarks/results/drafts.json").read_text())["rows"]
    text = (ROOT / "docs/deployment.md").read_text()
    assert len(rows) == 1 + (len(drafts.CACHES) - 1) * len(drafts.BUDGETS)
    for row in rows:
        name = row["cache"] + (f", {row['budget']:.0%}" if row["budget"] else "")
        numbers = f"{100 * row['accepted']:.1f} | {row['tokens_per_step']:.2f} | {row['steps']:,}"
        assert f"| {name} | {numbers} | {100 * row['score']:.1f} |" in text
    full = f"{100 * rows[0]['accepted']:.1f}%"
    assert full in (ROOT / "docs/adr/0026-draft-models.md").read_text()
    assert full in (drafts.EAGLE3 / "README.md").read_text()


@pytest.mark.slow
def test_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "CACHES", {"plus": {"policy": "vlcache-plus", "evict_after": 0}})
    monkeypatch.setattr(drafts, "BUDGETS", (0.2,))
    path = tmp_path / "out.json"
    drafts.main(["--samples", "2", "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert row["answers"] == row["evicted"] == 4
    assert row["accepted"] > 0.5 and row["tokens_per_step"] > 2
