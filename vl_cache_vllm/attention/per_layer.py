# SPDX-License-Identifier: Apache-2.0
"""Mixins that give vLLM's attention backends a block table per layer, and observe each layer.

A step without evicted or observed requests takes vLLM's path unchanged. In any other step each
layer reads and writes the cache through its own table, with vLLM's kernels, and the worker then
observes the layer's queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache
from vllm.v1.kv_cache_layout import KVCacheLayout

from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.messages import take_step
from vl_cache_vllm.ops.layer_tables import LayerTables
from vl_cache_vllm.ops.page_pool import PagePacking


class StepObserver(Protocol):
    """One step of a worker as its attention layers see it; implemented by `EvictionStep`."""

    tables: LayerTables | None
    """Per-layer tables; None where no request of the batch is evicted and all layers agree."""
    layer_index: dict[str, int]
    """Index in the page pool of each evicted layer, by vLLM's layer name.

    A layer that reads the KV cache of another one has that layer's index.
    """
    layer_inputs: LayerInputs | None
    """Set by the first layer of the step and reused by the others."""

    @property
    def pages(self) -> torch.Tensor:
        """All pages of the pool, ``[num_pages, num_kv_heads, cells of one head]``."""

    def layer_done(
        self, layer: int, query: torch.Tensor, scale: float, softcap: float, is_owner: bool
    ) -> None:
        """Called after the attention of a layer (`vl_cache_vllm.worker.evictor.Evictor`)."""


def whole_pool(pages: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    """The pages of all layers in the shape of a layer's cache, which has a page for each block."""
    return pages.as_strided(
        (pages.shape[0], *kv_cache.shape[1:]),
        (pages.stride(0), *kv_cache.stride()[1:]),
        pages.storage_offset(),
    )


class LayerInputs:
    """The KV cache and the attention metadata of one layer at a time."""

    def __init__(self, kv_cache: torch.Tensor, metadata: Any, step: StepObserver) -> None:
        assert step.tables is not None
        self.tables, self.cache = step.tables, whole_pool(step.pages, kv_cache)
        self._metadata = dataclasses.replace(metadata)

    def metadata_of(self, layer: int) -> Any:
        """Attention metadata for one layer.

        The returned object is reused: the next call overwrites it. FlashAttention 3's scheduler
        metadata is shared by all layers. It only fixes the number of splits per request, which is
        valid for any length.
        """
        own = self._metadata
        own.seq_lens, own.block_table, own.slot_mapping = self.tables.layers[layer]
        return own


class PerLayerAttentionMixin:
    """Mixin for attention implementations; must precede vLLM's implementation in the MRO.

    It writes K and V itself (the backend declares ``forward_includes_kv_cache_update``), because
    the slots of evicted requests differ by layer. A layer that reads the KV cache of an earlier one
    writes none and uses that layer's table.
    """

    layer_inputs: ClassVar[type[LayerInputs]] = LayerInputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if get_kv_compress_config(get_current_vllm_config()) is None:
            return
        ours: Any = self
        for feature, used in (
            ("attention sinks", ours.sinks is not None),
            ("ALiBi", ours.alibi_slopes is not None),
        ):
            if used:
                raise ValueError(f"KV compression does not support models with {feature}")

    def page_packing(self, layer: Any, dtype: torch.dtype) -> PagePacking:
        """Where the elements of each token lie in a page of a layer.

        vLLM's GPU kernels store K and V of a token and head next to each other.

        Args:
            layer: vLLM's attention layer, with its cache.
            dtype: of new keys and values.

        Raises:
            ValueError: if single tokens of a page cannot be addressed.
        """
        cache = layer.kv_cache  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
        return PagePacking.side_by_side(cache.shape[2], layer.head_size, cache.stride(2))

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's with the layer's own table, then the observation of the layer."""
        vllm_impl: Any = super()
        ours: Any = self
        is_owner = ours.kv_sharing_target_layer_name is None
        step: StepObserver | None = None
        layer_index = -1
        if attn_metadata is not None:  # None: a profiling run
            step = take_step(attn_metadata)
            if step is not None:
                layer_index = step.layer_index[layer.layer_name]
                if step.tables is not None:
                    kv_cache, attn_metadata = self._layer_view(
                        step, layer_index, kv_cache, attn_metadata
                    )
            if is_owner:
                slots = attn_metadata.slot_mapping
                vllm_impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
        vllm_impl.forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )
        if step is not None:
            # Quantised keys are stored divided by the layer's scale.
            key_scale = layer._k_scale_float if is_quantized_kv_cache(ours.kv_cache_dtype) else 1.0
            step.layer_done(
                layer_index,
                query,
                ours.scale * key_scale,
                float(ours.logits_soft_cap),  # vLLM's int 0 would be another type for Triton
                is_owner,
            )
        return output

    def _layer_view(
        self, step: StepObserver, layer: int, kv_cache: torch.Tensor, metadata: Any
    ) -> tuple[torch.Tensor, Any]:
        """The whole pool as this layer's cache, and the metadata with this layer's table."""
        if step.layer_inputs is None:
            step.layer_inputs = self.layer_inputs(kv_cache, metadata, step)
        return step.layer_inputs.cache, step.layer_inputs.metadata_of(layer)


class ContiguousPagesMixin:
    """Mixin for GPU backends; must precede vLLM's backend in the MRO."""

    forward_includes_kv_cache_update: bool = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """The layouts whose pages are contiguous; vLLM's own default comes first."""
        return (
            KVCacheLayout.LBNHC,
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLNHC,
            KVCacheLayout.BLHNC,
        )


class DecodeGraphsMixin:
    """Mixin for metadata builders; must precede vLLM's builder in the MRO."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Full CUDA graphs for decode steps only: a prefill in a graph could not be observed."""
        return AttentionCGSupport.UNIFORM_BATCH


def number_type(cache_dtype: str) -> torch.dtype | None:
    """The element type of a cache that vLLM stores as bytes; None for other caches."""
    if not is_quantized_kv_cache(cache_dtype):
        return None
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
