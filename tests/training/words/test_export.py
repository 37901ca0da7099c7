# SPDX-License-Identifier: Apache-2.0
"""Joined to a language model, the exported tower reads in transformers as it did in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from training.words.data import normalised, patches
from training.words.export import export, join
from training.words.render import CELL, GRID
from training.words.train import WordReader, shape_for

WIDTH = 64


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    """A tiny LLaVA with another vision tower."""
    text = LlamaConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_hidden_layers=1,
        image_size=28,
        patch_size=14,
        projection_dim=32,
        model_type="clip_vision_model",
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=299)
    model = LlavaForConditionalGeneration(config)
    folder = tmp_path / "language-model"
    folder.mkdir()
    config.save_pretrained(folder)
    language = {
        f"language_model.model.{k}": v for k, v in model.model.language_model.state_dict().items()
    }
    language["language_model.lm_head.weight"] = model.lm_head.weight.detach()
    save_file(language, folder / "model.safetensors", {"format": "pt"})
    (folder / "processor_config.json").write_text(json.dumps({"image_token": "<image>"}))
    return folder


def test_transformers_reads_as_the_training_model(tmp_path: Path, language_model: Path) -> None:
    torch.manual_seed(0)
    shape = shape_for(WIDTH)
    model = WordReader(shape)
    export(model.state_dict(), shape, tmp_path / "tower", torch.float32)
    joined = tmp_path / "joined"
    join(tmp_path / "tower", language_model, joined)

    loaded, info = LlavaForConditionalGeneration.from_pretrained(
        joined, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    page = np.random.default_rng(0).integers(0, 256, (GRID * CELL, GRID * CELL), np.uint8)
    image = Image.fromarray(page).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(joined)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features, _ = model(normalised(torch.from_numpy(patches(page))[None]))
        found = loaded.get_image_features(pixel_values=pixels)
    found = getattr(found, "pooler_output", found)
    torch.testing.assert_close(torch.stack(list(found)), features, rtol=1e-4, atol=1e-4)
    assert loaded.config.image_seq_length == GRID**2
