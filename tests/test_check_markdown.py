# SPDX-License-Identifier: Apache-2.0
"""The rules that tools/check_markdown.py keeps, and what it must not complain about."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_markdown", ROOT / "tools" / "check_markdown.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def messages(checker: ModuleType, root: Path, text: str, name: str = "docs/page.md") -> list[str]:
    page = root / name
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    return [message for _, message in checker.findings(page, root)]


@pytest.mark.parametrize(
    "text",
    [
        "It stops. Another sentence begins.",
        "It stops (here). `code` begins.",
        "Does it stop? Yes.",
        "It keeps 10%. The rest goes.",
        "- An item. Another sentence.",
        "**Lead.** One sentence. Another one.",
        'It is called "this." The rest follows.',
        "See `config.py`. Then go on.",
    ],
)
def test_two_sentences_on_one_line(checker: ModuleType, tmp_path: Path, text: str) -> None:
    (found,) = messages(checker, tmp_path, text)
    assert found.startswith("start a new line before ")


@pytest.mark.parametrize(
    "text",
    [
        "One sentence with 0.32 and v1.5 in it.",
        "Tu et al. VL-Cache, e.g. Figure 2, i.e. This, vs. That, Fig. Two and no. One.",
        "M. Muster wrote it.",
        "**Lead.** One sentence.",
        "1. One sentence.",
        "- **Lead.** One sentence.",
        "# 1. A heading. With two parts",
        "| a cell. Another sentence | b |",
        "`a. B` is code.",
        "    indented. Code here",
        "```\nfenced. Code here\n```",
        "~~~\nfenced. Code here\n~~~",
        "1. An item:\n\n       nested. Code here\n\n   It continues.",
        "<!-- a comment. Another -->",
        "---\ntitle: One. Two\n---\nText.",
        "First sentence.\nSecond sentence.",
    ],
)
def test_one_sentence_a_line(checker: ModuleType, tmp_path: Path, text: str) -> None:
    assert messages(checker, tmp_path, text) == []


def test_long_lines(checker: ModuleType, tmp_path: Path) -> None:
    words = "word " * 41
    assert messages(checker, tmp_path, words.rstrip()) == ["204 columns, at most 200"]
    for wide in (f"| {words} |", f"    {words}", f"```\n{words}\n```"):
        assert messages(checker, tmp_path, wide) == []
    continued = f"- An item.\n  {words.rstrip()}"
    assert messages(checker, tmp_path, continued) == ["206 columns, at most 200"]


def test_links(checker: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `title`, (twice)\n\n## Again\n\n## Again\n")
    good = """[a](../other.md) ![b](../other.md "title") [c](../other.md#a-title-twice)
[d](https://example.org/x.md) [e](#here) [f](mailto:a@example.org) `[g](nowhere.md)`
[h](../other.md#again-1)

## Here
"""
    assert messages(checker, tmp_path, good) == []
    for target, reason in (
        ("nowhere.png", "leads to no file"),
        ("../other.md#c", "leads to no heading"),
        ("#nowhere", "leads to no heading"),
        ("../../outside.txt", "leaves the repository"),
    ):
        expected = [f"the link {target} {reason}"]
        assert messages(checker, tmp_path, f"A [link]({target}).") == expected
        assert messages(checker, tmp_path, f"[name]: {target}") == expected
    assert messages(checker, tmp_path, '<img src="nowhere.png">') == [
        "the link nowhere.png leads to no file"
    ]


def test_documents_outside_the_repository(checker: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("Text.\n")
    assert messages(checker, tmp_path, "See README.md, `page.md` and docs/page.md.") == []
    for name in ("paper.md", "../shared/notes.md", "docs/none.md"):
        expected = [f"{name} is no file of the repository"]
        assert messages(checker, tmp_path, f"See {name}, section 3.") == expected
        assert messages(checker, tmp_path, f"See `{name}`.") == expected


def test_generated_pages_may_have_long_lines(checker: ModuleType, tmp_path: Path) -> None:
    (name,) = checker.GENERATED
    text = f"Two sentences. In one line {'x ' * 100}[a](nowhere.md)."
    assert messages(checker, tmp_path, text, name) == ["the link nowhere.md leads to no file"]


def test_the_pages_that_are_checked(checker: ModuleType) -> None:
    names = {page.relative_to(ROOT).as_posix() for page in checker.pages()}
    assert {"README.md", "docs/design.md", "docs/adr/README.md", "csrc/README.md"} <= names


def test_findings_fail_the_command(
    checker: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("One.\n\nTwo. Three.\n")
    assert checker.main([], tmp_path) == 1
    assert capsys.readouterr().out == "README.md:3: start a new line before 'Three.'\n"
    page.write_text("One.\n")
    assert checker.main([str(page)], tmp_path) == 0
