# SPDX-License-Identifier: Apache-2.0
"""Tiny vision-language models of many architectures: config, processor and tokenizer.

They have no weights; `testing.random_weights` generates them when vLLM loads the model. The kinds
of `testing.tiny_models` are included.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

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
class Kind:
    """One architecture.

    Attributes:
        config: contents of ``config.json``.
        processor: creates the processor from a tokenizer, or returns the tokenizer if vLLM creates
            the processor.
        placeholder: text that the processor replaces by the tokens of an image; empty if it puts
            them before all text.
        image: the complete text of an image.
        tokens: special tokens that the processor needs by name.
        max_images: maximum number of images in a prompt, at most two.
        files: further JSON files of the checkpoint.
        dtype: a type that vLLM's CPU kernels of this architecture support.
    """

    config: Mapping[str, Any]
    processor: Callable[[PreTrainedTokenizerFast], ProcessorMixin | PreTrainedTokenizerFast]
    placeholder: str
    image: str = "{}\n"
    tokens: Mapping[str, str] = field(default_factory=dict)
    max_images: int = 2
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: str = "float32"


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
        tokens=dict(
            image_token="<|image_pad|>",
            video_token="<|video_pad|>",
            audio_token="<|AUDIO|>",
            vision_bos_token="<|vision_start|>",
            vision_eos_token="<|vision_end|>",
            audio_bos_token="<|audio_bos|>",
            audio_eos_token="<|audio_eos|>",
        ),
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


def _llava_onevision() -> Kind:
    side = 112
    pinpoints = [[side, side], [side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    return Kind(
        config=dict(
            architectures=["LlavaOnevisionForConditionalGeneration"],
            model_type="llava_onevision",
            text_config=_text("qwen2"),
            vision_config=_vision("siglip_vision_model", image_size=side, vision_use_head=False),
            image_token_index=_ID["<image>"],
            video_token_index=_ID["<video>"],
            image_grid_pinpoints=pinpoints,
        ),
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


def _qwen3_5() -> Kind:
    kind = _qwen3_vl("Qwen3_5ForConditionalGeneration", "qwen3_5")
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


def _internvl_chat() -> Kind:
    vision = _vision(
        "intern_vit_6b",
        image_size=224,
        qkv_bias=True,
        qk_normalization=False,
        layer_norm_eps=1e-6,
        norm_type="layer_norm",
        hidden_act="gelu",
        initializer_factor=1.0,
    )
    return Kind(
        config=dict(
            architectures=["InternVLChatModel"],
            model_type="internvl_chat",
            auto_map={"AutoConfig": "remote_code.InternVLChatConfig"},
            llm_config=_text("qwen2", architectures=["Qwen2ForCausalLM"]),
            vision_config=vision,
            downsample_ratio=0.5,
            force_image_size=None,
            ps_version="v2",
            select_layer=-1,
            min_dynamic_patch=1,
            max_dynamic_patch=4,
            dynamic_image_size=True,
            use_thumbnail=True,
        ),
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
        files={
            "processor_config.json": dict(
                processor_class="MiniCPMVProcessor",
                auto_map={"AutoProcessor": "remote_code.MiniCPMVProcessor"},
            ),
            "preprocessor_config.json": dict(
                image_processor_type="MiniCPMVImageProcessor",
                auto_map={"AutoImageProcessor": "remote_code.MiniCPMVImageProcessor"},
            ),
        },
        placeholder="(<image>./</image>)",
    )


_BUILT: dict[str, Kind] = {
    "llava-onevision": _llava_onevision(),
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
    "qwen3.5": _qwen3_5(),
    "qwen2.5-omni": _qwen2_5_omni(),
    "internvl": _internvl(),
    "internvl-chat": _internvl_chat(),
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
    "glm-ocr": _glm4v("GlmOcrForConditionalGeneration", "glm_ocr"),
    "minicpm-v": _minicpmv(),
    "phi4-siglip": _phi4_siglip(),
    "gemma3": _gemma3(),
    "gemma4": _gemma4(),
    "gemma4-moe": _gemma4(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64
    ),
    "gemma4-k-eq-v": _gemma4(attention_k_eq_v=True),
    "gemma4-vision-bidi": _gemma4(use_bidirectional_attention="vision"),
    "paligemma": _paligemma(),
    "cohere2-vision": _cohere2_vision(),
    "aya-vision": _aya_vision(),
    "aria": _aria(),
    "blip2": _blip2(),
    "llama4": _llama4(),
}
KINDS = (*tiny_models.KINDS, *_BUILT)


def max_images(kind: str) -> int:
    """Maximum number of images in a prompt: one or two."""
    return _BUILT[kind].max_images if kind in _BUILT else 2


def dtype(kind: str) -> str:
    """A type that vLLM's CPU kernels of this architecture support."""
    return _BUILT[kind].dtype if kind in _BUILT else "float32"


def prompt_for(kind: str, question: str, num_images: int) -> str:
    """A prompt with images before the question."""
    if kind not in _BUILT:
        return tiny_models.prompt_for(kind, question, num_images)
    image = _BUILT[kind].image.format(_BUILT[kind].placeholder)
    return f"USER: {image * num_images}{question} ASSISTANT:"


def text_after_images(kind: str, question: str) -> str:
    """The text after the last image, or all text if the processor puts images first."""
    if kind in _BUILT:
        placeholder = _BUILT[kind].placeholder
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
    for name, contents in {"config.json": {**found.config, **_IDS}, **found.files}.items():
        (path / name).write_text(json.dumps(contents))
    if "auto_map" in found.config:
        shutil.copy(_REMOTE_CODE, path)
    tokenizer = tiny_models.byte_tokenizer(_SPECIAL_TOKENS, "</s>", found.tokens)
    found.processor(tokenizer).save_pretrained(path)
    return path
