# SPDX-License-Identifier: Apache-2.0
"""Renders pages: one glyph per cell of 14 x 14 pixels, in an ordinary font."""

import functools
import string

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.pages import BLANK, GREY, INKS, Page

CELL = 14
_INK_COLOURS = np.array(
    [(20, 20, 20), (30, 60, 170), (170, 30, 30), (20, 110, 50), (140, 140, 140)], dtype=np.float32
)
assert len(_INK_COLOURS) == len(INKS)
_SIZES = (11.0, 12.0, 13.0)
_OFFSETS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
_DRAWN = string.ascii_letters + string.digits + string.punctuation
_INDEX = {BLANK: 0} | {c: i for i, c in enumerate(_DRAWN, 1)}


@functools.cache
def _glyphs() -> np.ndarray:
    """Ink coverage of each glyph, float32 0 to 1, ``[size * offset, part, character, 14, 14]``."""
    bank = np.zeros((len(_SIZES), len(_OFFSETS), 5, len(_INDEX), CELL, CELL), np.float32)
    for s, size in enumerate(_SIZES):
        for o, (dx, dy) in enumerate(_OFFSETS):
            for character, index in _INDEX.items():
                bank[s, o, 0, index] = _draw(character, size, CELL, dx, dy)
                large = _draw(character, 2 * size, 2 * CELL, dx, dy)
                for quarter in range(4):
                    y, x = divmod(quarter, 2)
                    bank[s, o, quarter + 1, index] = large[
                        y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL
                    ]
    return bank.reshape(-1, *bank.shape[2:])


def _draw(character: str, size: float, side: int, dx: int, dy: int) -> np.ndarray:
    image = Image.new("L", (side, side))
    font = ImageFont.load_default(size)
    middle = (side / 2 + dx, side / 2 + dy + 0.35 * size)
    ImageDraw.Draw(image).text(middle, character, fill=255, font=font, anchor="ms")
    return np.asarray(image, np.float32) / 255


def render(page: Page, seed: int) -> np.ndarray:
    """The image of a page: RGB, uint8 ``[grid * 14, grid * 14, 3]``.

    ``seed`` determines paper colour, ink density, glyph size, print offset and noise.
    """
    rng = np.random.default_rng(seed)
    n = page.grid
    characters = np.array([_INDEX[c] for c in page.text])
    part = np.array(page.part)
    coverage = _glyphs()[rng.integers(len(_SIZES) * len(_OFFSETS)), part, characters]
    coverage = coverage.reshape(n, n, CELL, CELL).transpose(0, 2, 1, 3).reshape(n * CELL, n * CELL)
    colours = _INK_COLOURS[np.array(page.ink)].reshape(n, n, 3)
    colours = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
    for line in page.rules:
        y = (line + 1) * CELL - 1
        coverage[y] = 0.5
        colours[y] = _INK_COLOURS[GREY]
    paper = rng.uniform(235, 255, 3).astype(np.float32)
    coverage = (coverage * rng.uniform(0.8, 1.0))[..., None].astype(np.float32)
    image = paper + coverage * (colours - paper)
    image += rng.integers(-5, 6, (n * CELL, n * CELL, 1), dtype=np.int8)
    return np.clip(image, 0, 255).astype(np.uint8)
