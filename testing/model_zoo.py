# SPDX-License-Identifier: Apache-2.0
"""Tiny vision-language models of many architectures: config, processor and tokenizer.

They have no weights; `testing.random_weights` generates them when vLLM loads the model. The kinds
of `testing.tiny_models` are included.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedTokenizerFast, ProcessorMixin

from testing import tiny_models

_SPECIAL_TOKENS = (
    "<pad>",
    "<s>",
    "</s>",
    "\n",
    "\n\n",
    "\n\n\n",
    "\n\n\n\n",
    "<unk>",
    "<image>",
    "<video>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "<|image|>",
    "<|video|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<|image_start|>",
    "<|image_end|>",
    "<|patch|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|START_OF_IMG|>",
    "<|END_OF_IMG|>",
    "<|IMG_PATCH|>",
    "<|IMG_LINE_BREAK|>",
    "</image>",
    "<im_start>",
    "<im_end>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 3) for column in range(1, 3)),
    "<|img_thumbnail|>",
    "<|imgpad|>",
    "<|VISION_START|>",
    "<|VISION_END|>",
    "<|IMAGE_PAD|>",
    "<|VIDEO_PAD|>",
    "<im_patch>",
    "<patch_start>",
    "<patch_end>",
    "<patch_newline>",
    "<slice>",
    "</slice>",
    "<image_id>",
    "</image_id>",
    "<|vision_pad|>",
    "<|media_placeholder|>",
    "<|vid_start|>",
    "<|vid_end|>",
    "<|vid_frame_separator|>",
    "<|media_begin|>",
    "<|media_content|>",
    "<|media_pad|>",
    "<|media_end|>",
    "<|image@placeholder|>",
    "<|video@placeholder|>",
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<im_col>",
    "<low_res_im_start>",
    "<frame_start>",
    "<frame_end>",
    "<im_low>",
    "<|endoftext|>",
    "<|spk_bos|>",
    "<|spk_eos|>",
)
_ID = {token: 256 + i for i, token in enumerate(_SPECIAL_TOKENS)}
_VOCAB_SIZE = 384
_REMOTE_CODE = Path(__file__).with_name("remote_code.py")

_IDS = dict(bos_token_id=_ID["<s>"], eos_token_id=_ID["</s>"], pad_token_id=_ID["<pad>"])
_HIDDEN = 128
_HYBRID = ["sliding_attention", "full_attention"] * 2
_VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, patch_size=14
)


def _text(model_type: str, **changed: Any) -> dict[str, Any]:
    """Text config with four layers, in which two query heads share a KV head."""
    return (
        dict(
            model_type=model_type,
            vocab_size=_VOCAB_SIZE,
            hidden_size=_HIDDEN,
            intermediate_size=2 * _HIDDEN,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            **_IDS,
        )
        | changed
    )


def _vision(model_type: str, **changed: Any) -> dict[str, Any]:
    return dict(model_type=model_type) | _VISION | changed


@dataclass(frozen=True)
class _Parts:
    """Parts of a processor that vLLM puts together."""

    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor

    def save_pretrained(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        config: contents of ``config.json``.
        processor: creates the processor from a tokenizer, or returns the tokenizer or the parts if
            vLLM creates the processor.
        placeholder: text that the processor replaces by the tokens of an image; empty if it puts
            them before all text. A ``#`` stands for the number of the image.
        image: the complete text of an image.
        tokens: special tokens that the processor needs by name.
        max_images: maximum number of images in a prompt, at most two.
        files: further JSON files of the checkpoint.
        dtype: a type that vLLM's CPU kernels of this architecture support.
        modality: vLLM's name for images.
        options: arguments of `vllm.LLM` that vLLM or the plugin needs.
        only_images: whether the stand-in of the published processor takes nothing else.
        token_ids: ids of special tokens that vLLM hard-codes.
    """

    config: Mapping[str, Any]
    processor: Callable[
        [PreTrainedTokenizerFast], ProcessorMixin | PreTrainedTokenizerFast | _Parts
    ]
    placeholder: str
    image: str = "{}\n"
    tokens: Mapping[str, str] = field(default_factory=dict)
    max_images: int = 2
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: str = "float32"
    modality: str = "image"
    options: Mapping[str, Any] = field(default_factory=dict)
    only_images: bool = False
    token_ids: Mapping[str, int] = field(default_factory=dict)


_QWEN_IDS = dict(
    image_token_id=_ID["<|image_pad|>"],
    video_token_id=_ID["<|video_pad|>"],
    vision_start_token_id=_ID["<|vision_start|>"],
    vision_end_token_id=_ID["<|vision_end|>"],
)
_MROPE = dict(rope_type="default", rope_theta=1e6, mrope_section=[6, 5, 5])


