# SPDX-License-Identifier: Apache-2.0
"""A vLLM weight loader that makes weights up, for any architecture: ``load_format="random"``.

Unlike vLLM's own dummy weights, which are next to zero, they make attention that is far from
uniform and whose density differs between layers. Parameters are functions of their name and shape.
"""

import math
import zlib

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from testing.tiny_models import logit_std


@register_model_loader("random")
class RandomLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        pass

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(_value(name, parameter))
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        for layer, gain in zip(layers, logit_std(len(layers)), strict=True):
            layer.impl.scale *= gain


def _value(name: str, like: torch.Tensor) -> torch.Tensor:
    """Outputs of unit variance where inputs have it, or near it."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if like.ndim < 2:
        return (1 if name.endswith("weight") else 0) + 0.1 * noise  # norms; biases and the like
    if "embed" in name and like.ndim == 2:
        return noise
    inputs = like.shape[-1] if like.ndim == 3 else like[0].numel()  # 3: experts
    return noise / math.sqrt(inputs)
