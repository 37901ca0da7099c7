# SPDX-License-Identifier: Apache-2.0
"""A small LLaVA for the check: a folder without weights, and a loader that generates them.

vLLM's own dummy weights are close to zero, so that attention is uniform. With these weights it is
far from uniform, and its density differs between layers.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "vl-cache-check"
PATCH_SIZE = 14
VOCAB_SIZE = 320
BOS, EOS, IMAGE, PAD = 1, 2, 3, 4
_SPECIAL = {"<unk>": 0, "<s>": BOS, "</s>": EOS, "<image>": IMAGE, "<pad>": PAD}
_LOGIT_STD = (1.1, 5.0)
"""Standard deviation of attention logits in the layer of the widest and of the sharpest attention.
"""


def random_parameter(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random values of a parameter such that outputs have about unit variance if inputs have.

    They are drawn on the CPU and depend only on the name and the shape, so that every engine and
    every device gets the same.

    Args:
        name: of the parameter, in vLLM's model.
        like: the parameter.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if like.ndim < 2:
        return (1 if name.endswith("weight") else 0) + 0.1 * noise  # norms and biases
    if "embed" in name and like.ndim == 2:
        return noise
    inputs = like.shape[-1] if like.ndim == 3 else like[0].numel()  # 3: experts
    return noise / math.sqrt(inputs)


@register_model_loader(LOAD_FORMAT)
class GeneratedWeightsLoader(BaseModelLoader):
    """Fills all parameters with `random_parameter`, and sharpens attention layer by layer."""

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, parameter))
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        low, high = _LOGIT_STD
        for index, layer in enumerate(layers):
            # Neighbours differ: wide and sharp attention in turns.
            step = (index * 7 % len(layers)) / max(1, len(layers) - 1)
            layer.impl.scale = layer.head_size**-0.5 * low * (high / low) ** step


@dataclass(frozen=True)
class ModelSize:
    """What differs between the check of a GPU and its tests on a CPU."""

    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    image_size: int = 336
    """Pixels a side; an image has ``(image_size / 14) ** 2`` tokens."""


def write_model(folder: Path, size: ModelSize) -> None:
    """Write config, tokenizer and image processor; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _SPECIAL | {f"w{i}": i for i in range(len(_SPECIAL), VOCAB_SIZE)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(folder)
    square = {"height": size.image_size, "width": size.image_size}
    _write(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": PATCH_SIZE,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "size": {"shortest_edge": size.image_size},
            "crop_size": square,
        },
    )
    _write(folder / "config.json", _config(size))


def _config(size: ModelSize) -> dict[str, Any]:
    hidden_size = size.num_heads * size.head_size
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 64,
        "image_size": size.image_size,
        "patch_size": PATCH_SIZE,
    }
    text = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "tie_word_embeddings": False,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": IMAGE,
        "image_seq_length": (size.image_size // PATCH_SIZE) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def request(size: ModelSize, seed: int, num_images: int, num_words: int) -> dict[str, Any]:
    """A request for ``LLM.generate``: images, then words.

    Args:
        size: of the model.
        seed: of the images and the words.
        num_images: at the start of the prompt.
        num_words: tokens after the images.
    """
    numbers = np.random.default_rng(seed)
    words = numbers.integers(len(_SPECIAL), VOCAB_SIZE, num_words).tolist()
    prompt: dict[str, Any] = {"prompt_token_ids": [BOS, *[IMAGE] * num_images, *words]}
    if num_images:
        shape = size.image_size, size.image_size
        images = []
        for _ in range(num_images):
            corners = Image.fromarray(numbers.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            images.append(corners.resize(shape, Image.Resampling.BICUBIC))
        prompt["multi_modal_data"] = {"image": images}
    return prompt
