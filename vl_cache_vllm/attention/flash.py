# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention over the page pool."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vl_cache_vllm.attention.per_layer import (
    ContiguousPagesMixin,
    DecodeGraphsMixin,
    PerLayerAttentionMixin,
)


class EvictionFlashAttentionBackend(ContiguousPagesMixin, FlashAttentionBackend):
    """Replaces FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[EvictionFlashAttentionImpl]:
        return EvictionFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionFlashAttentionMetadataBuilder]:
        return EvictionFlashAttentionMetadataBuilder


class EvictionFlashAttentionMetadataBuilder(DecodeGraphsMixin, FlashAttentionMetadataBuilder):
    pass


class EvictionFlashAttentionImpl(PerLayerAttentionMixin, FlashAttentionImpl):
    pass
