# SPDX-License-Identifier: Apache-2.0
"""LLaVA checkpoints without weights for speed measurements, to load with ``--load-format dummy``.

The language model has the shape of Qwen2-0.5B or of a 7B model: that of LLaVA-1.5 (multi-head
attention) or of LLaVA-NeXT with Mistral (grouped-query attention). The vision tower is tiny. Its
cost does not depend on eviction, and on a CPU a real one would dominate the measurement.

    python -m benchmarks.shape DIRECTORY [--shape 7b-mha]
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from testing import tiny_models

QUESTION = "Describe everything that you can see in the pictures, from left to right."
IMAGE_SIZE = 448  # pixels a side
VISUAL_TOKENS = (IMAGE_SIZE // 14) ** 2  # per image

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 32064,
    "max_position_embeddings": 1 << 18,  # longer than in training, for long prompts
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "0.5b": {
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
    },
    "7b-mha": _LLAMA,
    "7b-gqa": _LLAMA | {"num_key_value_heads": 8, "intermediate_size": 14336},
}
"""Configs of the language models, by name."""


def build(path: Path, name: str = "0.5b") -> Path:
    """Write config, tokenizer and processor of a model to a folder."""
    tiny_models.build("llava", path, image_size=IMAGE_SIZE)
    (path / "model.safetensors").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    tokens = {k: v for k, v in config["text_config"].items() if k.endswith("_token_id")}
    config["text_config"] = TEXT_CONFIGS[name] | tokens
    config["tie_word_embeddings"] = TEXT_CONFIGS[name]["tie_word_embeddings"]
    config["dtype"] = "bfloat16"
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return path


def ending_bias(path: Path, mean: float) -> dict[str, float]:
    """``logit_bias`` that gives outputs a mean length of ``mean`` tokens at temperature 1.

    With dummy weights all tokens are equally likely, so the lengths are geometrically distributed.
    """
    text = json.loads((path / "config.json").read_text())["text_config"]
    return {str(text["eos_token_id"]): math.log((text["vocab_size"] - 1) / (mean - 1))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, metavar="DIRECTORY")
    parser.add_argument("--shape", choices=TEXT_CONFIGS, default="0.5b")
    options = parser.parse_args()
    print(build(options.path, options.shape))


if __name__ == "__main__":
    main()
