# SPDX-License-Identifier: Apache-2.0
"""The parts that are refined are the upper part of the model, and they come closer."""

from collections import Counter

import numpy as np
import torch

from training.tokenizer import build_tokenizer
from training.words.data import Alphabet, normalised, patches
from training.words.refine import Upper, lower
from training.words.train import WordReader, shape_for


@torch.no_grad()
def test_lower_and_upper_part_are_the_model() -> None:
    torch.manual_seed(0)
    model = WordReader(shape_for(64))
    tokenizer = build_tokenizer()
    alphabet = Alphabet(tokenizer, Counter(tokenizer("What is the value?")["input_ids"]), True)
    page, _ = alphabet.page(np.random.default_rng(0))
    grey = torch.from_numpy(patches(page))[None]
    expected, _ = model(normalised(grey))
    torch.testing.assert_close(Upper(model)(lower(model, grey)), expected.flatten(0, 1))


def test_only_the_text_occurs() -> None:
    tokenizer = build_tokenizer()
    counts = Counter(tokenizer("What is the value?")["input_ids"])
    alphabet = Alphabet(tokenizer, counts, only_text=True)
    assert set(alphabet.ids.tolist()) == set(counts)
    _, tokens = alphabet.page(np.random.default_rng(0))
    assert set(tokens.tolist()) <= {*counts, alphabet.blank}
