# SPDX-License-Identifier: Apache-2.0
"""Custom code for checkpoints of `testing.model_zoo` whose published versions have custom code.

It is copied into such a checkpoint and contains only what vLLM requires.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    LlavaOnevisionConfig,
    Phi3Config,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2Config,
    Qwen3_5MoeConfig,
    SiglipVisionConfig,
    WhisperConfig,
)
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: F401
from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig  # noqa: F401
from vllm.transformers_utils.processors.minicpmo import MiniCPMOProcessor  # noqa: F401
from vllm.transformers_utils.processors.minicpmv import MiniCPMVProcessor  # noqa: F401


class Phi4SiglipConfig(Phi3Config):
    model_type = "phi4-siglip"


class Phi3VConfig(Phi3Config):
    model_type = "phi3_v"


class Phi4MMConfig(Phi3Config):
    model_type = "phi4mm"


class BeeConfig(LlavaOnevisionConfig):
    model_type = "bee"


class InternS2PreviewConfig(Qwen3_5MoeConfig):
    model_type = "interns2_preview"


class InternS2MobiusConfig(Qwen3_5MoeConfig):
    model_type = "interns2_mobius"


class RConfig(LlavaOnevisionConfig):
    model_type = "r"


class PartsConfig(PreTrainedConfig):
    """A configuration of a vision encoder and a language model, under any names."""

    def __init__(self, **kwargs):
        for name, value in kwargs.items():
            if name.endswith("_config") and isinstance(value, dict):
                # transformers does not know every encoder.
                known = value["model_type"] in CONFIG_MAPPING
                make = CONFIG_MAPPING[value["model_type"]] if known else PreTrainedConfig
                kwargs[name] = make(**value)
        super().__init__(**kwargs)


class MiniCPMVConfig(Qwen2Config):
    model_type = "minicpmv"

    def __init__(self, vision_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = SiglipVisionConfig(**vision_config or {})


class MiniCPMOConfig(MiniCPMVConfig):
    model_type = "minicpmo"

    def __init__(self, audio_config=None, **kwargs):
        super().__init__(**kwargs)
        self.audio_config = WhisperConfig(**audio_config or {})


class MiniCPMVImageProcessor(BaseImageProcessor):
    """Every image is a single slice of ``size`` x ``size`` pixels, cut into patches."""

    def __init__(self, size=224, patch_size=14, image_feature_size=64, **kwargs):
        super().__init__(**kwargs)
        self.size, self.patch_size = size, patch_size
        self.image_feature_size = image_feature_size
        self.max_slice_nums = 1

    def get_sliced_grid(self, image_size, max_slice_nums, never_split=False):
        return None

    def get_slice_image_placeholder(
        self, image_size, image_idx=0, max_slice_nums=None, use_image_id=None
    ) -> str:
        return f"<image>{'<unk>' * self.image_feature_size}</image>"

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], return_tensors="pt", **kwargs
    ) -> BatchFeature:
        side = self.size // self.patch_size
        return BatchFeature(
            dict(
                pixel_values=[[self._patches(image) for image in row] for row in images],
                image_sizes=[[torch.tensor(image.size) for image in row] for row in images],
                tgt_sizes=[torch.tensor([[side, side]] * len(row)) for row in images],
            )
        )

    def _patches(self, image: Image.Image) -> torch.Tensor:
        """The patches of an image, concatenated: [3, patch size, columns of all patches]."""
        n = self.patch_size
        pixels = pil_to_tensor(image.resize((self.size, self.size))) / 127.5 - 1
        rows = pixels.unfold(1, n, n)  # [3, rows, size, n]
        return rows.permute(0, 3, 1, 2).flatten(2)


def _patches(image: Image.Image, size: int, merged: int) -> torch.Tensor:
    """[rows, columns, 3, size, size], of an image padded to whole merged patches."""
    step = size * merged
    pixels = pad(pil_to_tensor(image), (0, -image.width % step, 0, -image.height % step))
    rows = pixels.unfold(1, size, size).unfold(2, size, size)  # [3, rows, columns, size, size]
    return rows.permute(1, 2, 0, 3, 4)


def _flat_patches(images: Sequence[Image.Image], side: int) -> torch.Tensor:
    """[images, patches, pixels of a patch], of images of ``side`` x ``side`` pixels."""
    patches = torch.stack([_patches(image.resize((side, side)), 14, 1) for image in images])
    return (patches / 127.5 - 1).permute(0, 1, 2, 4, 5, 3).flatten(1, 2).flatten(2)


class _PatchProcessor(BaseImageProcessor):
    """Does not resize images: they are small enough as they are."""

    def __init__(self, patch_size=14, merge_size=2, max_pixels=448**2, **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.merge_size = patch_size, merge_size
        self.size = dict(min_pixels=(patch_size * merge_size) ** 2, max_pixels=max_pixels)

    def patches(self, images: Sequence[Image.Image]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Patches of each image, and their numbers of frames, rows and columns."""
        patches = [_patches(image, self.patch_size, self.merge_size) for image in images]
        return patches, torch.tensor([(1, *each.shape[:2]) for each in patches])


