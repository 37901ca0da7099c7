# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a model with linear attention, and what the documents say of its results."""

import json
from pathlib import Path

import pytest

from benchmarks import linear_attention

ROOT = Path(__file__).parents[2]


def test_the_document_has_the_committed_numbers() -> None:
    report = json.loads((ROOT / "benchmarks/results/linear-attention.json").read_text())
    single, (stock, ours) = report["one_request"], report["rows"]
    text = (ROOT / "docs/models.md").read_text()
    assert f"a prompt of {single['prompt_tokens']:,} tokens with 60 images" in text
    assert f"holds {sum(single['before'])} blocks of {single['block_size']} tokens" in text
    assert f"and {sum(single['after'])} after its eviction" in text
    assert f"a mean of {ours['mean_running']:.1f} requests ran at once" in text
    assert f"instead of {stock['mean_running']:.1f} (at most {ours['most_running']}" in text
    assert f"instead of {stock['most_running']})" in text


@pytest.mark.slow
def test_small(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    linear_attention.main(["--images", "6", "--requests", "4", "--json", str(path)])
    report = json.loads(path.read_text())
    single = report["one_request"]
    assert single["block_size"] == 544
    assert len(single["before"]) == len(single["after"]) == 4
    # Of one whole block or more the full attention keeps one, and what stands behind them.
    assert single["after"][-1] == 2
    assert [row["engine"] for row in report["rows"]] == ["stock", "ours"]