def _qwen3_vl(architecture: str, model_type: str, **text: Any) -> Kind:
    return Kind(
        config=dict(
            architectures=[architecture],
            model_type=model_type,
            text_config=_text(
                f"{model_type}_text", rope_parameters=_MROPE | dict(mrope_interleaved=True), **text
            ),
            vision_config=dict(
                model_type=f"{model_type}_vision",
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                num_heads=2,
                out_hidden_size=_HIDDEN,
                deepstack_visual_indexes=[0, 1],
            ),
            **_QWEN_IDS,
        ),
        processor=lambda tokenizer: transformers.Qwen3VLProcessor(
            transformers.Qwen2VLImageProcessor(
                patch_size=16, size=dict(shortest_edge=64**2, longest_edge=512**2)
            ),
            tokenizer,
            transformers.Qwen3VLVideoProcessor(),
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
    )


_OMNI_TOKENS = dict(
    image_token="<|image_pad|>",
    video_token="<|video_pad|>",
    audio_token="<|AUDIO|>",
    vision_bos_token="<|vision_start|>",
    vision_eos_token="<|vision_end|>",
    audio_bos_token="<|audio_bos|>",
    audio_eos_token="<|audio_eos|>",
)


def _qwen2_5_omni() -> Kind:
    """Its vision configuration is part of the thinker's; what listens and speaks is not used."""
    return Kind(
        config=dict(
            architectures=["Qwen2_5OmniModel"],
            model_type="qwen2_5_omni",
            enable_audio_output=False,
            thinker_config=dict(
                model_type="qwen2_5_omni_thinker",
                text_config=_text("qwen2_5_omni_text", rope_parameters=_MROPE),
                vision_config=dict(
                    model_type="qwen2_5_omni_vision_encoder",
                    depth=2,
                    hidden_size=64,
                    intermediate_size=128,
                    num_heads=2,
                    out_hidden_size=_HIDDEN,
                    fullatt_block_indexes=[1],
                ),
                audio_config=dict(
                    model_type="qwen2_5_omni_audio_encoder",
                    d_model=64,
                    encoder_layers=2,
                    encoder_attention_heads=2,
                    encoder_ffn_dim=128,
                    output_dim=_HIDDEN,
                ),
                image_token_index=_ID["<|image_pad|>"],
                video_token_index=_ID["<|video_pad|>"],
                audio_token_index=_ID["<|AUDIO|>"],
                vision_start_token_id=_ID["<|vision_start|>"],
                vision_end_token_id=_ID["<|vision_end|>"],
                audio_start_token_id=_ID["<|audio_bos|>"],
                audio_end_token_id=_ID["<|audio_eos|>"],
            ),
        ),
        processor=lambda tokenizer: transformers.Qwen2_5OmniProcessor(
            transformers.Qwen2VLImageProcessor(
                size=dict(shortest_edge=56 * 56, longest_edge=448 * 448)
            ),
            transformers.Qwen2VLVideoProcessor(),
            transformers.WhisperFeatureExtractor(feature_size=128),
            tokenizer,
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        tokens=_OMNI_TOKENS,
    )


def _qwen3_omni() -> Kind:
    """Its vision configuration is part of the thinker's; what listens and speaks is not used."""
    return Kind(
        config=dict(
            architectures=["Qwen3OmniMoeForConditionalGeneration"],
            model_type="qwen3_omni_moe",
            enable_audio_output=False,
            thinker_config=dict(
                model_type="qwen3_omni_moe_thinker",
                text_config=_text(
                    "qwen3_omni_moe_text",
                    rope_parameters=_MROPE | dict(mrope_interleaved=True),
                    num_experts=4,
                    num_experts_per_tok=2,
                    moe_intermediate_size=64,
                ),
                vision_config=dict(
                    model_type="qwen3_omni_moe_vision_encoder",
                    depth=2,
                    hidden_size=64,
                    intermediate_size=128,
                    num_heads=2,
                    out_hidden_size=_HIDDEN,
                    deepstack_visual_indexes=[0, 1],
                    image_size=768,
                    apply_vit_abs_pos_embed=True,
                ),
                audio_config=dict(
                    model_type="qwen3_omni_moe_audio_encoder",
                    d_model=64,
                    encoder_layers=2,
                    encoder_attention_heads=2,
                    encoder_ffn_dim=128,
                    downsample_hidden_size=32,
                    output_dim=_HIDDEN,
                ),
                **_QWEN_IDS,
                audio_token_id=_ID["<|AUDIO|>"],
                audio_start_token_id=_ID["<|audio_bos|>"],
                audio_end_token_id=_ID["<|audio_eos|>"],
            ),
        ),
        processor=lambda tokenizer: transformers.Qwen3OmniMoeProcessor(
            transformers.Qwen2VLImageProcessor(
                patch_size=16, size=dict(shortest_edge=64**2, longest_edge=512**2)
            ),
            transformers.Qwen2VLVideoProcessor(),
            transformers.WhisperFeatureExtractor(feature_size=128),
            tokenizer,
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        tokens=_OMNI_TOKENS,
    )


def _internvl() -> Kind:
    side = 224
    return Kind(
        config=dict(
            architectures=["InternVLForConditionalGeneration"],
            model_type="internvl",
            text_config=_text("qwen2"),
            vision_config=_vision("internvl_vision", image_size=[side, side], patch_size=[14, 14]),
            image_token_id=_ID["<IMG_CONTEXT>"],
            image_seq_length=64,
        ),
        processor=lambda tokenizer: transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(
                size=dict(height=side, width=side), crop_to_patches=True, max_patches=4
            ),
            tokenizer,
            transformers.InternVLVideoProcessor(size=dict(height=side, width=side)),
            image_seq_length=64,
        ),
        placeholder="<IMG_CONTEXT>",
        tokens=dict(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
    )


def _code(processor: str, image_processor: str | None = None) -> dict[str, dict[str, Any]]:
    """Files that name classes of `testing.remote_code`."""
    auto_map = {"AutoProcessor": f"remote_code.{processor}"}
    files = {"processor_config.json": dict(processor_class=processor, auto_map=auto_map)}
    if image_processor:
        auto_map = {"AutoImageProcessor": f"remote_code.{image_processor}"}
        files["preprocessor_config.json"] = dict(
            image_processor_type=image_processor, auto_map=auto_map
        )
    return files


def _idefics3(name: str, *video: Callable[[], Any]) -> Kind:
    side = 168
    make_images = getattr(transformers, f"{name}ImageProcessor")
    make = getattr(transformers, f"{name}Processor")
    return Kind(
        config=dict(
            architectures=[f"{name}ForConditionalGeneration"],
            model_type=name.lower(),
            text_config=_text("llama"),
            vision_config=_vision(f"{name.lower()}_vision", image_size=side),
            image_token_id=_ID["<image>"],
            scale_factor=2,
            pad_token_id=_ID["<pad>"],
        ),
        processor=lambda tokenizer: make(
            make_images(size=dict(longest_edge=2 * side), max_image_size=dict(longest_edge=side)),
            tokenizer,
            *(make_videos() for make_videos in video),
            image_seq_len=(side // 14 // 2) ** 2,
        ),
        placeholder="<image>",
    )


def _pixtral(architecture: str, model_type: str, text: str, merge: int, **changed: Any) -> Kind:
    return Kind(
        config=dict(
            architectures=[architecture],
            model_type=model_type,
            text_config=_text(text, sliding_window=None),
            vision_config=_vision("pixtral", image_size=224 * merge, patch_size=16, head_dim=32),
            image_token_index=_ID["[IMG]"],
        )
        | changed,
        processor=lambda tokenizer: transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(
                patch_size=dict(height=16, width=16), size=dict(longest_edge=224 * merge)
            ),
            tokenizer,
            patch_size=16,
            spatial_merge_size=merge,
        ),
        placeholder="[IMG]",
    )


def _llava_onevision(architecture: str, model_type: str, text: str, **changed: Any) -> Kind:
    side = 112
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    return Kind(
        config=dict(
            architectures=[architecture],
            model_type=model_type,
            text_config=_text(text),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            image_token_index=_ID["<image>"],
            video_token_index=_ID["<video>"],
            image_grid_pinpoints=pinpoints,
        )
        | changed,
        processor=lambda tokenizer: transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(
                size=dict(height=side, width=side), image_grid_pinpoints=pinpoints
            ),
            tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=dict(height=side, width=side)),
            num_image_tokens=(side // 14) ** 2,
            vision_feature_select_strategy="full",
        ),
        placeholder="<image>",
    )


def _glm4v(architecture: str, model_type: str, **text: Any) -> Kind:
    return Kind(
        config=dict(
            architectures=[architecture],
            model_type=model_type,
            text_config=_text(
                f"{model_type}_text",
                rope_parameters=_MROPE | dict(partial_rotary_factor=0.5, mrope_section=[4, 2, 2]),
                **text,
            ),
            vision_config=dict(
                model_type=f"{model_type}_vision",
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                num_heads=2,
                out_hidden_size=_HIDDEN,
                image_size=336,
            ),
            image_token_id=_ID["<|image|>"],
            video_token_id=_ID["<|video|>"],
            image_start_token_id=_ID["<|begin_of_image|>"],
            image_end_token_id=_ID["<|end_of_image|>"],
            video_start_token_id=_ID["<|begin_of_video|>"],
            video_end_token_id=_ID["<|end_of_video|>"],
        ),
        processor=lambda tokenizer: transformers.Glm4vProcessor(
            transformers.Glm4vImageProcessor(
                size=dict(shortest_edge=112 * 112, longest_edge=448 * 448)
            ),
            tokenizer,
            transformers.Glm4vVideoProcessor(),
        ),
        placeholder="<|image|>",
        image="<|begin_of_image|>{}<|end_of_image|>",
    )


def _gemma3() -> Kind:
    side = 224
    return Kind(
        config=dict(
            architectures=["Gemma3ForConditionalGeneration"],
            model_type="gemma3",
            text_config=_text("gemma3_text", sliding_window=128, layer_types=_HYBRID),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            mm_tokens_per_image=64,
            boi_token_index=_ID["<start_of_image>"],
            eoi_token_index=_ID["<end_of_image>"],
            image_token_index=_ID["<image_soft_token>"],
        ),
        processor=lambda tokenizer: transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size=dict(height=side, width=side)),
            tokenizer,
            image_seq_length=64,
        ),
        placeholder="<start_of_image>",
        image="{}",
        tokens=dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
    )


def _gemma4(**text: Any) -> Kind:
    """Heads of full attention are twice as large as those with a window, as published."""
    layers = dict(enumerate(_HYBRID))
    full = {f"{n:02}": dict(head_dim=512) for n, kind in layers.items() if kind == _HYBRID[1]}
    return Kind(
        config=dict(
            architectures=["Gemma4ForConditionalGeneration"],
            model_type="gemma4",
            text_config=_text(
                "gemma4_text",
                head_dim=256,
                per_layer_config=full,
                sliding_window=128,
                layer_types=_HYBRID,
                hidden_size_per_layer_input=0,
                vocab_size_per_layer_input=_VOCAB_SIZE,
                tie_word_embeddings=True,
            )
            | text,
            vision_config=_vision(
                "gemma4_vision",
                head_dim=32,
                num_key_value_heads=2,
                patch_size=16,
                default_output_length=70,
            ),
            audio_config=None,
            image_token_id=_ID["<image_soft_token>"],
            boi_token_id=_ID["<start_of_image>"],
            eoi_token_id=_ID["<end_of_image>"],
            video_token_id=_ID["<|video|>"],
            audio_token_id=_ID["<|AUDIO|>"],
            boa_token_id=_ID["<|audio_bos|>"],
            eoa_token_index=_ID["<|audio_eos|>"],
        ),
        processor=lambda tokenizer: transformers.Gemma4Processor(
            transformers.Gemma4AudioFeatureExtractor(),
            transformers.Gemma4ImageProcessor(max_soft_tokens=70),
            tokenizer,
            transformers.Gemma4VideoProcessor(),
        ),
        placeholder="<image_soft_token>",
        tokens=dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
            audio_token="<|AUDIO|>",
            boa_token="<|audio_bos|>",
            eoa_token="<|audio_eos|>",
        ),
    )


def _gemma4_shared() -> Kind:
    """As E2B and E4B: the later layers read the cache of the last earlier one of their kind."""
    layers = _HYBRID * 3
    full = {f"{n:02}": dict(head_dim=512) for n, kind in enumerate(layers) if kind == _HYBRID[1]}
    return _gemma4(
        num_hidden_layers=len(layers),
        layer_types=layers,
        num_kv_shared_layers=6,
        per_layer_config=full,
        hidden_size_per_layer_input=16,
        use_double_wide_mlp=True,
    )


def _gemma4_unified() -> Kind:
    """Without a vision encoder: patches are projected, and images attend in both directions."""
    kind = _gemma4()
    per_layer = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")
    text = {k: v for k, v in kind.config["text_config"].items() if k not in per_layer}
    unified = dict(
        architectures=["Gemma4UnifiedForConditionalGeneration"],
        model_type="gemma4_unified",
        text_config=text | dict(model_type="gemma4_unified_text"),
        vision_config=dict(
            model_type="gemma4_unified_vision",
            mm_embed_dim=_HIDDEN,
            output_proj_dims=_HIDDEN,
            num_soft_tokens=70,
        ),
    )
    return replace(
        kind,
        config=kind.config | unified,
        processor=lambda tokenizer: transformers.Gemma4UnifiedProcessor(
            transformers.Gemma4UnifiedAudioFeatureExtractor(),
            transformers.Gemma4UnifiedImageProcessor(max_soft_tokens=70),
            tokenizer,
            transformers.Gemma4UnifiedVideoProcessor(),
        ),
    )


