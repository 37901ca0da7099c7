# SPDX-License-Identifier: Apache-2.0
"""Renders tokens of a language model as pages: one token per cell, in an ordinary font.

A cell has three short lines of five characters, read like any text. A space at the beginning of a
token is a gap; other white space is drawn as a symbol. Each page has its own font, ink, paper,
position and noise.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

GRID = 16  # cells per side of a page
CELL = 32  # pixels per side of a cell
LINES, LINE_HEIGHT = 3, 10
WIDE, NARROW = 5, 6  # characters per line: tokens of more than 15 characters are drawn narrower
_NARROW_SIZE = 8.0
_SYMBOLS = {" ": "\u2423", "\n": "\u00b6", "\t": "\u2192"}
_FONTS = ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique")
_SIZES = (9.5, 10.0, 10.5)  # points; each advances by 6 pixels per character


@dataclass(frozen=True)
class Style:
    """What the cells of a page have in common: a font and its size."""

    font: str
    size: float


STYLES = tuple(Style(font, size) for font in _FONTS for size in _SIZES)


@functools.cache
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _in_font(character: str) -> bool:
    font = _font(_FONTS[0], _SIZES[0])
    missing = bytes(font.getmask("\uffff"))
    return character == " " or bytes(font.getmask(character)) != missing


def shown(text: str) -> str:
    """The characters that a cell shows for the text of a token."""
    gap = text[:1] == " " and text.strip() != ""
    symbols = "".join(_SYMBOLS.get(c, c) for c in text[gap:])
    return " " * gap + symbols


def drawable(text: str) -> bool:
    """Whether a cell can show the text of a token."""
    characters = shown(text)
    return (
        0 < len(characters) <= LINES * NARROW
        and characters.isprintable()
        and "\ufffd" not in characters  # part of a character
        and all(map(_in_font, characters))
    )


def draw_cell(text: str, style: Style) -> np.ndarray:
    """Ink coverage of a cell, uint8 [32, 32].

    Raises:
        ValueError: if a cell cannot show the text.
    """
    if not drawable(text):
        raise ValueError(f"a cell cannot show the token {text!r}")
    characters = shown(text)
    wide = len(characters) <= LINES * WIDE
    per_line = WIDE if wide else NARROW
    image = Image.new("L", (CELL, CELL))
    draw = ImageDraw.Draw(image)
    font = _font(style.font, style.size if wide else _NARROW_SIZE)
    for line, start in enumerate(range(0, len(characters), per_line)):
        part = characters[start : start + per_line]
        draw.text((1, LINE_HEIGHT * line + 9), part, fill=255, font=font, anchor="ls")
    return np.asarray(image)


def _shifted(coverage: np.ndarray, pixels: float, axis: int) -> np.ndarray:
    """Move a page by a number of pixels, with linear interpolation."""
    whole = int(np.floor(pixels))
    part = np.float32(pixels - whole)
    near = np.roll(coverage, whole, axis)
    return near + part * (np.roll(near, 1, axis) - near)


def print_page(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The grey levels of a page, uint8 [n * 32, n * 32], from its cells, uint8 [n, n, 32, 32].

    The generator determines position, ink density, paper and noise.
    """
    n = cells.shape[0]
    page = cells.transpose(0, 2, 1, 3).reshape(n * CELL, n * CELL).astype(np.float32) / 255
    page = _shifted(_shifted(page, rng.uniform(-1, 1.5), 0), rng.uniform(-1, 1.5), 1)
    paper, ink = rng.uniform(215, 255), rng.uniform(0, 70)
    page = paper + page * np.float32(ink - paper)
    page += rng.standard_normal(page.shape, dtype=np.float32) * np.float32(rng.uniform(0, 16))
    return np.clip(page, 0, 255).astype(np.uint8)


def render(texts: Sequence[str], seed: int) -> Image.Image:
    """The image of a page with these tokens, RGB, 512 x 512 pixels; cells after the last are blank.

    Raises:
        ValueError: if there are more tokens than cells, or if a cell cannot show one.
    """
    if len(texts) > GRID**2:
        raise ValueError(f"a page has {GRID**2} cells, not {len(texts)}")
    rng = np.random.default_rng(seed)
    style = STYLES[rng.integers(len(STYLES))]
    cells = np.zeros((GRID**2, CELL, CELL), np.uint8)
    for i, text in enumerate(texts):
        cells[i] = draw_cell(text, style)
    page = print_page(cells.reshape(GRID, GRID, CELL, CELL), rng)
    return Image.fromarray(page).convert("RGB")
