# SPDX-License-Identifier: Apache-2.0
"""The pretrained bench with pictures: its pages as images, and how well the word reader reads them.

    python -m evaluation.pretrained.pixels

A token is read if its embedding is the nearest to the patch's feature.
"""

import zlib
from collections.abc import Iterable, Iterator
from itertools import batched, chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from evaluation.pretrained.tasks import PretrainedCase
from training.words.data import normalised, patches
from training.words.render import GRID, render
from training.words.train import WordReader

TOWER = Path(__file__).parents[2] / "models" / "word-reader"
CELLS = GRID**2


def page_images(case: PretrainedCase, tokenizer: PreTrainedTokenizerBase) -> list[Image.Image]:
    """The tokens of a case's pages as images of 256 cells; the last one may end with blank cells.

    Token i of the pages, one after the other, is therefore visual token i of the prompt.
    """
    return [
        render([tokenizer.decode([i]) for i in ids], zlib.crc32(f"{case.group}/{number}".encode()))
        for number, ids in enumerate(batched(chain.from_iterable(case.pages), CELLS))
    ]
