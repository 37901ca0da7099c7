# SPDX-License-Identifier: Apache-2.0
"""Checks the repository's Markdown: length of lines, one sentence a line, links, references.

    python tools/check_markdown.py [FILE ...]

Prints one line per finding and exits with 1 if there are any. Tables and code blocks may be wide,
and generated pages are checked for links and references only. Needs the standard library alone.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "benchmarks/README.md",
    "csrc/README.md",
    "models/*/README.md",
    "training/README.md",
)
GENERATED = ("docs/benchmarks.md",)
MAX_COLUMNS = 200

ABBREVIATIONS = frozenset({"al", "approx", "cf", "dr", "e.g", "etc", "fig", "i.e", "no", "vs"})

_LIST_ITEM = re.compile(r"(\s*)([-*+]|\d+[.)])\s+")
_LEAD = re.compile(r"(\*{1,2})[^*]+[.:!?]\1\s+")  # **Subject.** is a heading, not a sentence
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_HIDDEN = "\N{WHITE SQUARE}"  # stands for a character of inline code
_SENTENCE_END = re.compile(
    rf"(?P<word>[\w.]*[\w)\]%{_HIDDEN}][\"'*_)]*)[.!?][\"'*_)\]]*\s+(?=[\"'*_(\[]*[A-Z{_HIDDEN}])"
)
_LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
_DEFINITION = re.compile(r"^\s*\[[^\]]+\]:\s*(\S+)")
_HTML_LINK = re.compile(r"(?:href|src)=\"([^\"]+)\"")
_DOCUMENT = re.compile(r"(?<![\w/.:-])(?:\.{1,2}/)*[\w-][\w./-]*\.md\b")


@dataclass(frozen=True)
class Line:
    """One line of prose, heading or table."""

    number: int
    text: str
    is_table: bool = False

    @property
    def plain(self) -> str:
        """The text with inline code hidden, at the same columns."""
        return _CODE.sub(lambda match: _HIDDEN * len(match[0]), self.text)


def lines_of(text: str) -> Iterator[Line]:
    """The lines outside code blocks, comments and front matter."""
    fence = ""
    in_front_matter = in_comment = in_code = False
    is_blank, content = True, 0  # of the previous line; column at which a list item's text starts
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if number == 1 and stripped == "---":
            in_front_matter = True
        elif in_front_matter:
            in_front_matter = stripped != "---"
        elif fence:
            if stripped.startswith(fence) and not stripped.strip(fence[0]):
                fence = ""
        elif match := re.match(r"(`{3,}|~{3,})", stripped):
            fence = match[1]
        elif in_comment or stripped.startswith("<!--"):
            in_comment = "-->" not in stripped
        elif not stripped:
            is_blank = True
            continue
        elif indent >= content + 4 and (is_blank or in_code):
            in_code = True
            continue
        else:
            if item := _LIST_ITEM.match(line):
                content = item.end()
            elif is_blank and indent < content:
                content = 0
            yield Line(number, line, is_table=stripped.startswith("|"))
        is_blank = in_code = False


def sentence_ends(line: Line) -> list[int]:
    """Columns at which another sentence begins on the same line."""
    plain = line.plain
    start = item.end() if (item := _LIST_ITEM.match(plain)) else 0
    if lead := _LEAD.match(plain, start):
        start = lead.end()
    ends = []
    for match in _SENTENCE_END.finditer(plain, start):
        word = match["word"].strip("\"'*_()[]").lower()
        if word not in ABBREVIATIONS and not re.fullmatch(r"[a-z]", word):
            ends.append(match.end())
    return ends


def targets_of(line: Line) -> Iterator[str]:
    """What the links and images of a line point to."""
    text = _CODE.sub("``", line.text)
    for pattern in (_LINK, _DEFINITION, _HTML_LINK):
        yield from (match[1] for match in pattern.finditer(text))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for line in lines_of(path.read_text(encoding="utf-8")):
        if match := re.match(r"#{1,6}\s+(.*?)\s*#*$", line.text):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            unique, count = slug, 0
            while unique in found:
                count += 1
                unique = f"{slug}-{count}"
            found.add(unique)
    return found


def broken_link(page: Path, target: str, root: Path) -> str | None:
    """Why a link of ``page`` leads nowhere; None if it is fine or leads to another host."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    name, _, anchor = unquote(target).partition("#")
    path = (page.parent / name).resolve() if name else page.resolve()
    if not path.is_relative_to(root.resolve()):
        return f"the link {target} leaves the repository"
    if not path.exists():
        return f"the link {target} leads to no file"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return f"the link {target} leads to no heading"
    return None


def unknown_documents(page: Path, line: Line, root: Path) -> Iterator[str]:
    """Markdown files that a line names and that are not in the repository."""
    text = _LINK.sub("", line.text)
    for name in _DOCUMENT.findall(text):
        bases = (page.parent, root, root / "docs")
        paths = [(base / name).resolve() for base in bases]
        if not any(p.is_relative_to(root.resolve()) and p.exists() for p in paths):
            yield f"{name} is no file of the repository"


def findings(page: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """(line number, message) of everything wrong with a page."""
    relative = page.resolve().relative_to(root.resolve()).as_posix()
    for line in lines_of(page.read_text(encoding="utf-8")):
        if relative not in GENERATED and not line.is_table:
            if len(line.text) > MAX_COLUMNS:
                yield line.number, f"{len(line.text)} columns, at most {MAX_COLUMNS}"
            if not line.text.startswith("#") and (ends := sentence_ends(line)):
                yield line.number, f"start a new line before {line.text[ends[0] :][:30]!r}"
        for target in targets_of(line):
            if (reason := broken_link(page, target, root)) is not None:
                yield line.number, reason
        yield from ((line.number, reason) for reason in unknown_documents(page, line, root))


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that are checked by default."""
    return sorted({page for pattern in PAGES for page in root.glob(pattern)})


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = parser.parse_args(arguments).files or pages(root)
    count = 0
    for page in files:
        for number, message in findings(page, root):
            count += 1
            print(f"{page.resolve().relative_to(root.resolve())}:{number}: {message}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