def _gemma3n() -> Kind:
    """The later layers read the cache of the last earlier one of their kind."""
    layers = _HYBRID * 3
    return Kind(
        config=dict(
            architectures=["Gemma3nForConditionalGeneration"],
            model_type="gemma3n",
            text_config=_text(
                "gemma3n_text",
                num_hidden_layers=len(layers),
                layer_types=layers,
                num_kv_shared_layers=6,
                sliding_window=128,
                vocab_size_per_layer_input=_VOCAB_SIZE,
                hidden_size_per_layer_input=16,
                activation_sparsity_pattern=[0.95] * 2 + [0.0] * 10,
                laurel_rank=16,
                tie_word_embeddings=True,
            ),
            vision_config=dict(
                model_type="gemma3n_vision",
                architecture="mobilenetv5_300m_enc",
                vocab_size=128,
                vocab_offset=_ID["<pad>"],
            ),
            audio_config=dict(
                model_type="gemma3n_audio",
                vocab_size=128,
                vocab_offset=_ID["<pad>"],
                hidden_size=64,
                conf_num_attention_heads=2,
                conf_num_hidden_layers=2,
            ),
            boi_token_id=_ID["<start_of_image>"],
            eoi_token_id=_ID["<end_of_image>"],
            image_token_id=_ID["<image_soft_token>"],
            boa_token_id=_ID["<|audio_bos|>"],
            eoa_token_id=_ID["<|audio_eos|>"],
            audio_token_id=_ID["<|AUDIO|>"],
        ),
        processor=lambda tokenizer: transformers.Gemma3nProcessor(
            transformers.Gemma3nAudioFeatureExtractor(),
            transformers.SiglipImageProcessor(size=dict(height=768, width=768)),
            tokenizer,
        ),
        placeholder="<image_soft_token>",
        image="{}",
        tokens=dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
            audio_token="<|AUDIO|>",
            boa_token="<|audio_bos|>",
            eoa_token="<|audio_eos|>",
        ),
    )


def _blip2() -> Kind:
    return Kind(
        config=dict(
            architectures=["Blip2ForConditionalGeneration"],
            model_type="blip-2",
            text_config=_text("opt", ffn_dim=256, word_embed_proj_dim=_HIDDEN),
            vision_config=_vision("blip_2_vision_model", image_size=224),
            qformer_config=dict(
                model_type="blip_2_qformer",
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=128,
                encoder_hidden_size=64,
            ),
            image_token_index=_ID["<image>"],
            num_query_tokens=256,
        ),
        processor=lambda tokenizer: transformers.Blip2Processor(
            transformers.BlipImageProcessor(size=dict(height=224, width=224)),
            tokenizer,
            num_query_tokens=256,
        ),
        placeholder="",
        image="",
        max_images=1,
    )


def _aria() -> Kind:
    return Kind(
        config=dict(
            architectures=["AriaForConditionalGeneration"],
            model_type="aria",
            text_config=_text("aria_text", moe_num_experts=4, intermediate_size=64),
            vision_config=_vision("idefics3_vision", image_size=490),
            projector_patch_to_query_dict={"1225": 128, "4900": 256},
            image_token_index=_ID["<image>"],
        ),
        processor=lambda tokenizer: transformers.AriaProcessor(
            transformers.AriaImageProcessor(max_image_size=490),
            tokenizer,
        ),
        placeholder="<image>",
        tokens=dict(image_token="<image>"),
    )


def _paligemma() -> Kind:
    side = 224
    images = transformers.SiglipImageProcessor(size=dict(height=side, width=side))
    images.image_seq_length = 256
    return Kind(
        config=dict(
            architectures=["PaliGemmaForConditionalGeneration"],
            model_type="paligemma",
            text_config=_text("gemma"),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            image_token_index=_ID["<image>"],
            projection_dim=_HIDDEN,
            hidden_size=_HIDDEN,
            vocab_size=_VOCAB_SIZE,
        ),
        processor=lambda tokenizer: transformers.PaliGemmaProcessor(images, tokenizer),
        placeholder="",
        image="",
        max_images=1,
        tokens=dict(image_token="<image>"),
    )


def _cohere2_vision() -> Kind:
    side = 224
    return Kind(
        config=dict(
            architectures=["Cohere2VisionForConditionalGeneration"],
            model_type="cohere2_vision",
            text_config=_text("cohere2", sliding_window=128, layer_types=_HYBRID),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            alignment_intermediate_size=256,
            image_token_id=_ID["<|IMG_PATCH|>"],
        ),
        processor=lambda tokenizer: transformers.Cohere2VisionProcessor(
            transformers.Cohere2VisionImageProcessor(
                size=dict(height=side, width=side), max_patches=4, patch_size=8
            ),
            tokenizer,
        ),
        placeholder="<|IMG_PATCH|>",
        tokens=dict(
            image_token="<|IMG_PATCH|>",
            boi_token="<|START_OF_IMG|>",
            eoi_token="<|END_OF_IMG|>",
            img_line_break_token="<|IMG_LINE_BREAK|>",
        ),
    )


def _aya_vision() -> Kind:
    side = 224
    return Kind(
        config=dict(
            architectures=["AyaVisionForConditionalGeneration"],
            model_type="aya_vision",
            text_config=_text("cohere2", sliding_window=128, layer_types=_HYBRID),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            image_token_index=_ID["<|IMG_PATCH|>"],
        ),
        processor=lambda tokenizer: transformers.AyaVisionProcessor(
            transformers.GotOcr2ImageProcessor(
                size=dict(height=side, width=side), crop_to_patches=True, max_patches=4
            ),
            tokenizer,
            patch_size=14,
            img_size=side,
            downsample_factor=2,
        ),
        placeholder="<image>",
    )


def _llama4() -> Kind:
    side = 224
    return Kind(
        config=dict(
            architectures=["Llama4ForConditionalGeneration"],
            model_type="llama4",
            text_config=_text(
                "llama4_text",
                intermediate_size_mlp=256,
                num_local_experts=4,
                attention_chunk_size=256,
            ),
            vision_config=_vision(
                "llama4_vision_model",
                image_size=side,
                intermediate_size=256,
                vision_output_dim=64,
                projector_input_dim=64,
                projector_output_dim=64,
            ),
            boi_token_index=_ID["<|image_start|>"],
            eoi_token_index=_ID["<|image_end|>"],
            image_token_index=_ID["<|patch|>"],
        ),
        processor=lambda tokenizer: transformers.Llama4Processor(
            transformers.Llama4ImageProcessor(size=dict(height=side, width=side), max_patches=4),
            tokenizer,
        ),
        placeholder="<|image|>",
    )


_QWEN3_5_MOE = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
)


def _qwen3_5(architecture: str, model_type: str, **text: Any) -> Kind:
    kind = _qwen3_vl(architecture, model_type, **text)
    kind.config["vision_config"] |= dict(deepstack_visual_indexes=[])
    # Every fourth layer has full attention. A block has as many bytes as a state: 64 tokens here.
    kind.config["text_config"] |= dict(
        num_hidden_layers=8,
        head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        rope_parameters=_MROPE | dict(partial_rotary_factor=0.25),
    )
    return replace(kind, dtype="bfloat16")


