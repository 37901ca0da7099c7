# SPDX-License-Identifier: Apache-2.0
"""What each of our attention backends adds to the one of vLLM's that it extends.

A step without evicted or observed requests takes vLLM's path untouched. Otherwise each layer
writes and reads through its own table, with vLLM's kernels, and is observed afterwards.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import KVCacheSpec, is_quantized_kv_cache
from vllm.v1.kv_cache_layout import KVCacheLayout

from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.ops.page_pool import PagePacking

if TYPE_CHECKING:
    from vl_cache_vllm.worker.evictor import Evictor
    from vl_cache_vllm.worker.step import EvictionStep

_ATTRIBUTE = "kv_compress_step"


class LayerInputs:
    """The metadata and the cache of a step's layers, which differ in their tables."""

    def __init__(self, kv_cache: torch.Tensor, metadata: Any, running: RunningStep) -> None:
        tables, pages = running.step.tables, running.worker.pool.pages
        assert tables is not None
        self.tables = tables
        self.cache = pages.as_strided(  # the whole pool as a layer's
            (pages.shape[0], *kv_cache.shape[1:]),
            (pages.stride(0), *kv_cache.stride()[1:]),
            pages.storage_offset(),
        )
        self._metadata = dataclasses.replace(metadata)  # one for each layer in its turn

    def metadata_of(self, layer: int) -> Any:
        """The step's metadata with a layer's table, until it is asked for another's.

        It keeps vLLM's division of work among FlashAttention 3's programs, made for the logical
        lengths: into how many parts each request's keys are split, right for any length.
        """
        own = self._metadata
        own.seq_lens, own.block_table, own.slot_mapping = self.tables.layers[layer]
        return own


@dataclass(eq=False)
class RunningStep:
    """A step as its layers see it, hung on vLLM's metadata."""

    worker: Evictor
    step: EvictionStep
    layer_index: dict[str, int]  # the pool's layer of each layer name
    inputs: LayerInputs | None = None  # made by the first layer

    def attach(self, metadata: Any) -> None:
        setattr(metadata, _ATTRIBUTE, self)


class PerLayerAttentionMixin:
    """Stands before vLLM's implementation among the bases of ours.

    It writes K and V itself (the backend says so in ``forward_includes_kv_cache_update``), because
    the slots of evicted requests differ by layer.
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
            ("KV sharing between layers", ours.kv_sharing_target_layer_name is not None),
        ):
            if used:
                raise ValueError(f"KV compression does not support models with {feature}")

    def page_packing(self, layer: Any, dtype: torch.dtype) -> PagePacking:
        """Where the tokens of a page of a layer lie; ``dtype`` is that of new keys and values.

        vLLM's GPU kernels keep K and V of a token and head side by side.

        Raises:
            ValueError: if the page cannot be evicted token by token.
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
        running: RunningStep | None = None
        layer_index = -1
        if attn_metadata is not None:  # None: a profiling run
            running = getattr(attn_metadata, _ATTRIBUTE, None)
            if running is not None:
                layer_index = running.layer_index[layer.layer_name]
                if running.step.tables is not None:
                    kv_cache, attn_metadata = self._layer_view(
                        running, layer_index, kv_cache, attn_metadata
                    )
            vllm_impl.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
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
        if running is not None:
            ours: Any = self
            # Stored keys times the layer's scale are the keys.
            key_scale = layer._k_scale_float if is_quantized_kv_cache(ours.kv_cache_dtype) else 1.0
            running.worker.layer_done(
                running.step,
                layer_index,
                query,
                ours.scale * key_scale,
                float(ours.logits_soft_cap),  # vLLM's int 0 would be another type for Triton
            )
        return output

    def _layer_view(
        self, running: RunningStep, layer: int, kv_cache: torch.Tensor, metadata: Any
    ) -> tuple[torch.Tensor, Any]:
        """The whole pool as this layer's cache, and the metadata with this layer's table."""
        if running.inputs is None:
            running.inputs = self.layer_inputs(kv_cache, metadata, running)
        return running.inputs.cache, running.inputs.metadata_of(layer)


class ContiguousPagesMixin:
    """Stands before vLLM's GPU backend among the bases of ours."""

    forward_includes_kv_cache_update: bool = True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those whose pages are contiguous, vLLM's own default first."""
        return (
            KVCacheLayout.LBNHC,
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLNHC,
            KVCacheLayout.BLHNC,
        )


class DecodeGraphsMixin:
    """Stands before vLLM's metadata builder among the bases of ours."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Full CUDA graphs of decode steps only: one of a prefill could not be observed."""
        return AttentionCGSupport.UNIFORM_BATCH


def number_type(cache_dtype: str) -> torch.dtype | None:
    """What the bytes of a cache are where vLLM stores it as bytes."""
    if not is_quantized_kv_cache(cache_dtype):
        return None
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn
