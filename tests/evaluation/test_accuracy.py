# SPDX-License-Identifier: Apache-2.0
"""The accuracy evaluation: cases, scores, intervals, reports and refused arguments."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from evaluation import accuracy
from evaluation.cases import (
    MIN_PAGES,
    answer_positions,
    jsonl_cases,
    page_reader_cases,
)
from evaluation.scoring import anls, characters, contains, exact, interval
from training.pages import TASKS
from vl_cache_vllm.config import REQUEST_BUDGET


@pytest.mark.parametrize("split", ["tune", "test"])
def test_page_reader_cases(split: str) -> None:
    cases = page_reader_cases(split, TASKS, 40)
    for task in TASKS:
        own = [case for case in cases if case.task == task]
        assert len(own) == 40
        assert len({(c.group, c.question) for c in own}) == 40
        assert len({case.group for case in own}) >= 20
        pages = {len(case.load_images()) for case in own}
        assert pages == set(range(MIN_PAGES[task], 5))
    image = cases[0].load_images()[0]
    assert image.size == (280, 280) and image.mode == "RGB"
    # Tasks share documents, whose images are drawn once.
    assert len({id(c.load_images()) for c in cases}) == len({c.group for c in cases})


def test_splits_share_nothing() -> None:
    tune, test = (page_reader_cases(split, ["lookup"], 50) for split in ("tune", "test"))
    assert not {(c.question, c.answers) for c in tune} & {(c.question, c.answers) for c in test}


@pytest.mark.parametrize("task", TASKS)
def test_cases_do_not_depend_on_the_other_tasks(task: str) -> None:
    alone = {(c.question, c.answers) for c in page_reader_cases("test", [task], 20)}
    together = {
        (c.question, c.answers) for c in page_reader_cases("test", TASKS, 20) if c.task == task
    }
    assert alone == together


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match=r"unknown task\(s\) sum; known: lookup"):
        page_reader_cases("test", ["sum"], 1)


def test_answer_positions() -> None:
    image, text = 9, 1
    prompt = [text, *[image] * 4, text, *[image] * 4, text, text]
    assert answer_positions([(0, 0), (1, 3)], prompt, image, 2) == [1, 9]


def test_scores() -> None:
    assert exact(" K7 ", ["K7"]) == 1 and exact("k7", ["K7"]) == 0
    assert exact("b", ["a", "b"]) == 1
    assert characters("abcd", ["abcx"]) == 0.75
    assert characters("", ["abc"]) == 0
    assert anls("Abcd", ["aBcx"]) == 0.75 and anls("ab", ["xy"]) == 0
    assert contains("it is K7.", ["k7"]) == 1 and contains("it is", ["K7"]) == 0


def test_interval() -> None:
    rng = np.random.default_rng(0)
    values = (rng.random(400) < 0.8).astype(float)
    groups = [str(i) for i in range(400)]
    mean, low, high = interval(values, groups)
    assert mean == values.mean()
    assert low < mean < high
    assert abs((high - low) / 2 - 1.96 * np.sqrt(0.8 * 0.2 / 400)) < 0.01


def test_interval_widens_with_shared_documents() -> None:
    """Four equal scores of one document count as one observation."""
    rng = np.random.default_rng(0)
    values = np.repeat((rng.random(100) < 0.5).astype(float), 4)
    alone = interval(values, [str(i) for i in range(400)])
    shared = interval(values, [str(i // 4) for i in range(400)])
    assert shared[2] - shared[1] > 1.7 * (alone[2] - alone[1])


def test_interval_of_equal_values_is_not_certain() -> None:
    mean, low, high = interval([1.0] * 300, [str(i) for i in range(300)])
    assert (mean, high) == (1.0, 1.0)
    assert low == pytest.approx(0.99)


@pytest.mark.parametrize(
    "text, settings",
    [
        ("vlcache", {"policy": "vlcache"}),
        (
            "vlcache:pooling=3,uniform_mix=0.8",
            {"policy": "vlcache", "pooling": 3, "uniform_mix": 0.8},
        ),
        (
            "vlcache:max_observation_tokens=null",
            {"policy": "vlcache", "max_observation_tokens": None},
        ),
        (
            "vlcache-plus:experimental.diversity=0.3,pooling=3",
            {"policy": "vlcache-plus", "experimental": {"diversity": 0.3}, "pooling": 3},
        ),
    ],
)
def test_parse_policy(text: str, settings: dict) -> None:
    assert accuracy.parse_policy(text) == settings


def test_a_policy_with_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def record(bench, cases, settings, requests, options):
        asked[settings and settings["policy"]] = [r.get(REQUEST_BUDGET) for r in requests]
        return [{} for _ in requests]

    monkeypatch.setattr(accuracy, "run", record)
    policies = ["vlcache-plus", "snapkv@0.1", "snapkv@0.4"]
    arguments = ["--policies", *policies, "--budgets", "0.05", "0.2", "1.0"]
    options = accuracy._parser().parse_args(arguments)
    results = accuracy.measure(options, SimpleNamespace(counts_answered=False), [])
    assert asked == {None: [None], "vlcache-plus": [0.05, 0.2], "snapkv": [0.1, 0.4]}
    assert list(results["snapkv"]) == ["0.1", "0.4"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--policies", "nonsense"], "unknown KV compression policy 'nonsense'"),
        (["--policies", "vlcache:poling=3"], "unknown KV compression setting(s) 'poling'"),
        (["--policies", "vlcache:pooling"], "expected setting=value"),
        (["--policies", "none"], "budget 1.0"),
        (["--policies", "vlcache@7"], "'vlcache@7': 7 is not a budget"),
        (["--budgets", "7"], "7 is not a budget"),
        (["--budgets", "0"], "0 is not a budget"),
        (["--tasks", "sum"], "unknown task(s) sum"),
        (["--model", "some/model"], "--model needs --data"),
        (["--data", "/nowhere.jsonl"], "No such file"),
        (["--bench", "pretrained", "--score", "anls"], "has its own model, data and scores"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(arguments)
    assert message in capsys.readouterr().err


def test_settings_of_one_policy_share_an_engine() -> None:
    pooled, mixed = "vlcache:pooling=3", "vlcache:uniform_mix=1.0,pooling=5"
    own = "vlcache:pooling=3,min_prompt_tokens=100"  # not for one request
    assert accuracy.engines([pooled, "random", own, mixed]) == [
        (
            {"policy": "vlcache"},
            {pooled: {"pooling": 3}, mixed: {"uniform_mix": 1.0, "pooling": 5}},
        ),
        ({"policy": "random"}, {"random": {}}),
        ({"policy": "vlcache", "pooling": 3, "min_prompt_tokens": 100}, {own: {}}),
    ]


def test_jsonl(tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    lines = [
        {"images": ["a.png"], "question": "What?", "answers": ["x", "y"]},
        {"images": [], "question": "Who?", "answers": ["z"], "task": "text", "max_tokens": 3},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second = jsonl_cases(path, 64)
    assert (first.task, first.question, first.answers) == ("data", "What?", ("x", "y"))
    assert first.max_tokens == 64 and not first.answer_cells
    assert [image.mode for image in first.load_images()] == ["RGB"]
    assert (second.task, second.max_tokens, second.load_images()) == ("text", 3, [])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: "),
        ('{"question": "q", "answers": ["a"]}', "line 2: no 'images'"),
        ('{"images": "a.png", "question": "q", "answers": ["a"]}', "images must be a list"),
        ('{"images": ["b.png"], "question": "q", "answers": ["a"]}', "no such image: .*b.png"),
        ('{"images": [], "question": 1, "answers": ["a"]}', "question must be a string"),
        ('{"images": [], "question": "q", "answers": []}', "answers must not be empty"),
        ("[]", "line 2: "),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"images": [], "question": "q", "answers": ["a"]}\n' + line)
    with pytest.raises(ValueError, match=message):
        jsonl_cases(path, 64)


def test_empty_jsonl(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="contains no cases"):
        jsonl_cases(tmp_path / "data.jsonl", 64)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def cell(score: float) -> dict:
        return {"score": score, "low": score - 0.02, "high": score + 0.02, "samples": 500}

    results = {
        "full cache": {"1.0": {"lookup": cell(0.98), "row": cell(0.97)}},
        "vlcache": {str(b): {"lookup": cell(b), "row": cell(b)} for b in (0.05, 0.1)},
    }
    text = accuracy.table(results)
    assert "98.0 ±2.0" in text and "10.0 ±2.0" in text
    assert text.count("full cache") == 2
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, (policy, cells) in zip(parts, results.items(), strict=True):
        part.write_text(json.dumps({"command": policy, "results": {policy: cells}}))
    merged = tmp_path / "merged.json"
    arguments = ["--report", *map(str, parts), "--markdown", "0.05", "--json", str(merged)]
    accuracy.main(arguments)
    assert capsys.readouterr().out.splitlines() == [
        "| | lookup | row |",
        "| --- | ---: | ---: |",
        "| full cache | 98.0 | 97.0 |",
        "| vlcache | 5.0 | 5.0 |",
    ]
    assert json.loads(merged.read_text()) == {"command": list(results), "results": results}
    later = {"vlcache": {str(b): {"lookup": cell(b), "row": cell(0.5)} for b in (0.01, 0.1)}}
    parts[0].write_text(json.dumps({"command": "later", "results": later}))
    accuracy.main(["--report", str(merged), str(parts[0]), "--json", str(merged)])
    together = json.loads(merged.read_text())["results"]
    assert list(together["vlcache"]) == ["0.01", "0.05", "0.1"]
    assert [c["row"]["score"] for c in together["vlcache"].values()] == [0.5, 0.05, 0.5]
    assert Image.open(tmp_path / "merged.png").size[0] > 600


def test_cells_that_the_model_fails_are_marked() -> None:
    by_cell = {"fact/chat": {"score": 0.9}, "list/chat": {"score": 0.89}}
    results = {"full cache": {"1.0": by_cell}, "snapkv": {"0.1": by_cell}}
    head, _, full, policy = accuracy.markdown(results, 0.1).splitlines()
    assert head == "| chat | fact | list * |"
    assert full == "| full cache | 90.0 | 89.0 |"
    assert policy == "| snapkv | 90.0 | 89.0 |"


def test_reports_of_different_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("tune", "test"):
        (tmp_path / split).write_text(json.dumps({"split": split, "results": {}}))
    with pytest.raises(SystemExit):
        accuracy.main(["--report", str(tmp_path / "tune"), str(tmp_path / "test")])
    assert "different benches, splits or data" in capsys.readouterr().err


def test_the_document_has_the_committed_numbers() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/accuracy.md").read_text()
    names = (
        *("accuracy", "accuracy-hybrid", "accuracy-agent"),
        *("accuracy-pretrained", "accuracy-pretrained-tune"),
    )
    for name in names:
        report = json.loads((root / f"benchmarks/results/{name}.json").read_text())
        assert accuracy.markdown(report["results"], 0.1) in text
    results = json.loads((root / "benchmarks/results/accuracy-pretrained.json").read_text())[
        "results"
    ]
    reliable = [c for c in results["full cache"]["1.0"] if accuracy.is_reliable(results, c)]
    for budget, cells in results["vlcache-plus"].items():
        forms = [[c for c in cells if c.endswith(form)] for form in ("/completion", "/chat")]
        means = (sum(cells[c]["score"] for c in names) / len(names) for names in (*forms, reliable))
        row = " | ".join(f"{100 * mean:.1f}" for mean in means)
        assert f"| {100 * float(budget):.0f}% | {row} |" in text


def test_the_document_has_the_committed_sweep_of_the_pretrained_model() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/accuracy.md").read_text()
    report = json.loads((root / "benchmarks/results/sweep-pretrained.json").read_text())
    for name, cells in report["results"].items():
        if name == "full cache":
            assert set(cells.values()) == {1.0}
            continue
        means = []
        for form in ("completion", "chat"):
            scores = [score for cell, score in cells.items() if cell.endswith(f"/{form}")]
            assert len(scores) == 6
            means.append(f"{100 * sum(scores) / 6:.1f}")
        worst = f"{100 * min(cells.values()):.1f}"
        assert f"| `{name}` | {means[0]} | {means[1]} | {worst} |" in text


def test_the_document_has_the_committed_numbers_with_pixels() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/accuracy.md").read_text()
    results = json.loads((root / "benchmarks/results/accuracy-pixels.json").read_text())["results"]
    for form in ("completion", "chat"):
        for name, budget in (("vlcache-plus", "0.1"), ("vlcache-plus:evict_after=0", "0.1")):
            cells = results[name][budget]
            right = [
                f"{cell['score'] * cell['samples']:.0f}" if cell else "-"
                for task in ("fact", "needle", "copy8", "which", "list")
                for cell in [cells.get(f"{task}/{form}")]
            ]
            assert f"| {name} | {' | '.join(right)} |" in text


def test_the_document_has_the_committed_numbers_of_later_evictions() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs/accuracy.md").read_text()
    cells = ["copy200/completion", "copy200/chat", "list16/completion", "list16/chat"]
    for name, budget in (("long-answers", "10%"), ("long-answers-20", "20%")):
        results = json.loads((root / f"benchmarks/results/{name}.json").read_text())["results"]
        for every in (48, 96, 192):
            scores = results[f"vlcache-plus:every={every}"]
            row = " | ".join(f"{100 * scores[cell]:.1f}" for cell in cells)
            assert f"| {budget} | {every} tokens | {row} |" in text
    every = json.loads((root / "benchmarks/results/accuracy-every.json").read_text())["results"]
    dumps = every["vlcache-plus:evict_after=0,every=32"]["0.1"]["dump"]
    assert f"| and every 32 generated tokens | {100 * dumps['score']:.1f} |" in text


def test_kept_fraction() -> None:
    record = {"evicted_tokens": 11, "kept_positions": [[[1, 2, 3], [3, 4, 5]], [[9], [8]]]}
    kept, reached = accuracy._kept_fraction(record, [2, 3, 7, 10])
    assert kept == pytest.approx((0.5 + 0.25 + 0 + 0) / 4)
    assert reached == 0.5
    record["evicted_tokens"] = 10  # what stands behind stays
    kept, reached = accuracy._kept_fraction(record, [2, 3, 7, 10])
    assert kept == pytest.approx((0.75 + 0.5 + 0.25 + 0.25) / 4)
    assert reached == 0.75


def test_the_guide_has_the_committed_numbers() -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks/results/accuracy.json").read_text())["results"]
    guide = (root / "docs" / "guide.md").read_text()
    rows = results["vlcache-plus:evict_after=0"] | results["full cache"]
    assert len(rows) == 6
    for budget, cells in rows.items():
        cells = [cells[task] for task in ("lookup", "hop", "row", "which", "dump")]
        kept = sum(cell["retained"] for cell in cells) / len(cells)
        scores = " | ".join(f"{100 * cell['score']:.1f}" for cell in cells)
        assert f"| {100 * float(budget):.0f}% | {100 * kept:.0f}% | {scores} |" in guide
