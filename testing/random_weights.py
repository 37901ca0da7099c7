# SPDX-License-Identifier: Apache-2.0
"""A vLLM weight loader for any architecture that generates weights: ``load_format="random"``.

vLLM's dummy weights are close to zero. With these weights attention is far from uniform, and its
density differs between layers. A parameter depends only on its name and shape.
"""

import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from testing.tiny_models import logit_std
from vl_cache_vllm.self_check.model import random_parameter


@register_model_loader("random")
class RandomLoader(BaseModelLoader):
    """Fills all parameters with `random_parameter`, and scales attention logits by `logit_std`."""

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    @torch.no_grad()
    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, parameter))
        for module in model.modules():
            if isinstance(module, MambaMixer2):  # as vLLM does when it reads a checkpoint
                module.A.copy_(-module.A.exp())
        if getattr(model_config.hf_text_config, "attention_k_eq_v", False):
            _load_keys_as_values(model)
        layers = [module for module in model.modules() if isinstance(module, Attention)]
        for layer, gain in zip(layers, logit_std(len(layers)), strict=True):
            # Gemma 4 leaves the scale to learned norms. Made-up ones would give logits in the
            # hundreds, in which float32 rounds away what the matrix wants to see.
            layer.impl.scale = gain * min(layer.impl.scale, layer.head_size**-0.5)
        # Layers of latent attention share the scale of their prefills.
        latent = [module for name, module in model.named_modules() if name.endswith(".q_b_proj")]
        for module, gain in zip(latent, logit_std(len(latent)), strict=True):
            module.weight.mul_(gain)


def _load_keys_as_values(model: torch.nn.Module) -> None:
    """In Gemma 4's layers of full attention, as vLLM does when it reads a checkpoint of one."""
    for name, module in model.named_modules():
        if name.endswith(".self_attn") and not getattr(module, "is_sliding", True):
            _, key, value = module.qkv_proj.weight.split(
                [module.q_size, module.kv_size, module.kv_size]
            )
            value.copy_(key)
