# SPDX-License-Identifier: Apache-2.0
"""The hybrid's training model is transformers' LFM2-VL, with the prompts that users send."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training.comparison import assert_branches_equal, pictures
from training.data import Mixture, collate
from training.hybrid.export import export
from training.hybrid.model import HybridEncoder, HybridReader, HybridShape
from training.hybrid.train import HINT_LAYERS, STAGES
from training.pages import Layout, generate

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
    pixels = processor.image_processor(pictures(document), return_tensors="pt")
    assert_branches_equal(model, ENCODER, batch, lambda ids: loaded(input_ids=ids, **pixels).logits)


def test_hints_are_asked_of_layers_with_full_attention() -> None:
    assert set(HINT_LAYERS) < set(SHAPE.full_attention)


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_stages_are_those_of_the_page_reader_in_fewer_steps(stage) -> None:
    assert stage.steps < 500
