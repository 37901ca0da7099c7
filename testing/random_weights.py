# SPDX-License-Identifier: Apache-2.0
"""A vLLM weight loader for any architecture that generates weights: ``load_format="random"``.

vLLM's dummy weights are close to zero. With these weights attention is far from uniform, and its
density differs between layers. A parameter depends only on its name and shape.
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
    """Fills all parameters with `_value`, and scales attention logits by `logit_std`."""

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
    """Random values such that outputs have about unit variance if inputs have."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if like.ndim < 2:
        return (1 if name.endswith("weight") else 0) + 0.1 * noise  # norms and biases
    if "embed" in name and like.ndim == 2:
        return noise
    inputs = like.shape[-1] if like.ndim == 3 else like[0].numel()  # 3: experts
    return noise / math.sqrt(inputs)
