# SPDX-License-Identifier: Apache-2.0
"""The benchmark of KV connectors, and what the documents say of its results."""

import json
from pathlib import Path

import pytest

from benchmarks import connectors

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_committed_numbers() -> None:
    report = json.loads((ROOT / "benchmarks/results/connectors.json").read_text())
    text = (ROOT / "docs/deployment.md").read_text()
    assert [row["way"] for row in report["rows"]] == list(connectors.WAYS)
    for row in report["rows"]:
        assert f"| {row['way']} | {row['ms']:.0f} ms |" in text
        assert f"{row['prompt_tokens']:,} tokens" in text


@pytest.mark.slow
def test_small(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    connectors.main(["--documents", "2", "--json", str(path)])
    cached = {row["way"]: row["cached_tokens"] for row in json.loads(path.read_text())["rows"]}
    assert cached.pop("new prefill") == 0
    assert cached == dict.fromkeys(cached, 1600)
