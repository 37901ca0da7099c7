# SPDX-License-Identifier: Apache-2.0
"""The sweep keeps the same tokens as vLLM and scores like the accuracy evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import offline_eviction, sweep
from evaluation.accuracy import MODEL
from evaluation.cases import page_reader_cases
from evaluation.offline import Cache
from training.pages import TASKS
from vl_cache_vllm.config import KVCompressConfig


def config(**values: object) -> KVCompressConfig:
    parsed = KVCompressConfig.from_dict(values)
    assert parsed is not None
    return parsed


@pytest.fixture(scope="module")
def reader() -> sweep.OfflineReader:
    return sweep.OfflineReader(MODEL)


def test_keeping_all_tokens_is_the_full_cache(reader: sweep.OfflineReader) -> None:
    case = page_reader_cases("tune", ["lookup"], 1)[0]
    prompt = reader.ask(reader.read(case), case)
    everything = torch.arange(prompt.tokens).expand(2, -1)
    cache = offline_eviction.kept(prompt.cache, [everything] * len(prompt.cache))
    for (keys, values), (all_keys, all_values) in zip(cache, prompt.cache, strict=True):
        assert torch.equal(keys, all_keys) and torch.equal(values, all_values)
    assert reader.correct(prompt, cache).all()
    assert reader.correct(prompt, prompt.cache).all()


def test_a_prompt_whose_answer_has_begun(reader: sweep.OfflineReader) -> None:
    case = page_reader_cases("tune", ["dump"], 1)[0]
    prompt = reader.ask(reader.read(case), case)
    begun = reader.begin(prompt, 5)
    assert begun.tokens == prompt.tokens + 5
    assert torch.equal(reader.correct(begun, begun.cache), reader.correct(prompt, prompt.cache)[5:])
    positions = offline_eviction.evict(begun, config(policy="vlcache", budget=0.1), 32)
    assert positions is not None
    tail = begun.tokens % 32
    assert sum(row.shape[1] - tail for row in positions) == 6 * 32 * 6


def test_later_evictions_leave_what_the_bound_allows(
    reader: sweep.OfflineReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound that is never reached changes nothing; one that is, frees again and again."""
    case = page_reader_cases("tune", ["dump"], 1)[0]
    prompt = reader.ask(reader.read(case), case)
    settings = {"policy": "vlcache-plus", "budget": 0.2, "evict_after": 0}
    lengths: list[int] = []
    evict_again = offline_eviction._evict_again

    def evict_and_measure(cache: Cache, *arguments: Any) -> Cache:
        found = evict_again(cache, *arguments)
        lengths.extend(keys.shape[1] for keys, _ in found)
        return found

    monkeypatch.setattr(offline_eviction, "_evict_again", evict_and_measure)
    once = offline_eviction.decode(reader, prompt, config(**settings), 32)
    never = offline_eviction.decode(reader, prompt, config(**settings, every=512), 32)
    assert once is not None and never is not None and torch.equal(once, never)
    assert not lengths
    again = offline_eviction.decode(reader, prompt, config(**settings, every=32), 32, 4)
    assert again is not None and len(again) == len(prompt.expected)
    assert len(lengths) >= 2 * len(prompt.cache)
    assert {length % 32 for length in lengths} == {1}  # the observed token stays
    assert sum(lengths) / len(lengths) == 11 * 32 + 1  # 11 of 51 blocks in each layer on average


def test_later_evictions_with_several_numbers_of_queries(reader: sweep.OfflineReader) -> None:
    cases = page_reader_cases("tune", ["dump"], 1)
    configs = {
        "again": config(policy="vlcache-plus", evict_after=0, every=32),
        "once": config(policy="vlcache-plus", evict_after=0),
    }
    results = sweep.sweep(reader, cases, configs, 32, [1, 8])
    assert list(results) == ["full cache", "again", "again observing 8", "once"]


def test_scores_and_order(reader: sweep.OfflineReader) -> None:
    cases = page_reader_cases("tune", TASKS, 4)
    configs = {name: config(policy=name, budget=0.1) for name in ("vlcache-plus", "random")}
    results = sweep.sweep(reader, cases, configs, 32)
    assert list(results) == ["full cache", "vlcache-plus", "random"]
    for task in TASKS:
        assert results["full cache"][task] >= 0.9
        assert results["full cache"][task] >= results["random"][task]
    assert results["vlcache-plus"]["row"] > results["random"]["row"]


def test_budgets_are_whole_pages(reader: sweep.OfflineReader) -> None:
    case = page_reader_cases("tune", ["dump"], 1)[0]
    prompt = reader.ask(reader.read(case), case)
    positions = offline_eviction.evict(prompt, config(policy="vlcache", budget=0.1), 32)
    assert positions is not None
    tail = prompt.tokens % 32  # stays
    sizes = [row.shape[1] - tail for row in positions]
    assert sum(sizes) == 6 * 32 * 6  # 6 of 51 blocks, 6 layers
    assert len(set(sizes)) > 1  # layer budgets differ
    assert all(size % 32 == 0 for size in sizes)
    assert offline_eviction.evict(prompt, config(policy="vlcache", budget=1.0), 32) is None


def test_policies_whose_window_includes_the_pages_are_refused(reader: sweep.OfflineReader) -> None:
    case = page_reader_cases("tune", ["lookup"], 1)[0]
    prompt = reader.ask(reader.read(case), case)
    with pytest.raises(ValueError, match="h2o: the observation window must not include the pages"):
        offline_eviction.evict(prompt, config(policy="h2o"), 32)


def test_grid() -> None:
    assert sweep.settings(["vlcache", "vlcache:a=1"], ["b=2,3"]) == [
        "vlcache:b=2",
        "vlcache:b=3",
        "vlcache:a=1,b=2",
        "vlcache:a=1,b=3",
    ]
    assert sweep.settings(["vlcache"], []) == ["vlcache"]
    with pytest.raises(ValueError, match="expected setting=value,value"):
        sweep.settings(["vlcache"], ["b"])


def test_bad_settings_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["vlcache", "--grid", "lookahead=x"])
    assert "lookahead must be of type float" in capsys.readouterr().err


def test_results_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "sweep.json"
    arguments = ["vlcache", "--grid", "lookahead=0,40", "--tasks", "lookup", "row"]
    sweep.main([*arguments, "--samples", "2", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["command"] == "python -m evaluation.sweep " + " ".join(
        [*arguments, "--samples", "2", "--json", str(out)]
    )
    assert set(report["results"]) == {"full cache", "vlcache:lookahead=0", "vlcache:lookahead=40"}
    assert set(report["results"]["full cache"]) == {"lookup", "row"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == [
        "cache" if name == "full cache" else name for name in report["results"]
    ]


def test_the_published_table_is_the_published_run() -> None:
    """docs/accuracy.md, "Options from later work"."""
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/options.json").read_text())["results"]
    section = (root / "docs/accuracy.md").read_text().split("## Options from later work")[1]
    header, _, *rows = (
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in section.split("\n## ")[0].splitlines()
        if line.startswith("|")
    )
    assert len(rows) > 10
    for name, *scores in rows:
        expected = [f"{100 * results[name][task]:.1f}" for task in header[1:]]
        assert scores == expected, name
