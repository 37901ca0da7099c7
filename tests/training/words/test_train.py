# SPDX-License-Identifier: Apache-2.0
"""Batches are pages with their tokens, losses fall, and an interrupted training continues."""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training.data import IGNORED
from training.tokenizer import build_tokenizer
from training.words.data import CHARACTERS, Alphabet, Batches, patches
from training.words.render import CELL, GRID
from training.words.train import Targets, Trainer, embedding_table, learning_rate, shape_for, train

WIDTH = 64
TOKENIZER = build_tokenizer()
COUNTS = Counter(TOKENIZER("What is the value of K7? K7 names a key.")["input_ids"])


@pytest.fixture(scope="module")
def alphabet() -> Alphabet:
    return Alphabet(build_tokenizer(), COUNTS)


def table_of(alphabet: Alphabet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 1 + 0.3 * torch.randn(alphabet.blank, WIDTH, generator=generator)


def test_a_batch_depends_on_its_index(alphabet: Alphabet) -> None:
    stream = Batches(alphabet, seed=0, pages=2)
    first, again, second = stream.batch(0), stream.batch(0), stream.batch(1)
    assert first.pages.shape == (2, GRID, GRID, CELL**2)
    assert torch.equal(first.pages, again.pages) and torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, second.tokens)


def test_ink_is_where_the_tokens_are(alphabet: Alphabet) -> None:
    """Cells that end a page early are labelled as blank, and only those are."""
    batch = Batches(alphabet, seed=0, pages=16).batch(0)
    pages = batch.pages.flatten(1, 2).float()
    contrast = pages.median(-1).values - pages.amin(-1)
    paper = batch.tokens == alphabet.blank
    assert paper.any() and not paper.all()
    for levels, blank in zip(contrast, paper, strict=True):
        if blank.any():
            assert levels[blank].max() < levels[~blank].min()
            assert (blank.long().diff() >= 0).all()


def test_spelling_is_what_a_cell_shows(alphabet: Alphabet) -> None:
    token = TOKENIZER(" value")["input_ids"][0]
    text = "".join(map(chr, alphabet.spelling[token]))
    assert text.rstrip() == TOKENIZER.decode([token]).rstrip()
    assert set(alphabet.spelling[alphabet.blank].tolist()) == {ord(" ")}
    assert alphabet.spelling.max() < CHARACTERS
    special = TOKENIZER.all_special_ids[0]
    assert special not in alphabet.ids
    assert (alphabet.spelling[special] == IGNORED).all()


def test_tokens_of_the_text_are_frequent(alphabet: Alphabet) -> None:
    text, mixed = alphabet.probabilities
    assert text.sum() == pytest.approx(1) and mixed.sum() == pytest.approx(1)
    in_text = np.isin(alphabet.ids, list(COUNTS))
    assert (text > 0).tolist() == in_text.tolist()
    assert mixed.min() > 0 and mixed[in_text].sum() >= 0.75


def test_patches_are_cells() -> None:
    page = np.arange((2 * CELL) ** 2).reshape(2 * CELL, 2 * CELL)
    assert np.array_equal(patches(page)[1, 0].reshape(CELL, CELL), page[CELL:, :CELL])


def test_the_nearest_vector_is_read(alphabet: Alphabet) -> None:
    table = table_of(alphabet)
    table[alphabet.ids[0]] *= 3  # has the largest product with many others
    targets = Targets(table, alphabet.ids)
    ids = torch.from_numpy(alphabet.ids)
    noise = 0.05 * torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(1))
    assert torch.equal(targets.nearest(table[ids] + noise)[:, 0], ids)
    entropy, distance, right = targets.losses(table[ids], ids)
    assert right.all() and distance < 1e-6 and entropy < 0.1


def test_losses_fall(alphabet: Alphabet) -> None:
    torch.manual_seed(0)
    small = replace(shape_for(WIDTH), vision_width=64, vision_heads=2, vision_mlp=256)
    trainer = Trainer(Targets(table_of(alphabet), alphabet.ids), alphabet, small, 1e-2)
    batch = Batches(alphabet, seed=0, pages=1).batch(0)
    before, *_, after = (trainer.step(batch, 1e-2, 0.1) for _ in range(30))
    assert after["hint"] < 0.5 * before["hint"]
    assert after["read"] > before["read"] + 0.2


def test_an_interrupted_training_continues(tmp_path: Path) -> None:
    model = tmp_path / "model"
    TOKENIZER.save_pretrained(model)
    weights = {"language_model.model.embed_tokens.weight": torch.randn(len(TOKENIZER), WIDTH)}
    save_file(weights, model / "model.safetensors")
    assert embedding_table(model).shape == (len(TOKENIZER), WIDTH)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps(COUNTS))
    options = argparse.Namespace(
        language_model=model,
        counts=counts,
        out=tmp_path / "out",
        seed=0,
        threads=1,
        lr=1e-3,
        steps=2,
        pages=1,
        log_every=1,
        save_every=1,
    )
    train(options)
    options.steps = 3
    train(options)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").open()]
    assert [line["step"] for line in log] == [1, 2, 3]
    checkpoint = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3


def test_learning_rate() -> None:
    rates = [learning_rate(step, 1000, 2.0) for step in range(1000)]
    assert rates[0] < rates[49] == rates[500] == 2.0
    assert rates[999] < 0.01 and rates[700] > rates[800] > rates[900]
