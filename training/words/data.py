# SPDX-License-Identifier: Apache-2.0
"""Pages of random tokens for the training of the word reader."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from training.data import IGNORED
from training.words.render import (
    CELL,
    GRID,
    LINES,
    STYLES,
    WIDE,
    draw_cell,
    drawable,
    print_page,
    shown,
)

# Image normalisation of the checkpoint's image processor. It maps paper to about zero.
MEAN, STD = 0.92, 0.2
CHARACTERS = 128  # ASCII; the last stands for all other characters
_ZIPF_OFFSET = 20
_SHARES = 0.75, 0.13, 0.05, 0.07  # of tokens: by root of count, by rank, uniform, characters
_LIKE_TEXT = 0.25  # fraction of pages
_PARTLY_FILLED = 0.15  # fraction of pages that end early


@dataclass
class Batch:
    """Pages of tokens.

    Attributes:
        pages: grey patches, uint8 [pages, 16, 16, 32 * 32].
        tokens: the token of each patch, or the number of tokens in the vocabulary where it is
            blank; [pages, 256].
    """

    pages: Tensor
    tokens: Tensor


def drawable_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The texts of the tokens that a cell can show, by token id."""
    special = set(tokenizer.all_special_ids)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    return {i: text for i, text in texts.items() if drawable(text)}


class Alphabet:
    """The tokens that cells can show, and how often each occurs in training.

    A quarter of the pages have the tokens of a text, as often as the text has them. In the others
    they occur by the square roots of their counts, beside tokens that are drawn from all: by rank
    (Zipf's law; a token's number is about its rank in the text that the tokenizer was made from),
    uniformly, or from the single characters.

    Args:
        tokenizer: of the language model.
        counts: occurrences of tokens in the text.
        only_text: leave out all other tokens.

    Attributes:
        ids: token ids, int64 [tokens].
        probabilities: of a text's pages and of the other pages, float64 [2, tokens].
        blank: what stands for the token of a blank cell: the first number that is not a token id.
        spelling: the characters of each cell, indexed by token, int64 [vocabulary + 1, 15]; -100
            for tokens that are drawn narrower, or cannot be drawn.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        counts: Mapping[int, int],
        only_text: bool = False,
    ) -> None:
        self._texts = drawable_tokens(tokenizer)
        if only_text:
            self._texts = {i: text for i, text in self._texts.items() if i in counts}
        self.ids = np.array(list(self._texts))
        self.blank = len(tokenizer)
        counted = np.array([counts.get(i, 0) for i in self._texts], float)
        single = np.array([len(text) == 1 for text in self._texts.values()])
        ranked = ~single / (_ZIPF_OFFSET + np.cumsum(~single))
        parts = (counted**0.5, ranked, np.ones(len(self.ids)), single)
        mixed = sum(share * part / part.sum() for share, part in zip(_SHARES, parts, strict=True))
        self.probabilities = np.stack([counted / counted.sum(), mixed])
        self.spelling = torch.full((self.blank + 1, LINES * WIDE), IGNORED)
        for i, text in [*self._texts.items(), (self.blank, "")]:
            if len(shown(text)) <= LINES * WIDE:
                padded = shown(text).ljust(LINES * WIDE)
                self.spelling[i] = torch.tensor([min(ord(c), CHARACTERS - 1) for c in padded])
        self._cells = functools.cache(self._draw_cells)

    def _draw_cells(self, style: int) -> np.ndarray:
        """All cells in a style, uint8 [tokens + 1, 32, 32]; the last is blank."""
        cells = [draw_cell(text, STYLES[style]) for text in self._texts.values()]
        return np.stack([*cells, np.zeros((CELL, CELL), np.uint8)])

    def page(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Grey levels, uint8 [512, 512], and tokens, [256], of a random page."""
        kind = int(rng.random() >= _LIKE_TEXT)
        chosen = rng.choice(len(self.ids), GRID**2, p=self.probabilities[kind])
        if rng.random() < _PARTLY_FILLED:
            chosen[rng.integers(GRID**2) :] = -1
        cells = self._cells(int(rng.integers(len(STYLES))))[chosen]
        tokens = np.where(chosen < 0, self.blank, self.ids[chosen])
        return print_page(cells.reshape(GRID, GRID, CELL, CELL), rng), tokens


def patches(page: np.ndarray) -> np.ndarray:
    """[n * 32, n * 32] -> [n, n, 32 * 32]"""
    n = page.shape[0] // CELL
    return page.reshape(n, CELL, n, CELL).transpose(0, 2, 1, 3).reshape(n, n, -1)


def normalised(pages: Tensor) -> Tensor:
    """Normalise uint8 grey levels to float32 like the image processor."""
    return (pages.float() / 255 - MEAN) / STD


class Batches(IterableDataset):
    """An endless, seeded stream of batches."""

    def __init__(self, alphabet: Alphabet, seed: int, pages: int, first: int = 0) -> None:
        self.alphabet, self.seed, self.pages, self.first = alphabet, seed, pages, first

    def __iter__(self) -> Iterator[Batch]:
        index = self.first
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Batch:
        rng = np.random.default_rng([self.seed, index])
        pages, tokens = zip(*(self.alphabet.page(rng) for _ in range(self.pages)), strict=True)
        return Batch(
            torch.from_numpy(np.stack([patches(page) for page in pages])),
            torch.from_numpy(np.stack(tokens)),
        )
