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
)
from transformers.models.auto import CONFIG_MAPPING
from vllm.transformers_utils.configs.dotsocr import DotsOCRConfig  # noqa: F401
from vllm.transformers_utils.processors.minicpmv import MiniCPMVProcessor  # noqa: F401


class Phi4SiglipConfig(Phi3Config):
    model_type = "phi4-siglip"


class BeeConfig(LlavaOnevisionConfig):
    model_type = "bee"


class InternS2PreviewConfig(Qwen3_5MoeConfig):
    model_type = "interns2_preview"


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


class KimiVLImageProcessor(BaseImageProcessor):
    """Pads images to whole merged patches; they are small enough as they are."""

    model_input_names = ("pixel_values", "image_grid_hws")

    def __init__(self, patch_size=14, merge_kernel_size=(2, 2), in_token_limit=4096, **kwargs):
        super().__init__(**kwargs)
        self.patch_size, self.in_token_limit = patch_size, in_token_limit
        self.merge_kernel_size = list(merge_kernel_size)

    def __call__(self, images: Sequence[Image.Image], return_tensors="pt", **kwargs):
        n = self.patch_size
        step = n * self.merge_kernel_size[0]
        grids, patches = [], []
        for image in images:
            pixels = pil_to_tensor(image) / 127.5 - 1
            pixels = pad(pixels, (0, -image.width % step, 0, -image.height % step))
            rows = pixels.unfold(1, n, n).unfold(2, n, n)  # [3, rows, columns, n, n]
            grids.append(rows.shape[1:3])
            patches.append(rows.permute(1, 2, 0, 3, 4).flatten(0, 1))
        return BatchFeature(
            dict(pixel_values=torch.cat(patches), image_grid_hws=torch.tensor(grids))
        )


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
