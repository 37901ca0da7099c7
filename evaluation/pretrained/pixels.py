# SPDX-License-Identifier: Apache-2.0
"""The pages of the pretrained bench as images for the word reader."""

import zlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from PIL.Image import Image
from transformers import PreTrainedTokenizerBase

from training.words.render import GRID, render

TOWER = Path(__file__).parents[2] / "models" / "word-reader"
CELLS = GRID**2


def page_images(pages: Iterable[Iterable[int]], tokenizer: PreTrainedTokenizerBase) -> list[Image]:
    """The tokens of a document's pages as images of 256 cells; only the last one has blank cells.

    Token i of the pages, counted through all of them, is therefore visual token i.

    Raises:
        ValueError: if a cell cannot show one of the tokens.
    """
    ids = list(chain.from_iterable(pages))
    parts = [ids[i : i + CELLS] for i in range(0, len(ids), CELLS)]
    return [
        render([tokenizer.decode([i]) for i in part], seed=zlib.crc32(repr(part).encode()))
        for part in parts
    ]
