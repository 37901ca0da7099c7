# SPDX-License-Identifier: Apache-2.0
"""The page: its contents, and that it has no external resources."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.made_up import inspection, page_data, token_at
from vl_cache_vllm.inspector.page import MAX_SIDE, _uri, write_page


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def test_the_data_are_those_of_the_trace(page: Path) -> None:
    made = inspection(visual=((2, 11), (13, 19)), grids=((2, 3, 3, 3),))
    write_page(made, page)
    data = page_data(page)
    assert (data["kept"] == made.eviction.kept).all()
    for name in ("attention", "scores"):
        exact = getattr(made.eviction, name)
        own = data[name]
        step = (own["high"] / own["low"]) ** (1 / 254)
        assert own["values"] == pytest.approx(
            np.where(exact > own["low"], exact, own["values"]), rel=step - 1
        )
        assert ((own["values"] == 0) == (exact == 0)).all()
    assert data["keptTokens"] == list(made.eviction.kept_tokens)
    assert data["visual"] == [[2, 11], [13, 19]]
    assert [panel["kind"] for panel in data["panels"]] == ["overlay", "strip"]
    assert data["texts"] == [f"<{i}>\n" for i in (0, 1, 11, 12, *range(19, 26))]
    # The image of 80 x 40 pixels has patches of a third of each.
    assert token_at(data["panels"][0], 79, 1) == 4
    assert token_at(data["panels"][0], 1, 39) == 8


def test_it_needs_nothing_else_and_no_text_breaks_out(page: Path) -> None:
    write_page(inspection(), page)
    html = page.read_text(encoding="utf-8")
    addresses = {a for a in re.findall(r"https?://[^\s\"'`]+", html) if "w3.org" not in a}
    assert not addresses
    assert not re.findall(r"<link|@import|src=\"(?!data:)", html)
    assert html.count("</script>") == 2
    assert "<b>is</b>" not in html
    assert "&lt;/script&gt;&lt;b&gt;is" in html
    assert not re.findall(r"\{[{%]|undefined", html.split("<script")[0])


def test_it_says_what_was_asked_and_answered_and_with_what(page: Path) -> None:
    made = inspection()
    write_page(made, page)
    html = page.read_text(encoding="utf-8")
    assert "<code>pooling 3</code>" in html
    assert not any("trace" in shown for shown in re.findall(r"<code>(.+?)</code>", html))
    assert "differs from the full cache" in html
    assert "28.6%" in html  # 2 of 7 blocks
    same = dataclasses.replace(made, full_answer=made.answer)
    write_page(same, page)
    assert "same as with the full cache" in page.read_text(encoding="utf-8")


def test_prompts_without_images_have_pages_too(page: Path) -> None:
    write_page(inspection(visual=(), grids=()), page)
    assert page_data(page)["panels"] == []
    assert "<canvas" not in page.read_text(encoding="utf-8")


def test_images_are_shrunk_and_take_the_smaller_format() -> None:
    plain = Image.new("RGB", (3 * MAX_SIDE, MAX_SIDE), "white")
    assert _uri(plain).startswith("data:image/png;base64,")
    assert len(_uri(plain)) < 20_000
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert _uri(noise).startswith("data:image/jpeg;base64,")
    assert noise.size == (64, 64)


class Tables(HTMLParser):
    """The page's tables as rows of texts, by the ``data-eviction`` of the element around them."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str | None, list[list[str]]] = {}
        self.bars: list[list[tuple[str, float]]] = []  # kind and width of each part, by row
        self.selectable: list[str] = []
        self._part: str | None = None
        self._is_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag in ("section", "form"):
            self._part = attributes.get("data-eviction")
            self.tables.setdefault(self._part, [])
        elif tag == "tr":
            self.tables[self._part].append([])
        elif tag in ("th", "td"):
            self.tables[self._part][-1].append("")
            self._is_cell = True
            if tag == "td" and attributes.get("class") == "bar":
                self.bars.append([])
        elif tag == "input" and attributes.get("name") == "eviction":
            self.selectable.append(attributes["value"])
        elif tag == "i" and self._is_cell:
            width = attributes["style"].removeprefix("width: ").removesuffix("%")
            self.bars[-1].append((attributes["class"], float(width)))

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = self._is_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.tables[self._part][-1][-1] += data.strip()


def test_one_eviction_needs_no_selector(page: Path) -> None:
    write_page(inspection(), page)
    tables = Tables(page)
    assert tables.selectable == []
    assert "Evictions of the request" not in page.read_text(encoding="utf-8")
    assert tables.tables.keys() == {None, "1"}


def test_each_eviction_can_be_selected_and_shows_its_layers(page: Path) -> None:
    made = inspection(later=[(47, [3, 1, 2]), (66, [1, 1, 4])])
    write_page(made, page)
    found = Tables(page)
    assert found.selectable == ["1", "2", "3"]
    assert found.tables.keys() == {None, "1", "2", "3"}
    first, *_ = found.tables[None][1:]
    assert first[:4] == ["1", "26", "7 → 2", "10"]
    # 2 kept blocks and 23 tokens since position 24, of which 3 stay behind the whole blocks.
    assert found.tables[None][2][:4] == ["2", "47", "8 → 2", "11"]
    for held in made.history[1:]:
        header, *rows = found.tables[str(held.number)]
        assert header[:4] == ["layer", "before", "kept", "share"]
        assert len(rows) == len(held.layers) == 3
        for row, layer in zip(rows, held.layers, strict=True):
            kept = [layer.visual, layer.text, layer.generated]
            assert row[:8] == [
                str(layer.layer),
                str(layer.before),
                f"{sum(kept):.0f}",
                f"{100 * sum(kept) / layer.before:.1f}%",
                *(f"{count:.1f}" for count in kept),
                f"{layer.density:.3f}",
            ]
    # Layer 0 held 4 tokens and 23 since then, and keeps 3 pages and 3 tokens.
    assert found.tables["2"][1][:4] == ["0", "27", "15", "55.6%"]
    assert [kind for kind, _ in found.bars[0]] == ["visual", "text", "generated"]
    longest = max(layer.before for layer in made.history[1].layers)
    assert sum(width for _, width in found.bars[0]) == pytest.approx(100 * 15 / longest, abs=0.02)
    html = page.read_text(encoding="utf-8")
    assert "With 3 evictions" in html
    assert "After 47 tokens, 8 blocks became 2 and the last one, which is not full." in html
