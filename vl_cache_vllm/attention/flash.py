# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention over the page pool."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vl_cache_vllm.attention.layered import DecodeGraphs, GPUPages, LayeredAttention


class CompressedFlashAttentionBackend(GPUPages, FlashAttentionBackend):
    """Replaces FLASH_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CompressedFlashAttentionImpl]:
        return CompressedFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedFlashAttentionMetadataBuilder]:
        return CompressedFlashAttentionMetadataBuilder


class CompressedFlashAttentionMetadataBuilder(DecodeGraphs, FlashAttentionMetadataBuilder):
    pass


class CompressedFlashAttentionImpl(LayeredAttention, FlashAttentionImpl):
    pass
