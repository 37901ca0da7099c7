# SPDX-License-Identifier: Apache-2.0
"""Compares a training model, which reads a document once, with transformers' model."""

import random
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from training.data import Batch, Encoder, normalised
from training.model import Reader
from training.pages import Document
from training.render import render


def pictures(document: Document) -> list[Image.Image]:
    """The pages of a document as `collate` renders them with seed 0."""
    rng = random.Random(0)
    return [Image.fromarray(render(p, rng.getrandbits(32))) for p in document.pages]


def assert_branches_equal(
    model: Reader, encoder: Encoder, batch: Batch, logits_of: Callable[[Tensor], Tensor]
) -> None:
    """Logits of each branch are those of the single question.

    Args:
        model: the training model.
        encoder: of the batch.
        batch: of one document.
        logits_of: transformers' logits for the token ids of a prompt, [1, tokens].
    """
    with torch.no_grad():
        features = model.features(normalised(batch.pages[0])).flatten(0, 1)[None]
        hidden, between = model(
            features, batch.prefix_ids, batch.image_positions, batch.branch_ids, batch.slots
        )
        ours = model.lm_head(hidden)[0]
    assert len(between) == model.shape.layers - 1
    compared, start = 0, 0
    for length in batch.slots:
        ids = batch.branch_ids[0, start : start + length]
        ids = ids[ids != encoder.pad]
        with torch.no_grad():
            theirs = logits_of(torch.cat([batch.prefix_ids, ids])[None])[0, -len(ids) :]
        torch.testing.assert_close(ours[start : start + len(ids)], theirs, atol=2e-3, rtol=2e-3)
        compared += len(ids)
        start += length
    assert compared > 60
