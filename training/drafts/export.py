# SPDX-License-Identifier: Apache-2.0
"""Exports an EAGLE-3 head as a checkpoint that vLLM can use for drafts.

python -m training.drafts.export build/page-reader-eagle3 models/page-reader-eagle3
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from training.drafts.model import AUX_LAYERS
from training.export import llama_config, write_weights
from training.model import Shape
from training.tokenizer import build_tokenizer


def configuration(shape: Shape) -> LlamaConfig:
    return llama_config(
        shape,
        architectures=["LlamaForCausalLMEagle3"],
        draft_vocab_size=shape.vocab,
        num_hidden_layers=1,
        eagle_aux_hidden_state_layer_ids=[*AUX_LAYERS],
    )


def export(
    state: dict[str, Tensor], shape: Shape, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config and weights to the folder ``out``; the embeddings are those of the reader."""
    config = configuration(shape)
    config.dtype = dtype
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    write_weights(state, out, dtype)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="output folder of training.drafts.train")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    options = parser.parse_args(arguments)
    saved = torch.load(options.training / "checkpoint.pt", weights_only=True)
    export(saved["trainer"]["model"], Shape(vocab=len(build_tokenizer())), options.out)
    shutil.copyfile(options.training / "log.jsonl", options.out / "training.jsonl")
    print(f"step {saved['step']} -> {options.out}")


if __name__ == "__main__":
    main()
