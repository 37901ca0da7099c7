# SPDX-License-Identifier: Apache-2.0
"""Pages are pictures of their tokens: deterministic, legible and all different."""

import numpy as np
import pytest
from PIL import Image

from training.words.render import CELL, GRID, STYLES, draw_cell, drawable, render, shown

WORDS = ["The", " keeper", " of", " the", " light", "house", " is", " M", "aren", ".", "\n", " "]
WORDS += [
    "4",
    " transportation",
    " responsibilities",
    "\u201d",
    " caf\u00e9",
    "'s",
    " Page",
    "aren's",
]


def cells(image: Image.Image) -> np.ndarray:
    """The grey levels of each cell of a page, [256, 32 * 32], 1 for paper and 0 for ink."""
    grey = np.asarray(image.convert("L"), np.float32)
    grey = (grey - grey.min()) / np.ptp(grey)
    return grey.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID**2, -1)


def test_a_page_depends_on_its_tokens_and_its_seed() -> None:
    page = render(WORDS, 0)
    assert page.size == (GRID * CELL, GRID * CELL)
    assert np.array_equal(page, render(WORDS, 0))
    assert not np.array_equal(page, render(WORDS, 1))
    assert not np.array_equal(page, render(WORDS[::-1], 0))


@pytest.mark.parametrize("seed", range(8))
def test_each_cell_is_most_like_its_own_token(seed: int) -> None:
    """Every cell, moved by up to a pixel, correlates best with the undisturbed drawing."""
    drawn = [
        np.roll(draw_cell(word, style), (dy, dx), (0, 1)).ravel().astype(np.float32)
        for word in WORDS
        for style in STYLES
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    per_word = len(drawn) // len(WORDS)
    templates = np.stack(drawn)
    templates -= templates.mean(1, keepdims=True)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    seen = cells(render(WORDS, seed))[: len(WORDS)]
    found = (-seen @ templates.T).argmax(1) // per_word
    assert found.tolist() == list(range(len(WORDS)))


def test_cells_after_the_last_token_are_blank() -> None:
    seen = cells(render(WORDS, 0))
    assert seen[: len(WORDS)].min(1).max() < 0.6
    assert seen[len(WORDS) :].min() > 0.6


def test_white_space_is_visible() -> None:
    assert shown(" the") == " the"
    assert shown(" ") == "\u2423"
    assert shown("\n\n") == "\u00b6\u00b6"
    assert shown(" \n") == "\u2423\u00b6"


def test_what_a_cell_cannot_show_is_refused() -> None:
    assert not drawable("")
    assert not drawable("\ufffd")  # part of a character
    assert not drawable("\u6c34")  # not in the font
    assert drawable("x" * 18) and not drawable("x" * 19)
    with pytest.raises(ValueError, match="cannot show"):
        render(["\ufffd"], 0)
    with pytest.raises(ValueError, match="256 cells"):
        render(["a"] * (GRID**2 + 1), 0)