def _glm_4v_9b() -> Kind:
    return Kind(
        config=dict(
            architectures=["GLM4VForCausalLM"],
            model_type="chatglm",
            padded_vocab_size=_VOCAB_SIZE,
            hidden_size=_HIDDEN,
            ffn_hidden_size=2 * _HIDDEN,
            num_layers=4,
            num_attention_heads=4,
            kv_channels=32,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,
            seq_length=8192,
            tie_word_embeddings=False,
            pad_token_id=_ID["<|endoftext|>"],
            boi_token_id=_ID["<|begin_of_image|>"],
            eoi_token_id=_ID["<|end_of_image|>"],
            vision_config=dict(
                dropout_prob=0.0,
                hidden_act="gelu",
                hidden_size=64,
                image_size=448,
                in_channels=3,
                intermediate_size=128,
                layer_norm_eps=1e-6,
                num_heads=2,
                num_hidden_layers=2,
                num_positions=1025,
                patch_size=14,
                scaling_factor=8,
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|begin_of_image|><|endoftext|><|end_of_image|>",
        image="{}",
        max_images=1,
    )


def _lfm2_vl() -> Kind:
    """Short convolutions beside full attention."""
    return Kind(
        config=dict(
            architectures=["Lfm2VlForConditionalGeneration"],
            model_type="lfm2_vl",
            text_config=_text(
                "lfm2",
                layer_types=["conv", "full_attention"] * 2,
                block_dim=_HIDDEN,
                block_ff_dim=2 * _HIDDEN,
                block_auto_adjust_ff_dim=False,
                conv_dim=_HIDDEN,
            ),
            vision_config=_vision(
                "siglip2_vision_model", patch_size=16, num_patches=256, vision_use_head=False
            ),
            image_token_id=_ID["<image>"],
            projector_hidden_size=64,
        ),
        processor=lambda tokenizer: transformers.Lfm2VlProcessor(
            transformers.Lfm2VlImageProcessor(
                tile_size=256, max_tiles=4, min_image_tokens=16, max_image_tokens=64
            ),
            tokenizer,
        ),
        placeholder="<image>",
    )


def _nemotron_nano_vl() -> Kind:
    """Mamba-2 beside full attention. vLLM gives the encoder one of four sizes."""
    return Kind(
        config=dict(
            architectures=["NemotronH_Nano_VL_V2"],
            model_type="NemotronH_Nano_VL_V2",
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            text_config=_text(
                "nemotron_h",
                architectures=["NemotronHForCausalLM"],
                dtype="bfloat16",
                num_hidden_layers=8,
                layers_block_type=["linear_attention", "full_attention"] * 4,
                head_dim=128,
                mamba_num_heads=4,
                mamba_head_dim=64,
                ssm_state_size=32,
                n_groups=2,
            ),
            vision_config=dict(
                model_type="c_radio", patch_size=16, args=dict(model="vit_small_patch16_224")
            ),
            vit_hidden_size=384,
            projector_hidden_size=64,
            patch_size=16,
            force_image_size=224,
            downsample_ratio=0.5,
            ps_version="v2",
            template=None,
            image_tag_type="internvl",
            use_thumbnail=True,
            norm_mean=[0.5] * 3,
            norm_std=[0.5] * 3,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
        dtype="bfloat16",
    )


def _paddleocr_vl() -> Kind:
    return Kind(
        config=dict(
            architectures=["PaddleOCRVLForConditionalGeneration"],
            model_type="paddleocr_vl",
            text_config=_text("paddleocr_vl_text", rope_parameters=_MROPE),
            vision_config=_vision("paddleocr_vl_vision", image_size=224),
            **_QWEN_IDS,
        ),
        processor=lambda tokenizer: transformers.PaddleOCRVLProcessor(
            transformers.PaddleOCRVLImageProcessor(
                size=dict(shortest_edge=112 * 112, longest_edge=448 * 448)
            ),
            tokenizer,
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        tokens=dict(image_token="<|image_pad|>"),
    )


def _hunyuan_vl() -> Kind:
    return Kind(
        config=dict(
            architectures=["HunYuanVLForConditionalGeneration"],
            model_type="hunyuan_vl",
            text_config=_text(
                "hunyuan_vl_text",
                rope_parameters=dict(
                    rope_type="xdrope",
                    rope_theta=1e4,
                    alpha=1000.0,
                    factor=1.0,
                    xdrope_section=[4, 4, 4, 4],
                ),
            ),
            vision_config=_vision(
                "hunyuan_vl_vision", patch_size=16, out_hidden_size=_HIDDEN, max_image_size=512
            ),
            image_token_id=_ID["<|image_pad|>"],
            im_start_id=_ID["<|vision_start|>"],
            im_end_id=_ID["<|vision_end|>"],
            im_newline_id=_ID["<|IMG_LINE_BREAK|>"],
        ),
        processor=lambda tokenizer: transformers.HunYuanVLProcessor(
            transformers.HunYuanVLImageProcessor(
                size=dict(shortest_edge=112 * 112, longest_edge=512 * 512)
            ),
            tokenizer,
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        tokens=dict(
            image_token="<|image_pad|>",
            image_start_token="<|vision_start|>",
            image_end_token="<|vision_end|>",
        ),
    )


def _exaone4_5() -> Kind:
    return Kind(
        config=dict(
            architectures=["Exaone4_5_ForConditionalGeneration"],
            model_type="exaone4_5",
            text_config=_text("exaone4", sliding_window=128, layer_types=_HYBRID),
            vision_config=dict(
                model_type="exaone4_5_vision",
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                num_heads=2,
                num_key_value_heads=1,
                out_hidden_size=_HIDDEN,
                fullatt_block_indexes=[1],
            ),
            image_token_id=_ID["<|image_pad|>"],
            video_token_id=_ID["<|video_pad|>"],
        ),
        processor=lambda tokenizer: transformers.Exaone4_5_Processor(
            transformers.Qwen2VLImageProcessor(
                size=dict(shortest_edge=56 * 56, longest_edge=448 * 448)
            ),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(),
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
    )


def _dots_ocr() -> Kind:
    return Kind(
        config=dict(
            architectures=["DotsOCRForCausalLM"],
            auto_map={"AutoConfig": "remote_code.DotsOCRConfig"},
            **_text("dots_ocr", sliding_window=None),
            vision_config=_vision("dots_vit", embed_dim=64, hidden_size=_HIDDEN),
            image_token_id=_ID["<|imgpad|>"],
            video_token_id=_ID["<|video_pad|>"],
        ),
        processor=lambda tokenizer: transformers.Qwen2VLProcessor(
            transformers.Qwen2VLImageProcessor(
                size=dict(shortest_edge=56 * 56, longest_edge=448 * 448), temporal_patch_size=1
            ),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(),
        ),
        placeholder="<|imgpad|>",
        image="<img>{}</img>",
        tokens=dict(image_token="<|imgpad|>"),
    )


def _qianfan_ocr() -> Kind:
    return Kind(
        config=dict(
            architectures=["QianfanOCRForConditionalGeneration"],
            model_type="qianfan_ocr",
            text_config=_text("qwen3", architectures=["Qwen3ForCausalLM"]),
            vision_config=_vision("qianfan_ocr_vision", image_size=224),
            image_token_id=_ID["<IMG_CONTEXT>"],
            force_image_size=224,
            max_dynamic_patch=4,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
    )


def _granite4_vision() -> Kind:
    side = 256
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    return Kind(
        config=dict(
            architectures=["Granite4VisionForConditionalGeneration"],
            model_type="granite4_vision",
            text_config=_text("granite", attention_multiplier=32**-0.5),
            vision_config=_vision(
                "siglip_vision_model", image_size=side, patch_size=16, vision_use_head=False
            ),
            qformer_config=dict(
                model_type="blip_2_qformer",
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=128,
                cross_attention_frequency=1,
                encoder_hidden_size=64,
                use_qformer_text_input=False,
            ),
            image_token_index=_ID["<image>"],
            image_grid_pinpoints=pinpoints,
            image_seq_length=64,
            downsample_rate="4/8",
            # Features of several layers of the encoder enter several layers of the decoder.
            deepstack_layer_map=[[-2, 0], [-1, 1]],
            spatial_target_layers=[0, 1, 2, 3],
            vision_feature_select_strategy="full",
        ),
        processor=lambda tokenizer: transformers.Granite4VisionProcessor(
            transformers.LlavaNextImageProcessor(
                size=dict(height=side, width=side),
                crop_size=dict(height=side, width=side),
                image_grid_pinpoints=pinpoints,
            ),
            tokenizer,
            patch_size=16,
            vision_feature_select_strategy="full",
            downsample_rate="4/8",
        ),
        placeholder="<image>",
    )


def _cohere_compass() -> Kind:
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[6, 5, 5])
    return Kind(
        config=dict(
            architectures=["CohereCompassForConditionalGeneration"],
            model_type="cohere_compass",
            text_config=_text(
                "cohere_compass_text",
                sliding_window=128,
                layer_types=_HYBRID,
                # Full attention has no position embedding.
                rope_parameters=dict(sliding_attention=rope, full_attention=None),
                tie_word_embeddings=True,
            ),
            vision_config=dict(
                model_type="cohere_compass_vision",
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                num_heads=2,
                out_hidden_size=_HIDDEN,
                deepstack_visual_indexes=[0, 1],
            ),
            image_token_id=_ID["<|IMAGE_PAD|>"],
            video_token_id=_ID["<|VIDEO_PAD|>"],
            vision_start_token_id=_ID["<|VISION_START|>"],
            vision_end_token_id=_ID["<|VISION_END|>"],
            tie_word_embeddings=True,
        ),
        processor=lambda tokenizer: transformers.CohereCompassProcessor(
            transformers.CohereCompassImageProcessor(
                patch_size=16, size=dict(shortest_edge=64**2, longest_edge=512**2)
            ),
            tokenizer,
            transformers.CohereCompassVideoProcessor(),
        ),
        placeholder="<|IMAGE_PAD|>",
        image="<|VISION_START|>{}<|VISION_END|>",
    )


def _step3_vl() -> Kind:
    """All query heads share a single KV head. The sizes of images and of their parts are fixed."""
    return Kind(
        config=dict(
            architectures=["Step3VLForConditionalGeneration"],
            model_type="step3_vl",
            text_config=dict(
                model_type="step3_text",
                architectures=["Step3TextForCausalLM"],
                vocab_size=_VOCAB_SIZE,
                hidden_size=_HIDDEN,
                intermediate_size=2 * _HIDDEN,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_attention_groups=1,
                head_dim=32,
                share_q_dim=64,
                share_expert_dim=64,
                moe_layers_enum="1,2,3",
                moe_num_experts=4,
                moe_top_k=2,
                moe_intermediate_size=64,
                max_seq_len=8192,
                max_position_embedding=8192,
            ),
            vision_config=_vision(
                "step3_vision_encoder",
                image_size=728,
                output_hidden_size=64,
                hidden_act="quick_gelu",
            ),
            image_token_id=_ID["<im_patch>"],
            understand_projector_stride=2,
            projector_bias=False,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<im_patch>",
    )


def _step_vl() -> Kind:
    return Kind(
        config=dict(
            architectures=["StepVLForConditionalGeneration"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            model_type="step_robotics",
            text_config=_text("qwen3", architectures=["Qwen3ForCausalLM"]),
            vision_config=dict(
                model_type="perception_encoder",
                image_size=728,
                patch_size=14,
                width=64,
                layers=2,
                heads=2,
                mlp_ratio=2,
                ls_init_value=0.1,
                output_dim=None,
                hidden_act="quick_gelu",
                use_abs_posemb=True,
                use_cls_token=False,
                use_ln_post=False,
                use_ln_pre=True,
                use_rope2d=True,
            ),
            image_token_id=_ID["<im_patch>"],
            understand_projector_stride=2,
            projector_bias=False,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<im_patch>",
    )


def _step3p7() -> Kind:
    kind = _step_vl()
    text = _text(
        "step3p5_text",
        architectures=["Step3p5ForCausalLM"],
        num_attention_groups=2,
        max_seq_len=8192,
        layer_types=_HYBRID,
        sliding_window=128,
        use_rope_layers=[],
        yarn_only_types=[],
        attention_other_setting=dict(
            attention_type="sliding_attention",
            num_attention_heads=4,
            num_attention_groups=2,
            head_dim=32,
        ),
        moe_layers_enum="2,3",
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=64,
        moe_router_activation="sigmoid",
        moe_router_scaling_factor=1.0,
        need_fp32_gate=True,
        norm_expert_weight=True,
        use_moe_router_bias=True,
        swiglu_limits=None,
        swiglu_limits_shared=None,
        att_impl_type="GQA",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        share_expert_dim=64,
    )
    changed = dict(
        architectures=["Step3p7ForConditionalGeneration"], model_type="step3p7", text_config=text
    )
    return replace(kind, config=kind.config | changed)


def _interns1_pro() -> Kind:
    """Qwen3-VL with Fourier position embeddings, whose coefficients are parameters."""
    kind = _qwen3_vl(
        "InternS1ProForConditionalGeneration",
        "qwen3_vl_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    rope = dict(rope_type="default", rope_theta=1e6)
    fourier = dict(fope_init_factor=0.5, fope_sep_head=True, num_inv_freq=None)
    kind.config["text_config"] |= dict(
        model_type="interns1_pro_text",
        hidden_act="silu",
        rms_norm_eps=1e-6,
        decoder_sparse_step=1,
        rope_parameters=rope,
        rope_scaling=rope | fourier,
    )
    changed = dict(
        model_type="interns1_pro",
        auto_map={"AutoConfig": "remote_code.PartsConfig"},
    )
    return replace(kind, config=kind.config | changed)


def _opencua() -> Kind:
    return Kind(
        config=dict(
            architectures=["OpenCUAForConditionalGeneration"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            model_type="opencua",
            text_config=_text("qwen2"),
            vision_config=dict(
                model_type="qwen2_5_vl_vision",
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                num_heads=2,
                out_hidden_size=_HIDDEN,
                fullatt_block_indexes=[1],
            ),
            media_placeholder_token_id=_ID["<|media_placeholder|>"],
        ),
        processor=lambda tokenizer: _Parts(
            tokenizer,
            transformers.Qwen2VLImageProcessor(
                size=dict(shortest_edge=56 * 56, longest_edge=448 * 448)
            ),
        ),
        placeholder="<|media_placeholder|>",
    )


def _ovis() -> Kind:
    return Kind(
        config=dict(
            architectures=["Ovis"],
            model_type="ovis",
            llm_config=_text("qwen2"),
            visual_tokenizer_config=dict(
                model_type="aimv2_visual_tokenizer",
                backbone_config=_vision("aimv2", image_size=224),
                vocab_size=256,
                hidden_stride=2,
            ),
            hidden_size=_HIDDEN,
        ),
        processor=lambda tokenizer: _Parts(
            tokenizer,
            transformers.CLIPImageProcessor(size=dict(shortest_edge=224), do_center_crop=False),
        ),
        placeholder="<image>",
    )


_DEEPSEEK = dict(
    num_key_value_heads=4,
    first_k_dense_replace=1,
    n_group=1,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    topk_group=1,
)


def _deepseek_ocr() -> Kind:
    """The encoder has its published size, which vLLM hard-codes."""
    return Kind(
        config=dict(
            architectures=["DeepseekOCRForCausalLM"],
            model_type="deepseek_vl_v2",
            language_config=_text(
                "deepseek_v2",
                architectures=["DeepseekV2ForCausalLM"],
                **_DEEPSEEK,
                topk_method="greedy",
                kv_lora_rank=None,
                q_lora_rank=None,
                qk_nope_head_dim=0,
                qk_rope_head_dim=0,
                v_head_dim=0,
                use_mla=False,
            ),
            projector_config=dict(
                model_type="mlp_projector", input_dim=2048, n_embed=_HIDDEN, projector_type="linear"
            ),
            tile_tag="2D",
            global_view_pos="head",
            candidate_resolutions=[[1024, 1024]],
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
        files={"processor_config.json": dict(processor_class="DeepseekOCRProcessor")},
    )


def _deepseek_vl2() -> Kind:
    """The encoder has its published size, which vLLM hard-codes."""
    kind = _deepseek_ocr()
    projector = dict(
        model_type="mlp_projector",
        projector_type="downsample_mlp_gelu",
        input_dim=1152,
        n_embed=_HIDDEN,
    )
    changed = dict(
        architectures=["DeepseekVLV2ForCausalLM"],
        projector_config=projector,
        candidate_resolutions=[[384, 384]],
    )
    processor = dict(
        processor_class="DeepseekVLV2Processor",
        candidate_resolutions=[[384, 384]],
        patch_size=14,
        downsample_ratio=2,
    )
    return replace(kind, config=kind.config | changed, files={"processor_config.json": processor})


def _unlimited_ocr() -> Kind:
    kind = _deepseek_ocr()
    changed = dict(architectures=["UnlimitedOCRForCausalLM"], model_type="unlimited-ocr")
    processor = dict(processor_class="UnlimitedOCRProcessor")
    return replace(kind, config=kind.config | changed, files={"processor_config.json": processor})


def _deepseek_ocr2() -> Kind:
    kind = _deepseek_ocr()
    projector = kind.config["projector_config"] | dict(input_dim=896)
    changed = dict(
        architectures=["DeepseekOCR2ForCausalLM"],
        projector_config=projector,
        vision_config=dict(model_type="vision", image_size=1024),
    )
    return replace(kind, config=kind.config | changed)


def _kimi_text(model_type: str, **text: Any) -> dict[str, Any]:
    """The sizes of the latent vectors are the published ones, which vLLM's CPU kernels require."""
    return _text(
        model_type,
        head_dim=64,
        kv_lora_rank=512,
        q_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=48,
        **_DEEPSEEK,
        **text,
    )


def _kimi_vl() -> Kind:
    return Kind(
        config=dict(
            architectures=["KimiVLForConditionalGeneration"],
            model_type="kimi_vl",
            text_config=_kimi_text("deepseek_v2", topk_method="greedy"),
            vision_config=_vision("moonvit"),
            media_placeholder_token_id=_ID["<|media_pad|>"],
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|media_pad|>",
        image="<|media_begin|>image<|media_content|>{}<|media_end|>",
        files=_code("KimiVLProcessor", "KimiVLImageProcessor"),
        options=dict(attention_backend="CPU_MLA"),
    )


def _kimi_k25() -> Kind:
    """Has the published kind of rotary embedding.

    vLLM's CPU kernel for the default one does not rotate the queries of latent attention correctly.
    """
    normal = [0.5, 0.5, 0.5]
    return Kind(
        config=dict(
            architectures=["KimiK25ForConditionalGeneration"],
            model_type="kimi_k25",
            text_config=_kimi_text(
                "deepseek_v3",
                rope_parameters=dict(
                    rope_type="yarn",
                    rope_theta=5e4,
                    factor=2.0,
                    original_max_position_embeddings=4096,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                ),
            ),
            vision_config=dict(
                model_type="kimi_k25_vision",
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                patch_size=14,
            ),
            image_token_id=_ID["<|media_pad|>"],
            use_unified_vision_chunk=True,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|media_pad|>",
        image="<|media_begin|>image<|media_content|>{}<|media_end|>",
        files={
            "preprocessor_config.json": dict(
                media_proc_cfg=dict(
                    patch_size=14,
                    merge_kernel_size=2,
                    temporal_merge_kernel_size=4,
                    in_patch_limit=1024,
                    in_patch_limit_each_frame=1024,
                    in_patch_limit_video=4096,
                    patch_limit_on_one_side=512,
                    fixed_output_tokens=None,
                    image_mean=normal,
                    image_std=normal,
                )
            )
        },
        modality="vision_chunk",
        options=dict(attention_backend="CPU_MLA"),
    )


def _muse() -> Kind:
    return Kind(
        config=dict(
            architectures=["MuseGlimmerForConditionalGeneration"],
            model_type="muse_glimmer",
            text_config=_text(
                "muse_glimmer_text",
                hidden_activation="silu",
                sliding_window=128,
                layer_types=_HYBRID,
                no_rope_layers=[1, 0] * 2,
                query_pre_attn_scalar=32,
                qk_scale_factor=1.0,
            ),
            vision_config=_vision(
                "muse_glimmer_vision", output_dim=256, adapter_dim=64, hidden_act="gelu"
            ),
            image_token_id=_ID["<|patch|>"],
            video_token_id=_ID["<|video|>"],
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|patch|>",
    )


def _isaac() -> Kind:
    return Kind(
        config=dict(
            architectures=["IsaacForConditionalGeneration"],
            **_text("isaac"),
            vision_config=_vision(
                "pixel_shuffle_siglip2",
                patch_size=16,
                num_patches=256,
                pixel_shuffle_scale_factor=2,
            ),
            vision_max_num_patches=6144,
            vision_min_num_patches=256,
            pixel_shuffle_scale=2,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
    )


def _interns2_preview() -> Kind:
    kind = _qwen3_5("InternS2PreviewForConditionalGeneration", "qwen3_5_moe", **_QWEN3_5_MOE)
    changed = dict(
        model_type="interns2_preview",
        auto_map={"AutoConfig": "remote_code.InternS2PreviewConfig"},
    )
    return replace(kind, config=kind.config | changed)


def _interns2_mobius() -> Kind:
    """Layers share their banks of experts."""
    kind = _interns2_preview()
    text = kind.config["text_config"] | dict(num_blocks=2, hidden_act="silu")
    changed = dict(
        architectures=["InternS2MobiusForConditionalGeneration"],
        model_type="interns2_mobius",
        auto_map={"AutoConfig": "remote_code.InternS2MobiusConfig"},
        text_config=text,
    )
    return replace(kind, config=kind.config | changed)


def _phi4_siglip() -> Kind:
    return Kind(
        config=dict(
            architectures=["Phi4ForCausalLMV"],
            auto_map={"AutoConfig": "remote_code.Phi4SiglipConfig"},
            # vLLM hard-codes the id of the image token.
            **_text("phi4-siglip", vocab_size=100352, sliding_window=None),
            vision_config=_vision("siglip2_vision_model", patch_size=16, num_patches=256),
            mm_hidden_size=64,
            min_num_patches=16,
            max_num_patches=256,
        ),
        processor=lambda tokenizer: transformers.Siglip2Processor(
            transformers.Siglip2ImageProcessor(patch_size=16, max_num_patches=256), tokenizer
        ),
        placeholder="<image>",
    )


def _internvl_chat(
    architecture: str, model_type: str, text: str, encoder: str = "intern_vit_6b", **changed: Any
) -> Kind:
    """InternVL in its own form, in which other models are published too."""
    vision = _vision(
        encoder,
        image_size=224,
        qkv_bias=True,
        qk_normalization=False,
        layer_norm_eps=1e-6,
        norm_type="layer_norm",
        hidden_act="gelu",
        initializer_factor=1.0,
    )
    name = {"qwen2": "Qwen2ForCausalLM", "mistral": "MistralForCausalLM"}[text]
    return Kind(
        config=dict(
            architectures=[architecture],
            model_type=model_type,
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            llm_config=_text(text, architectures=[name], sliding_window=None),
            vision_config=vision,
            downsample_ratio=0.5,
            force_image_size=None,
            ps_version="v2",
            select_layer=-1,
            min_dynamic_patch=1,
            max_dynamic_patch=4,
            dynamic_image_size=True,
            use_thumbnail=True,
        )
        | changed,
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
    )


def _minicpmv() -> Kind:
    return Kind(
        config=dict(
            architectures=["MiniCPMV"],
            auto_map={"AutoConfig": "remote_code.MiniCPMVConfig"},
            **_text("minicpmv"),
            version=2.6,
            query_num=64,
            drop_vision_last_layer=False,
            vision_config=_vision("siglip_vision_model", image_size=224),
        ),
        processor=lambda tokenizer: tokenizer,
        files=_code("MiniCPMVProcessor", "MiniCPMVImageProcessor"),
        placeholder="(<image>./</image>)",
    )


def _minicpmo() -> Kind:
    """MiniCPM-V that also listens; what speaks is not used."""
    kind = _minicpmv()
    changed = dict(
        architectures=["MiniCPMO"],
        model_type="minicpmo",
        auto_map={"AutoConfig": "remote_code.MiniCPMOConfig"},
        audio_config=dict(
            d_model=64,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=128,
            num_mel_bins=80,
        ),
        audio_pool_step=2,
        audio_chunk_length=1.0,
    )
    files = _code("MiniCPMOProcessor", "MiniCPMVImageProcessor")
    files["preprocessor_config.json"] |= dict(feature_extractor_type="WhisperFeatureExtractor")
    tokens = dict(
        im_start="<image>",
        im_end="</image>",
        slice_start="<slice>",
        slice_end="</slice>",
        audio_start="<|audio_bos|>",
        audio_end="<|audio_eos|>",
        spk_start="<|spk_bos|>",
        spk_end="<|spk_eos|>",
    )
    return replace(kind, config=kind.config | changed, files=files, tokens=tokens)


def _minicpmv4_6(version: str) -> Kind:
    """A language model with linear attention, whose positions have no dimensions."""
    name, model_type = f"MiniCPMV4_{version}", f"minicpmv4_{version}"
    # Larger than the images, so that they become more tokens than a block has.
    side = 896
    text = _qwen3_5("", "qwen3_5").config["text_config"]
    return Kind(
        config=dict(
            architectures=[f"{name}ForConditionalGeneration"],
            model_type=model_type,
            text_config=text,
            vision_config=_vision(f"{model_type}_vision", image_size=side),
            image_size=side,
            insert_layer_id=0,
            image_token_id=_ID["<|image_pad|>"],
            video_token_id=_ID["<|video_pad|>"],
        ),
        processor=lambda tokenizer: getattr(transformers, f"{name}Processor")(
            transformers.MiniCPMV4_6ImageProcessor(scale_resolution=side, max_slice_nums=1),
            transformers.MiniCPMV4_6VideoProcessor(scale_resolution=side, max_slice_nums=1),
            tokenizer,
        ),
        placeholder="<|image_pad|>",
        tokens=dict(
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            image_start_token="<image>",
            image_end_token="</image>",
            slice_start_token="<slice>",
            slice_end_token="</slice>",
            image_id_start_token="<image_id>",
            image_id_end_token="</image_id>",
        ),
        dtype="bfloat16",
    )


def _cosmos3() -> Kind:
    """Qwen3-VL; what generates pictures and videos is not used."""
    kind = _qwen3_vl("Cosmos3ForConditionalGeneration", "qwen3_vl")
    return replace(kind, config=kind.config | dict(model_type="cosmos3_omni"))


def _cosmos3_edge() -> Kind:
    """vLLM counts attention and MLP as a layer each."""
    return Kind(
        config=dict(
            architectures=["Cosmos3EdgeForConditionalGeneration"],
            model_type="cosmos3_edge",
            text_config=_text(
                "cosmos3_edge_text",
                hidden_act="relu2",
                rope_parameters=dict(rope_type="default", rope_theta=1e8, mrope_section=[6, 5, 5]),
            ),
            vision_config=_vision(
                "cosmos3_edge_vision", patch_size=16, num_patches=256, vision_use_head=False
            ),
            projector_config=dict(
                model_type="cosmos3_edge_projector",
                input_hidden_size=64,
                merger_intermediate_size=128,
                out_hidden_size=_HIDDEN,
            ),
            **_QWEN_IDS,
        ),
        processor=lambda tokenizer: transformers.Cosmos3EdgeProcessor(
            transformers.Cosmos3EdgeImageProcessor(
                size=dict(shortest_edge=64**2, longest_edge=512**2)
            ),
            tokenizer,
            transformers.Cosmos3EdgeVideoProcessor(),
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
    )


def _ernie4_5_vl() -> Kind:
    """Images and text have experts of their own."""
    return Kind(
        config=dict(
            architectures=["Ernie4_5_VLMoeForConditionalGeneration"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            **_text("ernie4_5_moe_vl", hidden_act="silu", rms_norm_eps=1e-5, rope_theta=5e5),
            vision_config=dict(
                model_type="DFNRope_vision_transformer",
                depth=2,
                embed_dim=64,
                hidden_size=64,
                num_heads=2,
                mlp_ratio=2,
                in_channels=3,
                patch_size=14,
                spatial_merge_size=2,
            ),
            freq_allocation=4,
            im_patch_id=_ID["<|IMAGE_PLACEHOLDER|>"],
            image_start_token_id=_ID["<|IMAGE_START|>"],
            image_end_token_id=_ID["<|IMAGE_END|>"],
            video_start_token_id=_ID["<|VIDEO_START|>"],
            video_end_token_id=_ID["<|VIDEO_END|>"],
            moe_num_experts=[4, 4],
            moe_intermediate_size=[64, 32],
            moe_num_shared_experts=1,
            moe_k=2,
            moe_layer_interval=1,
            moe_layer_start_index=[1, 1],
            moe_layer_end_index=[5, 4],
            pixel_hidden_size=64,
            spatial_conv_size=2,
            temporal_conv_size=2,
            use_temporal_conv=True,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|image@placeholder|>",
        image="<|IMAGE_START|>{}<|IMAGE_END|>",
        files=_code("ErnieVLProcessor"),
        # vLLM calls the CPU kernel of this rotary embedding with an argument too many.
        options=dict(compilation_config=dict(custom_ops=["all", "-rotary_embedding"])),
        only_images=True,
    )


def _keye(architecture: str, model_type: str) -> Kind:
    return Kind(
        config=dict(
            architectures=[architecture],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            **_text(model_type, rope_parameters=_MROPE, hidden_act="silu", rms_norm_eps=1e-6),
            vision_config=_vision("siglip_vision_model", image_size=224, spatial_merge_size=2),
            **_QWEN_IDS,
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        files=_code("KeyeProcessor"),
        only_images=True,
    )


def _molmo2() -> Kind:
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    return Kind(
        config=dict(
            architectures=["Molmo2ForConditionalGeneration"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            model_type="molmo2",
            text_config=_text(
                "molmo2_text",
                additional_vocab_size=128,
                hidden_act="silu",
                layer_norm_eps=1e-6,
                norm_after=False,
                qk_norm_type="qwen3",
                qkv_bias=False,
                rope_scaling_layers=None,
                rope_theta=1e6,
                use_qk_norm=True,
            ),
            vit_config=dict(
                model_type="molmo2_vit",
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                **heads,
                hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=1e-6,
                image_default_input_size=[224, 224],
                image_patch_size=14,
                image_num_pos=256,
            ),
            adapter_config=dict(
                model_type="molmo2_adapter",
                vit_layers=[-1, -2],
                pooling_attention_mask=True,
                hidden_size=64,
                intermediate_size=128,
                **heads,
                hidden_act="silu",
                text_hidden_size=_HIDDEN,
            ),
            image_patch_id=_ID["<im_patch>"],
            image_col_id=_ID["<im_col>"],
            image_start_token_id=_ID["<im_start>"],
            image_end_token_id=_ID["<im_end>"],
            low_res_image_start_token_id=_ID["<low_res_im_start>"],
            frame_start_token_id=_ID["<frame_start>"],
            frame_end_token_id=_ID["<frame_end>"],
            image_low_res_id=_ID["<im_low>"],
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|image|>",
        files=_code("Molmo2Processor"),
        only_images=True,
    )


def _interns1() -> Kind:
    """InternVL with a configuration of its own."""
    kind = _internvl()
    changed = dict(
        architectures=["InternS1ForConditionalGeneration"],
        model_type="interns1",
        auto_map={"AutoConfig": "remote_code.PartsConfig"},
        text_config=_text("qwen3", architectures=["Qwen3ForCausalLM"]),
        vision_config=kind.config["vision_config"]
        | dict(
            model_type="interns1_vision",
            attention_bias=True,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            norm_type="layer_norm",
            num_channels=3,
            use_absolute_position_embeddings=True,
            use_mask_token=False,
            use_mean_pooling=True,
            use_qk_norm=False,
        ),
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )
    return replace(kind, config=kind.config | changed)


def _bagel() -> Kind:
    """What generates pictures is not used."""
    return Kind(
        config=dict(
            architectures=["BagelForConditionalGeneration"],
            model_type="bagel",
            llm_config=_text("qwen2"),
            vit_config=_vision("siglip_vision_model", image_size=224, vision_use_head=False),
            vit_max_num_patch_per_side=16,
        ),
        processor=lambda tokenizer: _Parts(
            tokenizer, transformers.SiglipImageProcessor(size=dict(height=224, width=224))
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
    )


def _moondream3() -> Kind:
    """The number of an image's tokens is fixed."""
    return Kind(
        config=dict(
            architectures=["Moondream3ForCausalLM"],
            model_type="moondream3",
            config=dict(
                text=dict(
                    dim=_HIDDEN,
                    ff_dim=2 * _HIDDEN,
                    n_layers=4,
                    n_heads=4,
                    n_kv_heads=4,
                    vocab_size=_VOCAB_SIZE,
                    moe=dict(start_layer=2, n_experts=4, n_experts_per_tok=2, expert_inner_dim=64),
                ),
                # vLLM takes the number of layers, which is 27, also for a side of the image.
                vision=dict(enc_dim=64, enc_ff_dim=128, enc_n_heads=2, proj_inner_dim=128),
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|endoftext|><image>",
        image="{}",
        max_images=1,
    )


def _kanana_v() -> Kind:
    """vLLM takes the token after the end of text for that of an image."""
    return Kind(
        config=dict(
            architectures=["KananaVForConditionalGeneration"],
            model_type="kanana-1.5-v",
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            text_config=_text("llama", eos_token_id=_ID["<|imgpad|>"] - 1),
            vision_config=dict(
                model_type="qwen2_vl_vision", depth=2, embed_dim=64, hidden_size=64, num_heads=2
            ),
            projector_config=dict(
                model_type="kanana_projector",
                depth=1,
                mlp_depth=2,
                merge_size=2,
                pos_emb=True,
                pos_emb_size=256,
                feature_layer_index=-1,
                encoder_hidden_size=64,
                hidden_size=64,
                output_hidden_size=_HIDDEN,
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<image>",
        files=_code("KananaVProcessor"),
    )


def _openpangu_vl() -> Kind:
    kind = _dots_ocr()
    return replace(
        kind,
        config=dict(
            architectures=["OpenPanguVLForConditionalGeneration"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            **_text("openpangu_vl", hidden_act="silu", rms_norm_eps=1e-5, rope_parameters=_MROPE),
            vision_config=dict(
                model_type="openpangu_vl_vision",
                depth=4,
                hidden_act="silu",
                hidden_size=64,
                in_channels=3,
                intermediate_size=128,
                num_heads=2,
                out_hidden_size=_HIDDEN,
                patch_size=14,
                spatial_merge_size=2,
                temporal_patch_size=1,
                window_size=112,
                fullatt_block_indexes=[3],
            ),
            **_QWEN_IDS,
        ),
        placeholder="<|image_pad|>",
        image="<|vision_start|>{}<|vision_end|>",
        tokens=dict(
            image_token="<|image_pad|>",
            vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>",
        ),
    )


def _molmo() -> Kind:
    """The encoder has its published size, which vLLM hard-codes."""
    return Kind(
        config=dict(
            architectures=["MolmoForCausalLM"],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            **_text(
                "molmo",
                attention_layer_norm=False,
                embedding_size=_VOCAB_SIZE,
                layer_norm_eps=1e-6,
                layer_norm_type="rms",
                norm_after=False,
                qkv_bias=True,
                rope_theta=1e6,
                weight_tying=False,
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="",
        image="",
        files=_code("MolmoProcessor"),
    )


_LONG_ROPE = dict(
    original_max_position_embeddings=4096,
    rope_scaling=dict(type="longrope", long_factor=[2.0] * 16, short_factor=[1.0] * 16),
    # As published: a window that is larger than all prompts.
    sliding_window=262144,
)


def _phi3_v() -> Kind:
    """The encoder has its published width, which vLLM hard-codes."""
    return Kind(
        config=dict(
            architectures=["Phi3VForCausalLM"],
            auto_map={"AutoConfig": "remote_code.Phi3VConfig"},
            **_text("phi3_v", vocab_size=32064, **_LONG_ROPE),
            embd_layer=dict(
                embedding_cls="image",
                hd_transform_order="sub_glb",
                projection_cls="mlp",
                use_hd_transform=True,
                with_learnable_separator=True,
            ),
            img_processor=dict(
                name="clip_vision_model", layer_idx=1, image_dim_out=1024, num_img_tokens=144
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|image_#|>",
        files=_code("Phi3VProcessor"),
        token_ids={"<|image|>": 32044},
        options=dict(disable_sliding_window=True),
    )


def _phi4_mm() -> Kind:
    """The encoder of images has its published size, which vLLM hard-codes."""
    return Kind(
        config=dict(
            architectures=["Phi4MMForCausalLM"],
            auto_map={"AutoConfig": "remote_code.Phi4MMConfig"},
            **_text("phi4mm", vocab_size=200064, **_LONG_ROPE),
            img_processor=None,
            embd_layer=dict(
                embedding_cls="image_audio",
                image_embd_layer=dict(embedding_cls="tune_image"),
                audio_embd_layer=dict(
                    embedding_cls="audio", compression_rate=8, projection_cls="mlp"
                ),
            ),
            audio_processor=dict(
                name="cascades",
                config=dict(
                    input_size=80,
                    encoder_embedding_config=dict(input_size=80),
                    chunk_size=-1,
                    left_chunk=18,
                    attention_dim=64,
                    attention_heads=2,
                    linear_units=128,
                    num_blocks=2,
                    relative_attention_bias_args=dict(type="t5", t5_bias_max_distance=500),
                ),
            ),
        ),
        processor=lambda tokenizer: tokenizer,
        placeholder="<|image_#|>",
        files=_code("Phi4MMProcessor"),
        token_ids={"<|endoftext10|>": 200010, "<|endoftext11|>": 200011},
        only_images=True,
        options=dict(disable_sliding_window=True),
    )


_OVIS_TOKENS = (
    "<image>",
    "<video>",
    "<ovis_visual_atom>",
    "<ovis_image_start>",
    "<ovis_image_end>",
    "<ovis_video_start>",
    "<ovis_video_end>",
)


def _ovis2_5(architecture: str, text: str, **changed: Any) -> Kind:
    return Kind(
        config=dict(
            architectures=[architecture],
            auto_map={"AutoConfig": "remote_code.PartsConfig"},
            model_type="ovis2_5",
            llm_config=_text(text, vocab_size=151680, **changed),
            vit_config=dict(
                model_type="siglip2_navit",
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_channels=3,
                num_patches=-1,
                image_size=512,
                patch_size=16,
                temporal_patch_size=1,
                hidden_stride=2,
                window_size=112,
                fullatt_block_indexes=None,
                preserve_original_pe=True,
                use_rope=True,
                attention_dropout=0.0,
                hidden_act="gelu_pytorch_tanh",
                layer_norm_eps=1e-6,
            ),
            hidden_size=_HIDDEN,
            visual_vocab_size=256,
        ),
        processor=lambda tokenizer: _Parts(
            tokenizer,
            transformers.SiglipImageProcessor(size=dict(height=512, width=512)),
        ),
        placeholder="<image>",
        token_ids={"<|image_pad|>": 151655} | {t: 151669 + i for i, t in enumerate(_OVIS_TOKENS)},
    )


_BUILT: dict[str, Kind] = {
    "llava-onevision": _llava_onevision(
        "LlavaOnevisionForConditionalGeneration", "llava_onevision", "qwen2"
    ),
    "bee": _llava_onevision(
        "BeeForConditionalGeneration",
        "bee",
        "qwen3",
        auto_map={"AutoConfig": "remote_code.BeeConfig"},
    ),
    "r-4b": _llava_onevision(
        "RForConditionalGeneration",
        "r",
        "qwen3",
        auto_map={"AutoConfig": "remote_code.RConfig"},
    ),
    "pixtral": _pixtral(
        "LlavaForConditionalGeneration",
        "llava",
        "mistral",
        1,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "mistral3": _pixtral(
        "Mistral3ForConditionalGeneration", "mistral3", "mistral", 2, spatial_merge_size=2
    ),
    "ministral3": _pixtral(
        "Mistral3ForConditionalGeneration", "mistral3", "ministral3", 2, spatial_merge_size=2
    ),
    "lightonocr": _pixtral(
        "LightOnOCRForConditionalGeneration", "mistral3", "qwen3", 2, spatial_merge_size=2
    ),
    "qwen3-vl": _qwen3_vl("Qwen3VLForConditionalGeneration", "qwen3_vl"),
    "qwen3-vl-moe": _qwen3_vl(
        "Qwen3VLMoeForConditionalGeneration",
        "qwen3_vl_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
    "cosmos3": _cosmos3(),
    "cosmos3-edge": _cosmos3_edge(),
    "qwen3.5": _qwen3_5("Qwen3_5ForConditionalGeneration", "qwen3_5"),
    "qwen3.5-moe": _qwen3_5("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", **_QWEN3_5_MOE),
    "intern-s2-preview": _interns2_preview(),
    "intern-s2-mobius": _interns2_mobius(),
    "qwen2.5-omni": _qwen2_5_omni(),
    "qwen3-omni": _qwen3_omni(),
    "internvl": _internvl(),
    "internvl-chat": _internvl_chat("InternVLChatModel", "internvl_chat", "qwen2"),
    "skywork-r1v": _internvl_chat("SkyworkR1VChatModel", "skywork_chat", "qwen2"),
    "h2ovl": _internvl_chat("H2OVLChatModel", "h2ovl_chat", "mistral", use_msac=True),
    "nvlm-d": replace(
        _internvl_chat("NVLM_D", "NVLM_D", "qwen2"),
        placeholder="<image>\n",  # vLLM counts the newline among the image's tokens
        image="{}",
    ),
    "eagle2.5": _internvl_chat(
        "Eagle2_5_VLForConditionalGeneration", "eagle_2_5_vl", "qwen2", "siglip_vision_model"
    ),
    "idefics3": _idefics3("Idefics3"),
    "smolvlm": _idefics3("SmolVLM", transformers.SmolVLMVideoProcessor),
    "glm4v": _glm4v("Glm4vForConditionalGeneration", "glm4v"),
    "glm4v-moe": _glm4v(
        "Glm4vMoeForConditionalGeneration",
        "glm4v_moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        use_qk_norm=False,
    ),
    "glm-4v-9b": _glm_4v_9b(),
    "glm-ocr": _glm4v("GlmOcrForConditionalGeneration", "glm_ocr"),
    "lfm2-vl": _lfm2_vl(),
    "nemotron-nano-vl": _nemotron_nano_vl(),
    "paddleocr-vl": _paddleocr_vl(),
    "hunyuan-ocr": _hunyuan_vl(),
    "exaone4.5": _exaone4_5(),
    "dots-ocr": _dots_ocr(),
    "qianfan-ocr": _qianfan_ocr(),
    "granite4-vision": _granite4_vision(),
    "isaac": _isaac(),
    "step3-vl": _step3_vl(),
    "step-vl": _step_vl(),
    "step3.7": _step3p7(),
    "opencua": _opencua(),
    "ovis2": _ovis(),
    "ovis2.5": _ovis2_5("Ovis2_5", "qwen3"),
    "ovis2.6": _ovis2_5("Ovis2_6ForCausalLM", "qwen3"),
    "ovis2.6-moe": _ovis2_5(
        "Ovis2_6_MoeForCausalLM",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    ),
    "ernie4.5-vl": _ernie4_5_vl(),
    "keye-vl": _keye("KeyeForConditionalGeneration", "Keye"),
    "keye-vl-1.5": _keye("KeyeVL1_5ForConditionalGeneration", "KeyeVL1_5"),
    "intern-s1": _interns1(),
    "intern-s1-pro": _interns1_pro(),
    "bagel": _bagel(),
    "moondream3": _moondream3(),
    "kanana-v": _kanana_v(),
    "openpangu-vl": _openpangu_vl(),
    "molmo": _molmo(),
    "molmo2": _molmo2(),
    "phi3.5-vision": _phi3_v(),
    "phi4-multimodal": _phi4_mm(),
    "deepseek-ocr": _deepseek_ocr(),
    "deepseek-ocr2": _deepseek_ocr2(),
    "unlimited-ocr": _unlimited_ocr(),
    "deepseek-vl2": _deepseek_vl2(),
    "kimi-vl": _kimi_vl(),
    "kimi-k2.5": _kimi_k25(),
    "muse-glimmer": _muse(),
    "minicpm-v": _minicpmv(),
    "minicpm-o": _minicpmo(),
    "minicpm-v-4.6": _minicpmv4_6("6"),
    "minicpm-v-4.7": _minicpmv4_6("7"),
    "phi4-siglip": _phi4_siglip(),
    "gemma3": _gemma3(),
    "gemma3n": _gemma3n(),
    "gemma4": _gemma4(),
    "gemma4-moe": _gemma4(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64
    ),
    "gemma4-k-eq-v": _gemma4(attention_k_eq_v=True),
    "gemma4-shared-kv": _gemma4_shared(),
    "gemma4-vision-bidi": _gemma4(use_bidirectional_attention="vision"),
    "gemma4-unified": _gemma4_unified(),
    "paligemma": _paligemma(),
    "cohere2-vision": _cohere2_vision(),
    "cohere-compass": _cohere_compass(),
    "aya-vision": _aya_vision(),
    "aria": _aria(),
    "blip2": _blip2(),
    "llama4": _llama4(),
}
KINDS = (*tiny_models.KINDS, *_BUILT)


def max_images(kind: str) -> int:
    """Maximum number of images in a prompt: one or two."""
    return _BUILT[kind].max_images if kind in _BUILT else 2


def modality(kind: str) -> str:
    """vLLM's name for images."""
    return _BUILT[kind].modality if kind in _BUILT else "image"


def options(kind: str) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that vLLM or the plugin needs for this kind."""
    return dict(_BUILT[kind].options) if kind in _BUILT else {}


def limits(kind: str) -> dict[str, int]:
    """Maximum numbers of items in a prompt, by vLLM's names of modalities."""
    others = ("video", "audio") if kind in _BUILT and _BUILT[kind].only_images else ()
    return {modality(kind): max_images(kind), **dict.fromkeys(others, 0)}


def image_data(kind: str, images: Sequence[Image.Image]) -> dict[str, list[Any]]:
    """The ``multi_modal_data`` of a prompt."""
    if modality(kind) == "image":
        return {"image": [*images]}
    return {modality(kind): [{"type": "image", "image": one, "uuid": None} for one in images]}


def dtype(kind: str) -> str:
    """A type that vLLM's CPU kernels of this architecture support."""
    return _BUILT[kind].dtype if kind in _BUILT else "float32"


def has_code(kind: str) -> bool:
    """Whether a checkpoint has custom code, as the published one."""
    if kind not in _BUILT:
        return False
    found = _BUILT[kind]
    return any("auto_map" in contents for contents in (found.config, *found.files.values()))


def prompt_for(kind: str, question: str, num_images: int) -> str:
    """A prompt with images before the question."""
    if kind not in _BUILT:
        return tiny_models.prompt_for(kind, question, num_images)
    image = _BUILT[kind].image.format(_BUILT[kind].placeholder)
    images = "".join(image.replace("#", str(i + 1)) for i in range(num_images))
    return f"USER: {images}{question} ASSISTANT:"


def text_after_images(kind: str, question: str) -> str:
    """The text after the last image, or all text if the processor puts images first."""
    if kind in _BUILT:
        placeholder = _BUILT[kind].placeholder.replace("#", "1")
    else:
        placeholder = "<|image_pad|>" if kind.startswith("qwen") else "<image>"
    prompt = prompt_for(kind, question, 1)
    return prompt.rpartition(placeholder)[2] if placeholder else prompt


def language_model(config: Mapping[str, Any]) -> str:
    """The model type of the language model in a ``config.json``."""
    text = config.get("text_config") or config.get("llm_config") or config.get("language_config")
    return (text or config)["model_type"].removesuffix("_text")


def build(kind: str, path: Path) -> Path:
    """Write a model of one of `KINDS` to a folder."""
    if kind not in _BUILT:
        return tiny_models.build(kind, path)
    found = _BUILT[kind]
    path.mkdir(parents=True, exist_ok=True)
    for name, contents in {"config.json": {**_IDS, **found.config}, **found.files}.items():
        (path / name).write_text(json.dumps(contents))
    if has_code(kind):
        shutil.copy(_REMOTE_CODE, path)
    tokenizer = tiny_models.byte_tokenizer(
        (*_SPECIAL_TOKENS, *(t for t in found.token_ids if t not in _ID)),
        "</s>",
        found.tokens,
        found.token_ids,
    )
    found.processor(tokenizer).save_pretrained(path)
    return path
