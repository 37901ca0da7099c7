# SPDX-License-Identifier: Apache-2.0
"""The page: its contents, and that it has no external resources."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.made_up import inspection, page_data, token_at
from vl_cache_vllm.inspector.history import Held
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


def test_later_evictions_are_a_table(tmp_path: Path) -> None:
    once = inspection()
    again = Held(2, 47, 8, 2, 3.0, 2.0, 6.0)
    write_page(once, tmp_path / "once.html")
    write_page(dataclasses.replace(once, history=(*once.history, again)), tmp_path / "again.html")
    assert "All evictions" not in (tmp_path / "once.html").read_text(encoding="utf-8")
    html = (tmp_path / "again.html").read_text(encoding="utf-8")
    row = "<td>47</td><td>8 → 2</td><td>11</td><td>3</td><td>2</td><td>6</td>"
    assert f'<tr><th scope="row">2</th>{row}</tr>' in html
