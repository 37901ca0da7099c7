# SPDX-License-Identifier: Apache-2.0
"""The hybrid's training model is transformers' LFM2-VL, with the prompts that users send."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from training.data import Mixture, collate, normalised
from training.hybrid.export import export
from training.hybrid.model import HybridEncoder, HybridReader, HybridShape
from training.hybrid.train import HINT_LAYERS, STAGES
from training.pages import Layout, generate
from training.render import render

ENCODER = HybridEncoder()
SHAPE = HybridShape(vocab=ENCODER.vocab, vision_layers=1)
MIXTURE = Mixture((("lookup", 2, 20), ("row", 1, 46), ("which", 2, 13)))
TWO_PAGES = Layout(num_pages=(2, 2), num_rows=(1, 1))


def test_a_prompt_is_that_of_the_chat_template(tmp_path: Path) -> None:
    export(HybridReader(SHAPE).state_dict(), SHAPE, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which page has K7?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    prefix, positions = ENCODER.prefix(2, 20)
    images = [[Image.new("RGB", (280, 280))] * 2]
    ids = processor(text=[text], images=images, return_tensors="pt")["input_ids"][0]
    assert ids[: len(prefix)].tolist() == prefix.tolist()
    assert len(positions) == 800 and ids[-1] == ENCODER.assistant


def test_equals_transformers(tmp_path: Path) -> None:
    """Logits of each branch are those of the single question, asked with real pictures."""
    torch.manual_seed(0)
    model = HybridReader(SHAPE).eval()
    export(model.state_dict(), SHAPE, tmp_path, torch.float32)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path)
    document = generate("unit", 0, TWO_PAGES)
    batch = collate([document], ENCODER, MIXTURE, random.Random(0))
    rng = random.Random(0)
    images = [Image.fromarray(render(p, rng.getrandbits(32))) for p in document.pages]
    with torch.no_grad():
        features = model.features(normalised(batch.pages[0])).flatten(0, 1)[None]
        hidden, between = model(
            features, batch.prefix_ids, batch.image_positions, batch.branch_ids, batch.slots
        )
        ours = model.lm_head(hidden)[0]
    assert len(between) == SHAPE.layers - 1
    pixels = processor.image_processor(images, return_tensors="pt")
    compared, start = 0, 0
    for length in batch.slots:
        ids = batch.branch_ids[0, start : start + length]
        ids = ids[ids != ENCODER.pad]
        with torch.no_grad():
            theirs = loaded(input_ids=torch.cat([batch.prefix_ids, ids])[None], **pixels).logits[
                0, -len(ids) :
            ]
        torch.testing.assert_close(ours[start : start + len(ids)], theirs, atol=2e-3, rtol=2e-3)
        compared += len(ids)
        start += length
    assert compared > 60


def test_hints_are_asked_of_layers_with_full_attention() -> None:
    assert set(HINT_LAYERS) < set(SHAPE.full_attention)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_stages_are_those_of_the_page_reader_in_fewer_steps(stage) -> None:
    assert stage.steps < 500
