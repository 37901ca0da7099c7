# SPDX-License-Identifier: Apache-2.0
"""A LLaVA of the 0.5B class without weights, for speed alone: ``--load-format dummy``.

The language model has Qwen2-0.5B's shape. The vision tower is a tiny one: what it costs is the same
with and without eviction, and on a CPU a real one would drown what is measured.

    python -m benchmarks.shape DIRECTORY
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks import tiny_models

QUESTION = "Describe everything that you can see in the pictures, from left to right."
IMAGE_SIZE = 448  # pixels a side
VISUAL_TOKENS = (IMAGE_SIZE // 14) ** 2  # of an image

_TEXT: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def build(path: Path) -> Path:
    """Write config, tokenizer and processor."""
    tiny_models.build("llava", path, image_size=IMAGE_SIZE)
    (path / "model.safetensors").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    tokens = {k: v for k, v in config["text_config"].items() if k.endswith("_token_id")}
    config["text_config"] = _TEXT | tokens
    config["tie_word_embeddings"] = True
    config["dtype"] = "bfloat16"
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return path


def ending_bias(path: Path, mean: float) -> dict[str, float]:
    """``logit_bias`` that ends answers after so many tokens on average, at temperature 1.

    Without weights all tokens are equally likely: the lengths follow a geometric distribution.
    """
    end = json.loads((path / "config.json").read_text())["text_config"]["eos_token_id"]
    return {str(end): math.log((_TEXT["vocab_size"] - 1) / (mean - 1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="DIRECTORY")
    print(build(parser.parse_args().path))


if __name__ == "__main__":
    main()
