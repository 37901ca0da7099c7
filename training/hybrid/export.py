# SPDX-License-Identifier: Apache-2.0
"""Exports the hybrid reader as a Hugging Face checkpoint that vLLM can serve.

python -m training.hybrid.export build/hybrid-reader models/hybrid-reader
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    PreTrainedTokenizerFast,
    Siglip2VisionConfig,
)

from training.data import MEAN, STD
from training.export import MAX_POSITION, write_files, write_weights
from training.hybrid.model import IMAGE_END, IMAGE_START, HybridEncoder, HybridShape
from training.tokenizer import CHAT_TEMPLATE, END, IMAGE, PAD, build_tokenizer


def configuration(shape: HybridShape, tokenizer: PreTrainedTokenizerFast) -> Lfm2VlConfig:
    end, pad, image = tokenizer.convert_tokens_to_ids([END, PAD, IMAGE])
    text = Lfm2Config(
        architectures=["Lfm2ForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITION,
        norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        conv_L_cache=shape.kernel,
        conv_bias=False,
        conv_dim=shape.width,
        block_dim=shape.width,
        block_ff_dim=shape.mlp,
        block_auto_adjust_ff_dim=False,
        layer_types=[
            "full_attention" if i in shape.full_attention else "conv" for i in range(shape.layers)
        ],
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        tie_word_embeddings=True,
    )
    vision = Siglip2VisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        num_patches=shape.grid**2,
        patch_size=shape.patch,
        hidden_act="quick_gelu",
        layer_norm_eps=shape.norm_eps,
        vision_use_head=False,
    )
    return Lfm2VlConfig(
        architectures=["Lfm2VlForConditionalGeneration"],
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        image_token_id=image,
        projector_hidden_size=shape.width,
        projector_use_layernorm=False,
        downsample_factor=1,
        tie_word_embeddings=True,
    )


def processor(shape: HybridShape, tokenizer: PreTrainedTokenizerFast) -> Lfm2VlProcessor:
    images = Lfm2VlImageProcessor(
        encoder_patch_size=shape.patch,
        downsample_factor=1,
        do_image_splitting=False,
        min_tiles=1,
        max_tiles=1,
        tile_size=shape.grid * shape.patch,
        min_image_tokens=1,
        max_image_tokens=shape.grid**2,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return Lfm2VlProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def checkpoint(state: dict[str, Tensor], shape: HybridShape) -> dict[str, Tensor]:
    """The weights of a state dict in the layout of a published checkpoint."""
    name = "model.vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights = {k: v for k, v in state.items() if k != "lm_head.weight"}  # tied
    # The processor's patches have their channels last.
    patch = weights[name].unflatten(1, (3, shape.patch, shape.patch))
    return weights | {name: patch.permute(0, 2, 3, 1).flatten(1)}


def export(
    state: dict[str, Tensor], shape: HybridShape, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config, weights, tokenizer, processor and chat template to the folder ``out``."""
    tokenizer = build_tokenizer((IMAGE_START, IMAGE_END))
    write_files(configuration(shape, tokenizer), processor(shape, tokenizer), out, dtype)
    write_weights(checkpoint(state, shape), out, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="output folder of training.hybrid.train")
    parser.add_argument("out", type=Path, help="folder for the Hugging Face checkpoint")
    options = parser.parse_args(arguments)
    saved = torch.load(options.training / "checkpoint.pt", weights_only=True)
    export(saved["trainer"]["model"], HybridShape(vocab=HybridEncoder().vocab), options.out)
    shutil.copyfile(options.training / "log.jsonl", options.out / "training.jsonl")
    print(f"step {saved['step']} -> {options.out}")


if __name__ == "__main__":
    main()
