# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec through which vLLM finds our block manager."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.block_manager import EvictionBlockManager

# vLLM registers its own specs only while the registry is empty, so they must come before ours.
KVCacheSpecRegistry._ensure_registered()


@register_kv_cache_spec(
    manager_class=EvictionBlockManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class EvictionAttentionSpec(FullAttentionSpec):
    """Full attention whose prompts may be evicted after their prefill."""

    # Optional only because FullAttentionSpec.merge builds the class without it.
    kv_compress: KVCompressConfig | None = None

    @classmethod
    def wrap(cls, spec: FullAttentionSpec, config: KVCompressConfig) -> Self:
        """The spec with the same layer format, and eviction."""
        own = {f.name: getattr(spec, f.name) for f in fields(spec)}
        return cls(**own, kv_compress=config)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """vLLM's, and keeps the settings, which all layers share."""
        settings = {spec.kv_compress for spec in specs}
        assert len(settings) == 1, "layers of one KV cache group must share their settings"
        return replace(super().merge(specs), kv_compress=settings.pop())


@register_kv_cache_spec(
    manager_class=EvictionBlockManager, uniform_type_base_spec=FullAttentionSpec
)
@dataclass(frozen=True, kw_only=True)
class EvictionMLASpec(EvictionAttentionSpec, MLAAttentionSpec):
    """Multi-head latent attention whose prompts may be evicted after their prefill."""

    head_size_v: int = 0  # as in MLAAttentionSpec; dataclasses take the first base's default


_OF_SPARSE_ATTENTION = "cache_role", "model_version", "tokens_per_state"


def with_eviction(spec: KVCacheSpec, config: KVCompressConfig) -> KVCacheSpec:
    """The spec of a layer, with our block manager if the layer can be evicted.

    Subclasses of these specs describe other layers; so do those of latent attention with other
    values of `_OF_SPARSE_ATTENTION` than the defaults.
    """
    if type(spec) is FullAttentionSpec:
        return EvictionAttentionSpec.wrap(spec, config)
    if type(spec) is MLAAttentionSpec and all(
        getattr(spec, name) == getattr(MLAAttentionSpec, name) for name in _OF_SPARSE_ATTENTION
    ):
        return EvictionMLASpec.wrap(spec, config)
    return spec
