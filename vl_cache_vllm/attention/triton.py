# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton attention over the page pool, for GPUs and head sizes without FlashAttention."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vl_cache_vllm.attention.per_layer import (
    ContiguousPagesMixin,
    DecodeGraphsMixin,
    PerLayerAttentionMixin,
)


class EvictionTritonAttentionBackend(ContiguousPagesMixin, TritonAttentionBackend):
    """Replaces TRITON_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[EvictionTritonAttentionImpl]:
        return EvictionTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionTritonAttentionMetadataBuilder]:
        return EvictionTritonAttentionMetadataBuilder


class EvictionTritonAttentionMetadataBuilder(DecodeGraphsMixin, TritonAttentionMetadataBuilder):
    pass


class EvictionTritonAttentionImpl(PerLayerAttentionMixin, TritonAttentionImpl):
    pass
