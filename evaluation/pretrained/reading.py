# SPDX-License-Identifier: Apache-2.0
"""How well the word reader reads the documents of the pretrained bench.

    python -m evaluation.pretrained.reading

A token is read if its embedding is the nearest one to the feature of its cell. The error of a cell
is the squared distance between both, as a fraction of the embedding's to the mean embedding.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer

from evaluation.benches import pretrained_model
from evaluation.pretrained.pixels import TOWER, page_images
from evaluation.pretrained.tasks import SPLITS, encoder, generate
from testing.cli import make_parser
from training.words.data import drawable_tokens, normalised, patches
from training.words.export import load
from training.words.train import Targets, WordReader, embedding_table


@dataclass(frozen=True)
class Reading:
    """Tokens of cells, those that were read, and the errors of the cells; each [tokens]."""

    tokens: Tensor
    read: Tensor
    errors: Tensor

    @property
    def accuracy(self) -> float:
        return (self.tokens == self.read).float().mean().item()


@torch.inference_mode()
def features(model: WordReader, images: Iterable[Image]) -> Tensor:
    """Features of the cells of images, [images * 256, width]."""
    grey = np.stack([patches(np.asarray(image)[..., 0]) for image in images])
    return model(normalised(torch.from_numpy(grey)))[0].flatten(0, 1)


def read_pages(
    model: WordReader, targets: Targets, pages: Sequence[Sequence[int]], images: Iterable[Image]
) -> Reading:
    """What the model reads in the images of a document's pages."""
    tokens = torch.tensor([i for page in pages for i in page])
    seen = features(model, images)[: len(tokens)]
    vectors = targets.vectors[tokens]
    errors = (seen - vectors).square().sum(-1) / (targets.mean - vectors).square().sum(-1)
    return Reading(tokens, targets.nearest(seen)[:, 0], errors)


def main() -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("--tower", type=Path, default=TOWER)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--documents", type=int, default=20)
    options = parser.parse_args()
    language_model = pretrained_model()
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    targets = Targets(embedding_table(language_model), drawable_tokens(tokenizer))
    model = load(options.tower)
    readings = []
    for index in range(options.documents):
        pages = generate(encoder(tokenizer), options.split, index).pages
        readings.append(read_pages(model, targets, pages, page_images(pages, tokenizer)))
    tokens, read, errors = (
        torch.cat([getattr(reading, name) for reading in readings])
        for name in ("tokens", "read", "errors")
    )
    total = Reading(tokens, read, errors)
    print(f"{len(tokens)} tokens, {total.accuracy:.2%} read, mean error {errors.mean():.3f}")
    wrong = (tokens != read).nonzero().flatten().tolist()
    for i in wrong[:: max(1, len(wrong) // 20)]:
        print(f"{tokenizer.decode([tokens[i]])!r} as {tokenizer.decode([read[i]])!r}")


if __name__ == "__main__":
    main()
