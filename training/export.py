# SPDX-License-Identifier: Apache-2.0
"""Exports a training checkpoint as a Hugging Face checkpoint that vLLM can serve.

python -m training.export build/page-reader models/page-reader
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from training.data import MEAN, STD
from training.model import Shape
from training.tokenizer import CHAT_TEMPLATE, END, IMAGE, PAD, build_tokenizer

MAX_POSITION = 2048


def vision_config(shape: Shape) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp,
        num_attention_heads=shape.vision_heads,
        num_hidden_layers=shape.vision_layers,
        projection_dim=shape.vision_width,
        image_size=shape.grid * shape.patch,
        patch_size=shape.patch,
        layer_norm_eps=shape.norm_eps,
    )


def image_processor(shape: Shape, mean: float, std: float) -> CLIPImageProcessor:
    """A processor for images of the tower's size, with one mean and deviation for all channels."""
    side = shape.grid * shape.patch
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[mean] * 3,
        image_std=[std] * 3,
    )


def save_weights(
    state: dict[str, Tensor], tower: str, shape: Shape, out: Path, dtype: torch.dtype
) -> None:
    """Write the weights of a model with a vision tower to ``out / "model.safetensors"``.

    Args:
        state: of the model.
        tower: prefix of the names of the tower's weights, with a dot at the end.
        shape: of the model.
        out: folder.
        dtype: of the weights in the file.
    """
    # LLaVA uses the output of the last layer without this norm, but loaders require its parameters.
    norm = tower + "post_layernorm."
    width = shape.vision_width
    unused = {norm + "weight": torch.ones(width), norm + "bias": torch.zeros(width)}
    write_weights(state | unused, out, dtype)


def write_weights(weights: dict[str, Tensor], out: Path, dtype: torch.dtype) -> None:
    """Write weights, as they are named in the checkpoint, to ``out / "model.safetensors"``."""
    weights = {k: v.detach().to(dtype).contiguous() for k, v in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # readable for other users


def write_files(config: Any, processor: ProcessorMixin, out: Path, dtype: torch.dtype) -> None:
    """Write all but the weights of a checkpoint to the folder ``out``, which is made."""
    config.dtype = dtype
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    processor.save_pretrained(out)
    GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
        do_sample=False,
    ).save_pretrained(out)


def llama_config(shape: Shape, **fields: Any) -> LlamaConfig:
    """A decoder of the shape's sizes; ``fields`` are added and replace those of the shape."""
    values = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=MAX_POSITION,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**{**values, **fields})


def configuration(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    end, pad, image = tokenizer.convert_tokens_to_ids([END, PAD, IMAGE])
    text = llama_config(shape, eos_token_id=end, pad_token_id=pad)
    return LlavaConfig(
        vision_config=vision_config(shape),
        text_config=text,
        image_token_index=image,
        image_seq_length=shape.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
    )


def processor(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=image_processor(shape, MEAN, STD),
        tokenizer=tokenizer,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def export(
    state: dict[str, Tensor], shape: Shape, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config, weights, tokenizer, processor and chat template to the folder ``out``."""
    tokenizer = build_tokenizer()
    write_files(configuration(shape, tokenizer), processor(shape, tokenizer), out, dtype)
    save_weights(state, "model.vision_tower.vision_model.", shape, out, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="output folder of training.train")
    parser.add_argument("out", type=Path, help="folder for the Hugging Face checkpoint")
    options = parser.parse_args(arguments)
    saved = torch.load(options.training / "checkpoint.pt", weights_only=True)
    shape = Shape(vocab=len(build_tokenizer()))
    export(saved["trainer"]["model"], shape, options.out)
    shutil.copyfile(options.training / "log.jsonl", options.out / "training.jsonl")
    print(f"step {saved['step']} -> {options.out}")


if __name__ == "__main__":
    main()
