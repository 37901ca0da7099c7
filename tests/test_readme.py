# SPDX-License-Identifier: Apache-2.0
"""README.md: its length, its commands, and that its numbers are those of committed results."""

import ast
import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from evaluation import accuracy
from tests.test_cli import make_arg_parser
from vl_cache_vllm import cli
from vl_cache_vllm.config import KVCompressConfig, get_kv_compress_config
from vl_cache_vllm.core.admission import Skip
from vl_cache_vllm.policy import POLICIES
from vl_cache_vllm.self_check.record import COMMAND
from vl_cache_vllm.support import TRY_GPU

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def blocks(language: str) -> list[str]:
    """Commands or statements of the fenced blocks, one a line."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [line for block in found for line in block.splitlines()]


def section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_length() -> None:
    assert len(TEXT.splitlines()) <= 110
    assert "<!--" not in TEXT  # no generated part


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/compatibility.md"])
def test_pages_that_are_linked_exist(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert links
    missing = [
        link for link in links if "://" not in link and not (page.parent / link).resolve().exists()
    ]
    assert missing == []


def test_serving_numbers() -> None:
    results = load("serving")
    assert (results["policy"], results["budget"]) == ("vlcache", 0.1)
    assert results["model"] == "LLaVA, language model of shape 0.5b, dummy weights"
    assert results["machine"]["cores"] == 2 and "gpu" not in results["machine"]
    assert f"2 cores of an {results['machine']['processor']}, no GPU" in TEXT
    stock, ours = (
        next(row for row in results["results"][arm] if row["num_prompts"] == 12)
        for arm in ("stock", "ours")
    )
    lengths = f"{ours['prompt_tokens']:,} prompt and {ours['output_len']} output tokens"
    assert f"12 requests of {lengths}, all at once" in TEXT
    assert ours["request_rate"] == "inf"  # all at once
    more_running = ours["saturated"]["running"] / stock["saturated"]["running"]
    throughput = ours["output_throughput"] / stock["output_throughput"]
    assert f"**{more_running:.1f}x**" in TEXT
    assert f"**{throughput:.2f}x**" in TEXT


def mean_of_answered(policy: str, form: str) -> float | None:
    """Percent of the full cache's right answers that stay right, mean over tasks; None: unknown."""
    results = load("accuracy-pretrained")["results"]
    cells = results.get(policy, {}).get("0.1", {})
    scores = [cell["score"] for name, cell in cells.items() if name.endswith(f"/{form}")]
    assert len(scores) in (0, 6)
    return 100 * sum(scores) / 6 if scores else None


def test_accuracy_numbers() -> None:
    results = load("accuracy")
    assert results["split"] == load("accuracy-pretrained")["split"] == "test"
    table = [line for line in section("What does it cost?").splitlines() if line.startswith("|")]
    expected = accuracy.markdown(results["results"], 0.1).splitlines()
    committed = {line.split("|")[1].strip(): line for line in expected}
    rows = [committed["full cache"] + " 100 | 100 |"]
    for policy in ("vlcache-plus", "vlcache-plus:evict_after=0", "vlcache", "random"):
        row = committed[policy]
        for form in ("completion", "chat"):
            mean = mean_of_answered(policy, form)
            row += " - |" if mean is None else f" {mean:.1f} |"
        rows.append(row)
    assert table[2:] == rows
    full = results["results"]["full cache"]["1.0"]
    tenth = results["results"]["vlcache-plus:evict_after=0"]["0.1"]
    loss = max(100 * (full[task]["score"] - tenth[task]["score"]) for task in full)
    assert f"**{loss:.1f} points**" in TEXT
    assert len(full) == 5 and "over five tasks" in TEXT
    assert {cell["samples"] for cell in (*full.values(), *tenth.values())} == {500}
    assert "500 questions per task" in TEXT


def test_number_of_architectures() -> None:
    results = load("matrix")["results"]
    exact = {row["architecture"] for row in results.values() if row["result"] == "exact"}
    assert f"{len(exact)} architectures tested" in TEXT


def test_settings_with_their_defaults() -> None:
    """A table of about nine; the value in the column of defaults changes nothing."""
    rows = [line.split(" | ") for line in section("Use").splitlines() if line.startswith("| `")]
    settings = {name.strip("|` "): default.strip("`") for name, default, *_ in rows}
    assert settings.pop("policy") == "none"
    assert 8 <= len(settings) <= 10
    for name, default in settings.items():
        given = {"policy": "vlcache", name: json.loads(default)}
        assert KVCompressConfig.from_dict(given) == KVCompressConfig.from_dict(
            {"policy": "vlcache"}
        ), name
    named = set(re.findall(r"`([a-z0-9-]+)`", rows[0][3]))
    assert named == {*POLICIES, "none"}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_targets_and_modules_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= make_targets()
    modules = re.findall(r"`(?:python -m )?((?:benchmarks|checks|evaluation)\.\w+)", text)
    assert [module for module in modules if find_spec(module) is None] == []


def test_shell_commands() -> None:
    commands = blocks("bash")
    assert commands
    targets = make_targets()
    served = 0
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            assert words[1] in targets, line
        elif "vllm serve" in line:
            start = next(i for i, word in enumerate(words) if word == "serve")
            parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words[start + 1 :])
            cli.move_flags_to_additional_config(parsed)
            assert get_kv_compress_config(parsed) is not None
            served += 1
        else:
            assert words[:4] == ["python3", "-m", "pip", "install"] or words[0] == COMMAND, line
    assert served == 3


def test_the_gpu_comes_first_and_is_checked() -> None:
    lines = [line for line in blocks("bash") if COMMAND in line or "vllm serve" in line]
    assert lines[0].split()[0] == COMMAND
    assert lines[1].startswith("vllm serve ")
    assert TRY_GPU not in TEXT


def test_python_statements() -> None:
    llm, sampling = (ast.parse(line).body[0] for line in blocks("python"))
    (keyword,) = [k for k in ast.walk(llm) if isinstance(k, ast.keyword)]
    assert keyword.arg == "additional_config"
    config = KVCompressConfig.from_dict(ast.literal_eval(keyword.value)["kv_compress"])
    assert config is not None
    (keyword,) = [k for k in ast.walk(sampling) if isinstance(k, ast.keyword)]
    assert keyword.arg == "extra_args"
    assert config.with_request_settings(ast.literal_eval(keyword.value)).budget == 0.5


def test_the_page_of_compatibility_lists_every_reason() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    reasons = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(reasons) == sorted(skip.value for skip in Skip)


def test_the_picture_is_the_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import draw_mechanism

    assert draw_mechanism.TARGET.read_text() == draw_mechanism.draw()
    assert sum(draw_mechanism.KEPT_PAGES) == draw_mechanism.NUM_LAYERS * len(
        draw_mechanism.KEPT_BLOCKS
    )
