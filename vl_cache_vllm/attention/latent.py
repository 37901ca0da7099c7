# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA) over the page pool, on CPUs.

MLA caches one latent vector for each token, which all query heads read: the whole vector is the
key, and its first ``kv_lora_rank`` elements are the value. So a layer has one KV head, and all of
its query heads choose the tokens together.

vLLM's layer writes the cache and divides a batch into prefills and decodes before any attention
backend is called. Only the layer's own methods see a step whole, so they are wrapped.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from vl_cache_vllm.attention.per_layer import StepObserver, whole_pool
from vl_cache_vllm.messages import take_step
from vl_cache_vllm.ops.page_pool import PagePacking


class LatentQueries:
    """Queries of a step, projected into the space of the cached vectors where they are read.

    Args:
        layer: vLLM's ``MLAAttention``.
        query: its queries, ``[num_tokens, num_heads, qk_head_dim]``.
    """

    def __init__(self, layer: Any, query: torch.Tensor) -> None:
        self._layer, self._query = layer, query

    def __getitem__(self, tokens: slice) -> torch.Tensor:
        """Queries of some tokens, ``[n, num_heads, kv_lora_rank + qk_rope_head_dim]``."""
        layer = self._layer
        sizes = [layer.qk_nope_head_dim, layer.qk_rope_head_dim]
        own, rotary = self._query[tokens].split(sizes, dim=-1)
        # W_UK_T: [num_heads, qk_nope_head_dim, kv_lora_rank]
        latent = torch.bmm(own.transpose(0, 1), layer.W_UK_T).transpose(0, 1)
        return torch.cat((latent, rotary), dim=-1)


class LatentLayer:
    """One layer that reads and writes the cache through its own table, and is observed.

    Args:
        layer: vLLM's ``MLAAttention``, whose methods are wrapped.

    Raises:
        ValueError: if its kernels are other ones than those of ``CPU_MLA``.
    """

    def __init__(self, layer: Any) -> None:
        if type(layer.impl) is not CPUMLAImpl:
            raise ValueError(
                f"KV compression does not support the attention backend {type(layer.impl).__name__}"
                " of multi-head latent attention: use --attention-backend CPU_MLA"
            )
        self._layer = layer
        self._forward, self._update = layer.forward_impl, layer.update_kv_cache
        self._layer.forward_impl = self.forward_impl
        self._layer.update_kv_cache = self.update_kv_cache

    def forward_impl(
        self,
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """vLLM's with the layer's own table, then the observation of the layer."""
        layer = self._layer
        step: StepObserver | None = take_step(attn_metadata)  # of a profiling run there is none
        if step is not None and step.tables is not None:
            kv_cache = whole_pool(step.pages, kv_cache)
            attn_metadata = _metadata_of(step, step.layer_index[layer.layer_name], attn_metadata)
        result = self._forward(
            q, k_c_normed, k_pe, kv_cache, attn_metadata, output=output, **kwargs
        )
        if step is not None:
            queries = cast(torch.Tensor, LatentQueries(layer, q))  # on CPUs, only slices are read
            step.layer_done(step.layer_index[layer.layer_name], queries, layer.scale, 0.0, True)
        return result

    def update_kv_cache(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor | None,
        attn_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """vLLM's, with the layer's own slots."""
        step: StepObserver | None = take_step(attn_metadata)
        if step is not None and step.tables is not None:
            kv_cache = whole_pool(step.pages, kv_cache)
            slot_mapping = step.tables.layers[step.layer_index[self._layer.layer_name]][2]
            tokens = slot_mapping.shape[0]  # padding has no slot
            kv_c_normed, k_pe = kv_c_normed[:tokens], k_pe[:tokens]
        self._update(kv_c_normed, k_pe, kv_cache, slot_mapping, attn_metadata, *args, **kwargs)


def packing(block_size: int, head_size: int) -> PagePacking:
    """Where tokens lie in a page: one after the other, and the value is a part of the key.

    Both orders are that of the whole vector, so that a copy of the keys is a copy of the values.

    Args:
        block_size: tokens of a page.
        head_size: elements of a latent vector.
    """
    vector = PagePacking.side_by_side(block_size, head_size, token_stride=head_size).key_index
    return PagePacking(vector, vector)


def _metadata_of(step: StepObserver, layer: int, metadata: Any) -> Any:
    """Attention metadata with a layer's own table; decodes come first in a batch."""
    assert step.tables is not None
    seq_lens, block_table, slot_mapping = step.tables.layers[layer]
    prefill, decode, number = metadata.prefill, metadata.decode, metadata.num_decodes
    if decode is not None:
        decode = dataclasses.replace(
            decode, seq_lens=seq_lens[:number], block_table=block_table[:number]
        )
    if prefill is not None:
        prefill = dataclasses.replace(prefill, block_table=block_table[number:])
    return dataclasses.replace(metadata, prefill=prefill, decode=decode, slot_mapping=slot_mapping)
