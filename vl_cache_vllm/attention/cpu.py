# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention over the page pool.

A step without evicted or observed requests takes vLLM's path untouched. Otherwise each layer
writes and reads through its own table, with vLLM's kernels, and is observed afterwards.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vl_cache_vllm.config import settings_of
from vl_cache_vllm.ops.page_pool import PagePacking

if TYPE_CHECKING:
    from vl_cache_vllm.worker.eviction import EvictionWorker
    from vl_cache_vllm.worker.step import EvictionStep


class CompressedCPUAttentionBackend(CPUAttentionBackend):
    """Replaces CPU_ATTN, the only backend name that vLLM's CPU platform selects."""

    # The impl writes K and V itself, because the slots of evicted requests differ by layer.
    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type[CompressedCPUAttentionImpl]:
        return CompressedCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedCPUAttentionMetadataBuilder]:
        return CompressedCPUAttentionMetadataBuilder


@dataclass
class CompressedCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, plus the eviction step that the runner adapter attaches."""

    builder: CompressedCPUAttentionMetadataBuilder | None = None
    worker: EvictionWorker | None = None
    step: EvictionStep | None = None
    layer_index: dict[str, int] | None = None  # layer name to layer of the pool
    layers: LayerInputs | None = None


class LayerInputs:
    """What the layers of a step have in common, and each layer's own, prepared at once."""

    def __init__(self, kv_cache: torch.Tensor, metadata: CompressedCPUAttentionMetadata) -> None:
        assert metadata.step is not None and metadata.step.tables is not None
        assert metadata.worker is not None
        tables, pool = metadata.step.tables, metadata.worker.pool.pages
        self.cache = pool.view(pool.shape[0], *kv_cache.shape[1:])  # the whole pool as a layer's
        self._metadata = dataclasses.replace(metadata)  # one for each layer in its turn
        self._tables = tables.layers
        self._lengths = [*map(tuple, tables.seq_lens.tolist())]
        self._schedules: dict[tuple[int, ...], torch.Tensor] = {}

    def metadata_of(self, layer: int) -> CompressedCPUAttentionMetadata:
        """The step's metadata with a layer's table, until it is asked for another's."""
        own = self._metadata
        own.seq_lens, own.block_table, own.slot_mapping = self._tables[layer]
        lengths = self._lengths[layer]
        # Many layers keep equally many pages, and the kernel only reads it.
        if lengths not in self._schedules:
            assert own.builder is not None
            self._schedules[lengths] = own.builder.schedule(own, own.seq_lens)
        own.scheduler_metadata = self._schedules[lengths]
        return own


class CompressedCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CompressedCPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        values = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
        return CompressedCPUAttentionMetadata(**values, builder=self)

    def schedule(self, metadata: CPUAttentionMetadata, seq_lens: torch.Tensor) -> torch.Tensor:
        """The kernel's work split for one layer's own lengths, int32 ``[num_reqs]``."""
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


class CompressedCPUAttentionImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if settings_of(get_current_vllm_config()) is None:
            return
        for feature, used in (
            ("attention sinks", self.sinks is not None),
            ("ALiBi", self.alibi_slopes is not None),
            ("KV sharing between layers", self.kv_sharing_target_layer_name is not None),
        ):
            if used:
                raise ValueError(f"KV compression does not support models with {feature}")

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            return output
        step = layer_index = None
        if isinstance(attn_metadata, CompressedCPUAttentionMetadata) and attn_metadata.step:
            step = attn_metadata.step
            assert attn_metadata.layer_index is not None and attn_metadata.worker is not None
            layer_index = attn_metadata.layer_index[layer.layer_name]  # type: ignore[attr-defined]
            if step.tables is not None:
                kv_cache, attn_metadata = self._layer_view(layer_index, kv_cache, attn_metadata)
        slots = attn_metadata.slot_mapping
        num_slots = slots.shape[0]  # the model may run on more tokens: padding
        self.do_kv_cache_update(layer, key[:num_slots], value[:num_slots], kv_cache, slots)  # type: ignore[arg-type]
        super().forward(
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
            assert isinstance(attn_metadata, CompressedCPUAttentionMetadata)
            assert attn_metadata.worker is not None and layer_index is not None
            # Stored keys times the layer's scale are the keys.
            key_scale = layer._k_scale_float if self.is_fp8_kv_cache else 1.0
            attn_metadata.worker.layer_done(
                step, layer_index, query, self.scale * key_scale, self.logits_soft_cap
            )
        return output

    def _layer_view(
        self, layer: int, kv_cache: torch.Tensor, metadata: CompressedCPUAttentionMetadata
    ) -> tuple[torch.Tensor, CompressedCPUAttentionMetadata]:
        """The whole pool as this layer's cache, and the metadata with this layer's table."""
        if metadata.layers is None:
            metadata.layers = LayerInputs(kv_cache, metadata)
        return metadata.layers.cache, metadata.layers.metadata_of(layer)


def number_type(cache_dtype: str) -> torch.dtype | None:
    """What the bytes of a cache are where vLLM stores it as bytes."""
    if not is_quantized_kv_cache(cache_dtype):
        return None
    return torch.float8_e5m2 if cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn


def derive_packing(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype, cache_dtype: str = "auto"
) -> PagePacking:
    """Find out how vLLM's CPU kernels order a page, by writing numbered tokens and reading back.

    Args:
        isa, block_size, head_size: of the kernel and the cache.
        dtype: of the tokens' keys and values.
        cache_dtype: vLLM's name of the cache's type.

    Raises:
        ValueError: if the order is not a permutation of the page, which then cannot be evicted.
    """
    cells = block_size * head_size
    stored = number_type(cache_dtype)
    base = 128 if stored is None else 8  # digits that each type holds exactly
    numbers = torch.arange(cells).view(block_size, 1, head_size)
    keys, values = torch.zeros(cells, dtype=torch.int64), torch.zeros(cells, dtype=torch.int64)
    weight = 1
    while weight < cells:  # one digit at a time
        empty = dtype if stored is None else torch.uint8
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=empty)
        key_cache, value_cache = cache.chunk(2, dim=2)
        token = (numbers // weight % base).to(dtype)
        ops.cpu_attn_reshape_and_cache(
            token,
            token,
            key_cache,
            value_cache,
            torch.arange(block_size),
            isa,
            kv_cache_dtype=cache_dtype,
        )
        for found, written in ((keys, key_cache), (values, value_cache)):
            digits = written.reshape(-1) if stored is None else written.reshape(-1).view(stored)
            found += weight * digits.float().long()
        weight *= base
    everything = torch.arange(cells)
    for name, cell in (("K", keys), ("V", values)):
        if not torch.equal(cell.sort().values, everything):
            raise ValueError(
                f"KV compression cannot read the {name} cache packing of vLLM's CPU attention "
                f"(instruction set {isa}, block size {block_size}, head size {head_size}, {dtype})"
            )
    shape = (block_size, head_size)
    # cell[offset] is the number stored there; invert it.
    return PagePacking(keys.argsort().view(shape), cells + values.argsort().view(shape))
