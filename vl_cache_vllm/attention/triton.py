# SPDX-License-Identifier: Apache-2.0
"""vLLM's Triton attention over the page pool, for GPUs and head sizes without FlashAttention."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vl_cache_vllm.attention.layered import DecodeGraphs, GPUPages, LayeredAttention


class CompressedTritonAttentionBackend(GPUPages, TritonAttentionBackend):
    """Replaces TRITON_ATTN."""

    @staticmethod
    def get_impl_cls() -> type[CompressedTritonAttentionImpl]:
        return CompressedTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedTritonAttentionMetadataBuilder]:
        return CompressedTritonAttentionMetadataBuilder


class CompressedTritonAttentionMetadataBuilder(DecodeGraphs, TritonAttentionMetadataBuilder):
    pass


class CompressedTritonAttentionImpl(LayeredAttention, TritonAttentionImpl):
    pass
