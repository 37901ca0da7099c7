# SPDX-License-Identifier: Apache-2.0
"""Exports the word reader, and joins it to its language model as one checkpoint for vLLM.

python -m training.words.export build/word-reader models/word-reader
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.export import image_processor, save_weights, vision_config
from training.model import Shape
from training.words.data import MEAN, STD
from training.words.train import WordReader, shape_for

TOWER = "vision_tower.vision_model."
EMBEDDINGS = TOWER + "embeddings."


def export(
    state: dict[str, Tensor], shape: Shape, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write weights, vision config and image processor to the folder ``out``.

    Args:
        state: of `WordReader`.
        shape: of `WordReader`.
        out: is created.
        dtype: of the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = vision_config(shape)
    config.dtype = dtype
    config.save_pretrained(out)
    image_processor(shape, MEAN, STD).save_pretrained(out)
    # A grey pixel has three equal channels.
    state = dict(state)
    grey = state.pop(EMBEDDINGS + "patches.weight").view(-1, 1, shape.patch, shape.patch) / 3
    state[EMBEDDINGS + "patch_embedding.weight"] = grey.expand(-1, 3, -1, -1)
    save_weights(state, TOWER, shape, out, dtype)


def load(tower: Path) -> WordReader:
    """The model that `export` wrote, in float32."""
    state = {k: v.float() for k, v in load_file(tower / "model.safetensors").items()}
    conv = state.pop(EMBEDDINGS + "patch_embedding.weight")
    state[EMBEDDINGS + "patches.weight"] = conv.sum(1).flatten(1)
    model = WordReader(shape_for(len(state["multi_modal_projector.linear_2.bias"])))
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert all("post_layernorm" in name for name in unexpected), unexpected
    return model.eval()


def join(tower: Path, model: Path, out: Path) -> None:
    """Write a LLaVA checkpoint with another vision tower and projector.

    Args:
        tower: folder that `export` wrote.
        model: a LLaVA checkpoint around the language model that the tower was trained for.
        out: folder of the joint checkpoint.
    """
    unchanged = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(model, out, ignore=unchanged, dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    language = {k: v for k, v in weights.items() if k.startswith("language_model.")}
    dtype = next(iter(language.values())).dtype
    read = {k: v.to(dtype) for k, v in load_file(tower / "model.safetensors").items()}
    save_file(language | read, out / "model.safetensors", metadata={"format": "pt"})
    vision = json.loads((tower / "config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    config["vision_config"] = vision
    config |= {
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = json.loads((model / "processor_config.json").read_text())
    images = json.loads((tower / "preprocessor_config.json").read_text())
    processor |= {"image_processor": images, "patch_size": vision["patch_size"]}
    (out / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("training", type=Path, help="output folder of training.words.refine")
    parser.add_argument("out", type=Path, help="folder for tower and projector")
    options = parser.parse_args(arguments)
    saved = torch.load(options.training / "refined.pt", weights_only=True)
    state = saved["trainer"]["model"]
    export(state, shape_for(len(state["multi_modal_projector.linear_2.bias"])), options.out)
    shutil.copyfile(options.training / "log.jsonl", options.out / "training.jsonl")
    print(f"step {saved['step']} -> {options.out}")


if __name__ == "__main__":
    main()