class KimiVLImageProcessor(_PatchProcessor):
    model_input_names = ("pixel_values", "image_grid_hws")

    def __init__(self, in_token_limit=4096, **kwargs):
        super().__init__(**kwargs)
        self.in_token_limit = in_token_limit
        self.merge_kernel_size = [self.merge_size] * 2

    def __call__(self, images: Sequence[Image.Image], return_tensors="pt", **kwargs):
        patches, grids = self.patches(images)
        pixels = torch.cat([each.flatten(0, 1) for each in patches]) / 127.5 - 1
        return BatchFeature(dict(pixel_values=pixels, image_grid_hws=grids[:, 1:]))


class KimiVLProcessor(ProcessorMixin):
    attributes = ("image_processor", "tokenizer")
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_token = "<|media_pad|>"

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer)

    def __call__(self, text=None, images=None, return_tensors="pt", **kwargs):
        features = self.image_processor(images) if images else {}
        texts = [text] if isinstance(text, str) else text
        merged = self.image_processor.merge_kernel_size[0] ** 2
        for height, width in features["image_grid_hws"].tolist() if images else ():
            tokens = "<placeholder>" * (height * width // merged)
            texts = [one.replace(self.image_token, tokens, 1) for one in texts]
        texts = [one.replace("<placeholder>", self.image_token) for one in texts]
        return BatchFeature({**self.tokenizer(texts, return_tensors=return_tensors), **features})


class KeyeProcessor(ProcessorMixin):
    image_token, video_token = "<|image_pad|>", "<|video_pad|>"

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = _PatchProcessor()

    def __call__(self, text=None, images=(), **kwargs):
        patches, grids = self.image_processor.patches(images)
        pixels = torch.cat([each.flatten(0, 1) for each in patches]) / 127.5 - 1
        return BatchFeature(dict(pixel_values=pixels, image_grid_thw=grids))


class KananaVImageProcessor(_PatchProcessor):
    """vLLM calls it for one image at a time, and resizes what it measures to these sizes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.min_pixels, self.max_pixels = self.size["min_pixels"], self.size["max_pixels"]

    def __call__(self, image: Image.Image) -> dict[str, object]:
        (patches,), ((_, height, width),) = self.patches([image])
        pixels = (patches / 127.5 - 1).flatten(0, 1).unsqueeze(2).expand(-1, -1, 2, -1, -1)
        return dict(
            pixel_values=pixels.flatten(1),
            image_meta=dict(
                vision_grid_thw=(1, height, width), image_token_thw=(1, height // 2, width // 2)
            ),
        )


class KananaVProcessor(ProcessorMixin):
    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = KananaVImageProcessor()


class ErnieVLProcessor(ProcessorMixin):
    """vLLM normalizes the pixels."""

    spatial_conv_size = temporal_conv_size = 2

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = _PatchProcessor()
        self.image_processor.image_mean = self.image_processor.image_std = [0.5] * 3
        self.image_processor.rescale_factor = 1 / 255

    def __call__(self, text=None, images=(), **kwargs):
        patches, grids = self.image_processor.patches(images)
        merged = [
            each.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).transpose(1, 2) for each in patches
        ]
        pixels = torch.cat([each.reshape(-1, each[0, 0, 0, 0].numel()) for each in merged])
        return BatchFeature(dict(images=pixels, grid_thw=grids))


class Molmo2Processor(ProcessorMixin):
    """Every image is seen twice: as a whole, and as the single one of its crops."""

    image_use_col_tokens = use_single_crop_start_token = True
    use_single_crop_col_tokens = video_use_col_tokens = use_frame_special_tokens = False
    video_processor = None

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = images = BaseImageProcessor()
        images.size = dict(height=224, width=224)
        images.patch_size, images.pooling_size = 14, [2, 2]
        images.max_crops, images.overlap_margins = 1, [4, 4]

    def __call__(self, text=None, images=(), **kwargs):
        crops, side = _flat_patches(images, 224), 224 // 14
        index = torch.arange(side * side).view(side // 2, 2, side // 2, 2).transpose(1, 2)
        pooled = index.reshape(-1, 4)
        pooling = torch.cat([pooled, pooled + side * side] * len(images))
        return BatchFeature(
            dict(
                input_ids=torch.tensor([[0]]),
                pixel_values=crops.repeat_interleave(2, dim=0),
                image_token_pooling=pooling,
                image_grids=torch.tensor([[side // 2] * 4] * len(images)),
                image_num_crops=torch.tensor([2] * len(images)),
            )
        )


class MolmoProcessor(ProcessorMixin):
    """Every image is seen twice: as a whole, and as the single one of its crops."""

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor = images = BaseImageProcessor()
        images.base_image_input_size, images.image_patch_size = [336, 336], 14
        images.max_crops, images.overlap_margins = 1, [4, 4]
        images.image_token_length_w = images.image_token_length_h = 12

    def get_tokens_input(self, prompt, message_format, always_start_with_space):
        return self.tokenizer.encode(prompt, add_special_tokens=False)

    def process(self, text=None, images=(), tokens=(), **kwargs):
        first = self.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        outputs = dict(input_ids=torch.tensor([first, *tokens]))
        if images:
            crops = _flat_patches(images, 336).repeat_interleave(2, dim=0)
            outputs["images"] = crops
            outputs["image_masks"] = torch.ones(crops.shape[:2])
            outputs["image_input_idx"] = torch.arange(len(crops) * 144).view(-1, 144)
        return BatchFeature(outputs)


class Phi3VProcessor(ProcessorMixin):
    """Every image is seen twice: as a whole, and as the single one of its crops."""

    img_tokens = tuple(f"<|image_{i}|>" for i in range(1, 100))

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)

    def calc_num_image_tokens_from_image_size(self, width, height):
        return 2 * 12 * (12 + 1) + 1

    def __call__(self, text=None, images=(), **kwargs):
        pixels = [pil_to_tensor(image.resize((336, 336))) / 127.5 - 1 for image in images]
        crops = torch.stack([torch.stack([one, one]) for one in pixels])
        sizes = torch.tensor([[336, 336]] * len(pixels))
        return BatchFeature(dict(pixel_values=crops, image_sizes=sizes))


class Phi4MMProcessor(ProcessorMixin):
    """Every image is seen twice: as a whole, and as the single one of its crops."""

    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer)
        self.image_processor, self.audio_processor = BaseImageProcessor(), BaseImageProcessor()
        self.image_processor.dynamic_hd = 1
        self.audio_processor.sampling_rate = 16000

    def __call__(self, text=None, images=(), **kwargs):
        side, patches = 448, 448 // 14
        crops, masks = [], []
        for image in images:
            scale = side / max(image.size)
            seen = image.resize([int(scale * length) for length in image.size])
            below, right = side - seen.height, side - seen.width
            crop = pad(pil_to_tensor(seen) / 127.5 - 1, (0, right, 0, below), value=1)
            crops.append(torch.stack([pil_to_tensor(image.resize((side, side))) / 127.5 - 1, crop]))
            mask = torch.ones(2, patches, patches)
            mask[1, patches - below // 14 :] = 0
            mask[1, :, patches - right // 14 :] = 0
            masks.append(mask)
        return BatchFeature(
            dict(
                input_image_embeds=torch.stack(crops),
                image_attention_mask=torch.stack(masks),
                image_sizes=torch.tensor([[side, side]] * len(crops)),
            )
        )
