# SPDX-License-Identifier: Apache-2.0
"""Batches of documents, each with several questions, as tensors."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from training.pages import BLANK, Document, Layout, Page, Question, generate
from training.render import CELL, render
from training.tokenizer import ASSISTANT, END, IMAGE, PAD, USER

# Image normalisation of the checkpoint's image processor. It maps paper to about zero.
MEAN, STD = 0.9, 0.22
IGNORED = -100


@dataclass
class Batch:
    """A batch of documents with the same number of pages.

    Attributes:
        pages: patches, uint8 [batch, pages, n, n, 3 * 14 * 14].
        glyphs: the character of each patch, [batch, pages, n * n].
        numbers: the digits of each page's number, [batch, pages, 2].
        keys: the key of a value at its first cell, else -100; [batch, pages, n * n, 2].
        asked: the key in a question, at the token before the answer, else -100; [batch, tokens, 2].
        via: the first characters of that key's value, like ``asked``.
        prefix_ids: tokens around the images, [prefix].
        image_positions: positions of the visual tokens in the prefix.
        branch_ids: questions and answers, [batch, tokens].
        labels: the next token where it belongs to an answer, else -100; [batch, tokens].
        slots: number of tokens of each branch.
        tasks: task of each branch.
    """

    pages: Tensor
    glyphs: Tensor
    numbers: Tensor
    keys: Tensor
    asked: Tensor
    via: Tensor
    prefix_ids: Tensor
    image_positions: Tensor
    branch_ids: Tensor
    labels: Tensor
    slots: tuple[int, ...]
    tasks: tuple[str, ...]


def patches(image: np.ndarray) -> np.ndarray:
    """[n * 14, n * 14, 3] -> [n, n, 3 * 14 * 14], with each patch in the order of a convolution."""
    n = image.shape[0] // CELL
    return image.reshape(n, CELL, n, CELL, 3).transpose(0, 2, 4, 1, 3).reshape(n, n, -1)


def normalised(pages: Tensor) -> Tensor:
    """Normalise uint8 patches [..., 3 * 14 * 14] to float32 like the image processor."""
    return (pages.float() / 255 - MEAN) / STD


class Encoder:
    """Encodes documents and questions as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        (self.pad, self.end, self.user, self.assistant, self.image) = (
            tokenizer.convert_tokens_to_ids(t) for t in (PAD, END, USER, ASSISTANT, IMAGE)
        )
        self.newline = tokenizer("\n")["input_ids"][0]
        self._glyph = {chr(c): tokenizer(chr(c))["input_ids"][0] for c in range(32, 127)}
        self.blank = self._glyph[BLANK]

    def prefix(self, num_pages: int, grid: int) -> tuple[Tensor, Tensor]:
        """Token ids before a question, and the positions of the visual ones."""
        ids = [self.user] + self._page(grid) * num_pages
        tensor = torch.tensor(ids)
        return tensor, (tensor == self.image).nonzero().squeeze(1)

    def _page(self, grid: int) -> list[int]:
        return [self.image] * grid**2 + [self.newline]

    def characters(self, text: str) -> list[int]:
        return [self._glyph[c] for c in text]

    def glyphs(self, page: Page) -> list[int]:
        """The target of each patch in the alignment loss; quarters of large glyphs are blank."""
        return [
            self._glyph[c] if part == 0 else self.blank
            for c, part in zip(page.text, page.part, strict=True)
        ]

    def question(self, question: Question) -> tuple[list[int], list[int]]:
        asked = self._tokenizer(question.text)["input_ids"] + [self.assistant]
        return asked, self._tokenizer(question.answer)["input_ids"] + [self.end]


@dataclass(frozen=True)
class Mixture:
    """The questions of a document: (task, number of questions, tokens in each slot)."""

    slots: tuple[tuple[str, int, int], ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of tokens of each branch."""
        return tuple(length for _, count, length in self.slots for _ in range(count))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task of each branch."""
        return tuple(name for name, count, _ in self.slots for _ in range(count))


class Batches(IterableDataset):
    """An endless, seeded stream of batches."""

    def __init__(
        self,
        split: str,
        encoder: Encoder,
        layout: Layout,
        mixture: Mixture,
        tokens_per_batch: int,
        first: int = 0,
        max_documents: int = 64,
    ) -> None:
        self.split, self.encoder, self.layout, self.mixture = split, encoder, layout, mixture
        self.tokens_per_batch, self.max_documents = tokens_per_batch, max_documents
        self.first = first

    def __iter__(self) -> Iterator[Batch]:
        index = self.first
        while True:
            yield self.batch(index)
            index += 1

    def batch(self, index: int) -> Batch:
        rng = random.Random(f"{self.split}/batch/{index}")
        num_pages = rng.randint(*self.layout.num_pages)
        layout = self.layout.of_pages(num_pages)
        tokens = num_pages * (layout.grid**2 + 1) + sum(self.mixture.lengths)
        count = max(1, min(self.max_documents, self.tokens_per_batch // tokens))
        documents = [generate(f"{self.split}/{index}", i, layout) for i in range(count)]
        return collate(documents, self.encoder, self.mixture, rng)


def collate(
    documents: Sequence[Document],
    encoder: Encoder,
    mixture: Mixture,
    rng: random.Random,
) -> Batch:
    num_pages, grid = len(documents[0].pages), documents[0].pages[0].grid
    shape = (len(documents), sum(mixture.lengths))
    ids = torch.full(shape, encoder.pad)
    labels = torch.full(shape, IGNORED)
    named, via = torch.full((2, *shape, 2), IGNORED)
    keys = torch.full((len(documents), num_pages, grid**2, 2), IGNORED)
    pixels, glyphs, numbers = [], [], []
    for row, document in enumerate(documents):
        pixels.append(np.stack([patches(render(p, rng.getrandbits(32))) for p in document.pages]))
        glyphs.append([encoder.glyphs(p) for p in document.pages])
        numbers.append([encoder.characters(p.number) for p in document.pages])
        for record in (r for page in document.pages for r in page.records):
            key = torch.tensor(encoder.characters(record.key))
            keys[row, record.page, record.value_cells[0]] = key
        start = 0
        for name, count, length in mixture.slots:
            questions = document.questions(name, rng, count)
            for i in range(count):
                if i < len(questions):
                    asked, answer = encoder.question(questions[i])
                    text = (asked + answer)[: length + 1]
                    first, last = len(asked), len(text)
                    ids[row, start : start + last - 1] = torch.tensor(text[:-1])
                    labels[row, start + first - 1 : start + last - 1] = torch.tensor(text[first:])
                    if questions[i].via:
                        end = start + first - 1
                        named[row, end] = torch.tensor(encoder.characters(questions[i].subject))
                        via[row, end] = torch.tensor(encoder.characters(questions[i].via))
                start += length
    prefix_ids, image_positions = encoder.prefix(num_pages, grid)
    return Batch(
        torch.from_numpy(np.stack(pixels)),
        torch.tensor(glyphs),
        torch.tensor(numbers),
        keys,
        named,
        via,
        prefix_ids,
        image_positions,
        ids,
        labels,
        mixture.lengths,
        mixture.tasks,
    )
