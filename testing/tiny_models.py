# SPDX-License-Identifier: Apache-2.0
"""Tiny vision-language checkpoints with random weights that vLLM and transformers can load.

The models are not trained, but they use a KV cache like a trained model. Attention is far from
uniform, its density differs between layers, and greedy outputs depend on the image and do not
repeat one token. A checkpoint depends only on its parameters.

    python -m testing.tiny_models llava /tmp/tiny-llava
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MinistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.initialization import no_init_weights

_STAMP = "tiny_model.json"

# --------------------------------------------------------------------------------------------------
# Tokenizer: one token per byte, with the byte as its id, and special tokens. Text of n ASCII
# characters has n tokens.

_PAD, _BOS, _EOS = "<pad>", "<s>", "</s>"
_IM_START, _IM_END = "<|im_start|>", "<|im_end|>"
_IMAGE = "<image>"
_VISION_START, _VISION_END = "<|vision_start|>", "<|vision_end|>"
_IMAGE_PAD, _VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
_SPECIAL_TOKENS = (
    _PAD,
    _BOS,
    _EOS,
    _IM_START,
    _IM_END,
    _IMAGE,
    _VISION_START,
    _VISION_END,
    _IMAGE_PAD,
    _VIDEO_PAD,
)
_TOKEN_ID = {token: 256 + i for i, token in enumerate(_SPECIAL_TOKENS)}
_VOCAB_SIZE = 320
_PRINTABLE = range(0x20, 0x7F)


def _byte_vocabulary() -> dict[str, int]:
    """The character of byte-level BPE for each byte: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_in = iter(range(0x100, 0x200))
    return {chr(b if b in printable else next(stand_in)): b for b in range(256)}


