# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention over the page pool."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vl_cache_vllm.attention.cpu_packing import derive_packing
from vl_cache_vllm.attention.per_layer import LayerInputs, PerLayerAttentionMixin
from vl_cache_vllm.ops.page_pool import PagePacking


class EvictionCPUAttentionBackend(CPUAttentionBackend):
    """Replaces CPU_ATTN, the only backend name that vLLM's CPU platform selects."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type[EvictionCPUAttentionImpl]:
        return EvictionCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionCPUAttentionMetadataBuilder]:
        return EvictionCPUAttentionMetadataBuilder


@dataclass
class EvictionCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and the builder that computes the kernel's schedule."""

    builder: EvictionCPUAttentionMetadataBuilder | None = None


class CPULayerInputs(LayerInputs):
    """Adds the schedule that vLLM's CPU kernel needs for each layer's lengths."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lengths = [*map(tuple, self.tables.seq_lens.tolist())]
        self._schedules: dict[tuple[int, ...], torch.Tensor] = {}

    def metadata_of(self, layer: int) -> EvictionCPUAttentionMetadata:
        """The base's, with the layer's schedule."""
        own = super().metadata_of(layer)
        lengths = self._lengths[layer]
        # Layers with equal lengths share a schedule; the kernel only reads it.
        if lengths not in self._schedules:
            self._schedules[lengths] = own.builder.schedule(own, own.seq_lens)
        own.scheduler_metadata = self._schedules[lengths]
        return own


class EvictionCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> EvictionCPUAttentionMetadata:
        """vLLM's, and remembers the builder."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
        return EvictionCPUAttentionMetadata(**values, builder=self)

    def schedule(self, metadata: CPUAttentionMetadata, seq_lens: torch.Tensor) -> torch.Tensor:
        """The kernel's schedule for one layer's lengths, int32 ``[num_reqs]``."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seq_lens.shape[0],
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,  # type: ignore[arg-type]
            query_start_loc=metadata.query_start_loc,
            causal=metadata.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class EvictionCPUAttentionImpl(PerLayerAttentionMixin, CPUAttentionBackendImpl):
    layer_inputs = CPULayerInputs

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """vLLM's, without padding tokens, which have no slot."""
        num_slots = slot_mapping.shape[0]
        super().do_kv_cache_update(
            layer, key[:num_slots], value[:num_slots], kv_cache, slot_mapping
        )

    def page_packing(self, layer: Any, dtype: torch.dtype) -> PagePacking:
        """The packing that the layer's CPU kernel uses, found by experiment."""
        _, _, block_size, content = layer.kv_cache.shape
        if layer.kv_cache.stride(2) != content:
            raise ValueError("KV compression needs head-major pages of vLLM's CPU attention")
        return derive_packing(layer.isa, block_size, layer.head_size, dtype, layer.kv_cache_dtype)
