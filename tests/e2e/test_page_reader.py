# SPDX-License-Identifier: Apache-2.0
"""The shipped page reader, through vLLM: stock, and with a tenth of the cache."""

import argparse

import pytest

from benchmarks import accuracy
from benchmarks.cases import page_reader_cases

CASES = 50
MAX_BYTES = 16 << 20


def options(**changes: object) -> argparse.Namespace:
    parsed = accuracy._parser().parse_args(["--quiet"])
    return argparse.Namespace(**{**vars(parsed), **changes})


def test_size() -> None:
    files = [f for f in accuracy.MODEL.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= MAX_BYTES
    names = {f.name for f in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "chat_template.jinja" in names


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stock_vllm_answers_held_out_lookups(dtype: str) -> None:
    cases = page_reader_cases("test", ["lookup"], CASES)
    cells = accuracy.run(str(accuracy.MODEL), cases, None, options(dtype=dtype))
    score = cells["lookup"].summary()
    assert score["samples"] == CASES
    assert score["score"] >= 0.97
    assert score["retained"] == 1.0


def test_a_tenth_of_the_cache() -> None:
    """Budgets, kept shares and the order of policies, as the benchmark reports them."""
    cases = page_reader_cases("test", ["lookup"], 24)
    found = {}
    for policy in ("vlcache-plus", "random"):
        settings = accuracy.parse_policy(policy) | {"budget": 0.1}
        found[policy] = accuracy.run(str(accuracy.MODEL), cases, settings, options())[
            "lookup"
        ].summary()
        # 10 % of 13 to 52 blocks, rounded up to whole ones.
        assert 0.1 <= found[policy]["retained"] <= 2 / 13
        assert 0.0 <= found[policy]["kept_answer"] <= found[policy]["reached_answer"] <= 1.0
    ours, floor = found["vlcache-plus"], found["random"]
    assert ours["score"] >= 0.9
    assert ours["score"] > floor["score"] + 0.3
    assert ours["kept_answer"] > floor["kept_answer"]