def byte_tokenizer(
    special_tokens: Sequence[str],
    eos_token: str,
    named: Mapping[str, str] | None = None,
    ids: Mapping[str, int] | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer without merges. The id of a byte is its value, of a special token 256 + index.

    Args:
        special_tokens: in the order of their ids.
        eos_token: one of them.
        named: special tokens that a processor needs by name, such as "image_token".
        ids: other ids of some special tokens.
    """
    vocabulary = _byte_vocabulary()
    if ids:
        vocabulary |= {token: 256 + i for i, token in enumerate(special_tokens)} | {**ids}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=eos_token,
        pad_token=_PAD,
        additional_special_tokens=[t for t in special_tokens if t not in (_PAD, _BOS, eos_token)],
        clean_up_tokenization_spaces=False,
        model_specific_special_tokens=dict(named or {}),
    )


def _tokenizer(eos_token: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(_SPECIAL_TOKENS, eos_token)


# --------------------------------------------------------------------------------------------------
# Prompts

_LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_SYSTEM = f"{_IM_START}system\nYou are a helpful assistant.{_IM_END}\n"
_QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _llava_prompt(question: str, num_images: int) -> str:
    return f"USER: {(_IMAGE + chr(10)) * num_images}{question} ASSISTANT:"


def _qwen_prompt(question: str, num_images: int) -> str:
    images = f"{_VISION_START}{_IMAGE_PAD}{_VISION_END}" * num_images
    return f"{_QWEN_SYSTEM}{_IM_START}user\n{images}{question}{_IM_END}\n{_IM_START}assistant\n"


# --------------------------------------------------------------------------------------------------
# Configurations and processors

_PATCH_SIZE = 14
_MERGE_SIZE = 2
_VISION_HIDDEN = 64
_VISION_HEADS = 2
_VISION_LAYERS = 2
_WINDOW = 100  # tokens in the window of sliding-window layers


@dataclass(frozen=True)
class _ModelShape:
    """The parameters of a checkpoint; also the contents of its stamp."""

    kind: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    image_size: int
    seed: int
    max_position: int
    sharpen: float

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_size


def _text_config(shape: _ModelShape, eos_token: str) -> dict[str, Any]:
    return dict(
        vocab_size=_VOCAB_SIZE,
        hidden_size=shape.hidden_size,
        intermediate_size=2 * shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.max_position,
        rms_norm_eps=1e-5,
        bos_token_id=_TOKEN_ID[_BOS],
        eos_token_id=_TOKEN_ID[eos_token],
        pad_token_id=_TOKEN_ID[_PAD],
        tie_word_embeddings=False,
    )


def _llava_arguments(shape: _ModelShape) -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=_VISION_HIDDEN,
        intermediate_size=2 * _VISION_HIDDEN,
        num_attention_heads=_VISION_HEADS,
        num_hidden_layers=_VISION_LAYERS,
        projection_dim=_VISION_HIDDEN,
        image_size=shape.image_size,
        patch_size=_PATCH_SIZE,
    )
    text = LlamaConfig(**_text_config(shape, _EOS), head_dim=shape.head_size)
    return dict(
        vision_config=vision,
        text_config=text,
        image_token_index=_TOKEN_ID[_IMAGE],
        image_seq_length=(shape.image_size // _PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def _llava_config(shape: _ModelShape) -> PreTrainedConfig:
    return LlavaConfig(**_llava_arguments(shape), architectures=["LlavaForConditionalGeneration"])


def _hybrid_llava_config(shape: _ModelShape) -> PreTrainedConfig:
    """Every second layer has a sliding window, which is shorter than any prompt with an image."""
    kinds = ("sliding_attention", "full_attention")
    text = MinistralConfig(
        **_text_config(shape, _EOS),
        head_dim=shape.head_size,
        layer_types=[kinds[layer % 2] for layer in range(shape.num_layers)],
        sliding_window=_WINDOW,
        architectures=["MistralForCausalLM"],
    )
    return LlavaConfig(
        **_llava_arguments(shape) | dict(text_config=text),
        architectures=["LlavaForConditionalGeneration"],
    )


def _pinpoints(shape: _ModelShape) -> list[list[int]]:
    """Tilings as [height, width]: the first three of LLaVA-1.6, with up to 2 x 2 tiles."""
    n = shape.image_size
    return [[n, 2 * n], [2 * n, n], [2 * n, 2 * n]]


def _llava_next_config(shape: _ModelShape) -> PreTrainedConfig:
    return LlavaNextConfig(
        **_llava_arguments(shape),
        image_grid_pinpoints=_pinpoints(shape),
        architectures=["LlavaNextForConditionalGeneration"],
    )


def _qwen_arguments(shape: _ModelShape) -> dict[str, Any]:
    half = shape.head_size // 2
    time = half // 4
    height = (half - time) // 2
    text = _text_config(shape, _IM_END) | dict(
        rope_parameters=dict(
            rope_type="default",
            rope_theta=1e6,
            mrope_section=[time, height, half - time - height],
        ),
    )
    return dict(
        text_config=text,
        image_token_id=_TOKEN_ID[_IMAGE_PAD],
        video_token_id=_TOKEN_ID[_VIDEO_PAD],
        vision_start_token_id=_TOKEN_ID[_VISION_START],
        vision_end_token_id=_TOKEN_ID[_VISION_END],
        bos_token_id=_TOKEN_ID[_BOS],
        eos_token_id=_TOKEN_ID[_IM_END],
        pad_token_id=_TOKEN_ID[_PAD],
        tie_word_embeddings=False,
    )


def _qwen2_vl_config(shape: _ModelShape) -> PreTrainedConfig:
    vision = dict(
        depth=_VISION_LAYERS,
        embed_dim=_VISION_HIDDEN,
        hidden_size=shape.hidden_size,
        num_heads=_VISION_HEADS,
        mlp_ratio=2,
        patch_size=_PATCH_SIZE,
        spatial_merge_size=_MERGE_SIZE,
    )
    return Qwen2VLConfig(
        vision_config=vision,
        **_qwen_arguments(shape),
        architectures=["Qwen2VLForConditionalGeneration"],
    )


def _qwen2_5_vl_config(shape: _ModelShape) -> PreTrainedConfig:
    vision = dict(
        depth=_VISION_LAYERS,
        hidden_size=_VISION_HIDDEN,
        intermediate_size=2 * _VISION_HIDDEN,
        out_hidden_size=shape.hidden_size,
        num_heads=_VISION_HEADS,
        patch_size=_PATCH_SIZE,
        spatial_merge_size=_MERGE_SIZE,
        # As in the published tower, some layers have full and the others windowed attention.
        fullatt_block_indexes=[_VISION_LAYERS - 1],
        window_size=112,
    )
    return Qwen2_5_VLConfig(
        vision_config=vision,
        **_qwen_arguments(shape),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )


def _llava_processor(shape: _ModelShape) -> ProcessorMixin:
    n = shape.image_size
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": n}, crop_size={"height": n, "width": n}
        ),
        tokenizer=_tokenizer(_EOS),
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT_TEMPLATE,
    )


def _llava_next_processor(shape: _ModelShape) -> ProcessorMixin:
    n = shape.image_size
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": n},
            crop_size={"height": n, "width": n},
            image_grid_pinpoints=_pinpoints(shape),
        ),
        tokenizer=_tokenizer(_EOS),
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA_CHAT_TEMPLATE,
    )


def _qwen_processor(
    processor_class: type[Qwen2VLProcessor] | type[Qwen2_5_VLProcessor],
) -> Callable[[_ModelShape], ProcessorMixin]:
    def make(shape: _ModelShape) -> ProcessorMixin:
        pixels = {
            "shortest_edge": (shape.image_size // 2) ** 2,
            "longest_edge": shape.image_size**2,
        }
        return processor_class(
            image_processor=Qwen2VLImageProcessor(
                size=dict(pixels), patch_size=_PATCH_SIZE, merge_size=_MERGE_SIZE
            ),
            tokenizer=_tokenizer(_IM_END),
            video_processor=Qwen2VLVideoProcessor(
                size=dict(pixels),
                patch_size=_PATCH_SIZE,
                merge_size=_MERGE_SIZE,
                cap_pixels_per_frame=True,
            ),
            chat_template=_QWEN_CHAT_TEMPLATE,
        )

    return make


@dataclass(frozen=True)
class _Kind:
    """What differs between architectures. ``image_size`` is the default, in pixels a side."""

    config: Callable[[_ModelShape], PreTrainedConfig]
    processor: Callable[[_ModelShape], ProcessorMixin]
    prompt: Callable[[str, int], str]
    image_size: int
    image_size_multiple: int


_KINDS: Mapping[str, _Kind] = {
    "llava": _Kind(_llava_config, _llava_processor, _llava_prompt, 224, _PATCH_SIZE),
    "llava-next": _Kind(_llava_next_config, _llava_next_processor, _llava_prompt, 84, _PATCH_SIZE),
    "llava-hybrid": _Kind(_hybrid_llava_config, _llava_processor, _llava_prompt, 224, _PATCH_SIZE),
    "qwen2-vl": _Kind(
        _qwen2_vl_config,
        _qwen_processor(Qwen2VLProcessor),
        _qwen_prompt,
        448,
        _PATCH_SIZE * _MERGE_SIZE,
    ),
    "qwen2.5-vl": _Kind(
        _qwen2_5_vl_config,
        _qwen_processor(Qwen2_5_VLProcessor),
        _qwen_prompt,
        448,
        _PATCH_SIZE * _MERGE_SIZE,
    ),
}
KINDS: tuple[str, ...] = tuple(_KINDS)

# --------------------------------------------------------------------------------------------------
# Weights

# Standard deviations of attention logits (before `sharpen`): from almost uniform attention to
# attention to a few tokens.
_LOGIT_STD = (1.1, 5.0)
# Gains relative to unit variance. They make the outputs of attention and MLP large compared with
# the token embedding, so that the next token does not depend on the last one alone.
_GAINS = {
    "o_proj.weight": 1.4,
    "down_proj.weight": 4.0,
    "linear_2.weight": 2.0,
    "merger.mlp.2.weight": 2.0,
    "position_embedding.weight": 0.3,
    "lm_head.weight": 2.0,
}


def logit_std(num_layers: int, sharpen: float = 1.0) -> list[float]:
    """Intended standard deviation of each decoder layer's attention logits.

    The values form a geometric sequence between the bounds of ``_LOGIT_STD``. They are ordered such
    that adjacent layers differ: 4 layers get the second, fourth, first and third value.
    """
    low, high = _LOGIT_STD
    steps = max(num_layers - 1, 1)
    values = [sharpen * low * (high / low) ** (i / steps) for i in range(num_layers)]
    return values[1::2] + values[0::2]


def _layer_index(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _initial_value(name: str, like: torch.Tensor, seed: int, qk_std: list[float]) -> torch.Tensor:
    """Random float32 values of a parameter; they depend on its name, its shape and the seed."""
    # The CPU generator uses only the lower 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if name.endswith(".bias"):
        return 0.1 * noise
    if "norm" in name or name.endswith("merger.ln_q.weight"):
        return 1 + 0.1 * noise
    gain = next((g for suffix, g in _GAINS.items() if name.endswith(suffix)), 1.0)
    if like.ndim == 1 or "embed_tokens" in name or "position_embedding" in name:
        return gain * noise
    if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
        # q.k / sqrt(head_size) has unit variance if q and k have.
        gain = math.sqrt(qk_std[_layer_index(name)])
    return gain * noise / math.sqrt(like[0].numel())


def _varied_head(lm_head: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """An output layer whose greedy outputs neither end early nor repeat one token.

    The token's own embedding, which the residual stream still contains, is subtracted from each
    row, so that the last token is an unlikely next token. Rows of tokens other than printable ASCII
    are zero, and a logit of 0 is far below the maximum. Therefore greedy outputs do not end early,
    and equal text means equal tokens.

    Args:
        lm_head: [vocabulary, hidden].
        embedding: [vocabulary, hidden].
    """
    scale = lm_head.norm(dim=1, keepdim=True) / embedding.norm(dim=1, keepdim=True)
    printable = torch.zeros(lm_head.shape[0], 1)
    printable[_PRINTABLE.start : _PRINTABLE.stop] = 1
    return printable * (lm_head - scale * embedding)


def _state_dict(config: PreTrainedConfig, shape: _ModelShape) -> dict[str, torch.Tensor]:
    """Weights by the names of the parameters in transformers."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForImageTextToText.from_config(config)
    qk_std = logit_std(shape.num_layers, shape.sharpen)
    state = {
        name: _initial_value(name, parameter, shape.seed, qk_std)
        for name, parameter in model.named_parameters()
    }
    embedding = state["model.language_model.embed_tokens.weight"]
    state["lm_head.weight"] = _varied_head(state["lm_head.weight"], embedding)
    return state


def _checkpoint_name(name: str) -> str:
    """The name of a parameter in the checkpoint.

    transformers 5 removed a level of the CLIP tower that vLLM expects. transformers also accepts
    the published name, because its CLIPVisionModel removes the prefix on load.
    """
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.", 1)


# --------------------------------------------------------------------------------------------------
# Public functions


def build(
    kind: str,
    path: str | Path,
    *,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 32,
    image_size: int | None = None,
    seed: int = 0,
    max_position: int = 8192,
    sharpen: float = 1.0,
) -> Path:
    """Write a checkpoint to ``path``, unless it contains the same checkpoint already.

    The number of visual tokens of an image depends on ``image_size``:
        llava: (image_size / 14) ** 2, for every image;
        llava-next: the same for the overview, plus up to 2 x 2 tiles depending on the aspect ratio;
        qwen: one token per 28 x 28 pixels, for images of up to image_size ** 2 pixels.

    Args:
        kind: one of ``KINDS``.
        path: folder to write.
        image_size: pixels a side.
        sharpen: factor of the standard deviation of all attention logits (see `logit_std`).

    Raises:
        ValueError: for an unknown kind or impossible sizes.
        FileExistsError: if ``path`` contains anything that this module did not write.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind {kind!r}, expected one of {', '.join(KINDS)}")
    shape = _ModelShape(
        kind=kind,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        image_size=_KINDS[kind].image_size if image_size is None else image_size,
        seed=seed,
        max_position=max_position,
        sharpen=sharpen,
    )
    _check(shape)
    path = Path(path)
    # A hash of this file identifies the version of the generator.
    stamp = asdict(shape) | {"source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}
    if _read_stamp(path) != stamp:
        _replace(path, shape, stamp)
    return path


def load_transformers(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint into transformers with eager attention.

    Raises:
        RuntimeError: if weights are missing or unused.
    """
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    model, info = loaded
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if problems:
        raise RuntimeError(f"{path}: weights do not fit the model: {problems}")
    return model.eval()


def prompt_for(kind: str, question: str, num_images: int = 1) -> str:
    """A prompt for ``LLM.generate`` with images first, equal to that of the chat template."""
    return _KINDS[kind].prompt(question, num_images)


def random_image(seed: int, size: tuple[int, int] = (448, 336)) -> Image.Image:
    """A random RGB image of ``size`` (width, height): gradient, rectangles, ellipses and noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    image = corners.resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse) * 5:
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(width // 10 + 1, width // 3 + 2), rng.integers(1, height // 3 + 2)
        box = (int(x - w // 2), int(y - h // 2), int(x + w // 2), int(y + h // 2))
        shape(box, fill=tuple(map(int, rng.integers(0, 256, 3))))
    grain = rng.normal(0, 16, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))


# --------------------------------------------------------------------------------------------------
# Files


def _check(shape: _ModelShape) -> None:
    multiple = _KINDS[shape.kind].image_size_multiple
    if shape.image_size % multiple:
        raise ValueError(
            f"{shape.kind}: image_size {shape.image_size} is not a multiple of {multiple}"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise ValueError(f"{shape.num_heads} heads cannot share {shape.num_kv_heads} KV heads")


def _read_stamp(path: Path) -> dict[str, object] | None:
    try:
        return json.loads((path / _STAMP).read_text())
    except FileNotFoundError:
        return None


def _replace(path: Path, shape: _ModelShape, stamp: dict[str, object]) -> None:
    """Write to a temporary folder and rename it: other processes see only complete checkpoints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        fresh = Path(scratch) / "model"
        _write(fresh, shape)
        (fresh / _STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        if _read_stamp(path) is not None:
            shutil.rmtree(path, ignore_errors=True)
        try:
            os.rename(fresh, path)
        except OSError as error:
            # Another process may have written the same checkpoint in the meantime.
            if _read_stamp(path) != stamp:
                raise FileExistsError(
                    f"{path} exists and was not written by this module"
                ) from error


def _write(path: Path, shape: _ModelShape) -> None:
    kind = _KINDS[shape.kind]
    config = kind.config(shape)
    config.dtype = torch.float32
    config.save_pretrained(path)
    kind.processor(shape).save_pretrained(path)
    text = config.get_text_config()
    GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    ).save_pretrained(path)
    state = {_checkpoint_name(name): value for name, value in _state_dict(config, shape).items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    for name, default in {
        "num-layers": 4,
        "num-heads": 4,
        "num-kv-heads": 2,
        "head-size": 32,
        "image-size": None,
        "seed": 0,
        "max-position": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sharpen", type=float, default=1.0)
    options = vars(parser.parse_args(arguments))
    print(build(options.pop("kind"), options.pop("out"), **options))


if __name__ == "__main__":
    main()
