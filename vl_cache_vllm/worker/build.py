# SPDX-License-Identifier: Apache-2.0
"""Builds the evictor of a worker over its allocated KV cache."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

from vl_cache_vllm.attention.per_layer import PerLayerAttentionMixin, number_type
from vl_cache_vllm.config import TraceConfig
from vl_cache_vllm.core.spec import EvictionAttentionSpec, EvictionMLASpec
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.policy import Shard
from vl_cache_vllm.worker.drafts import DraftEvictor
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.tp_group import tensor_parallel_group

NO_FULL_ATTENTION = (
    "KV compression needs a layer of full attention on every pipeline stage: use a smaller "
    "--pipeline-parallel-size"
)


@dataclass(frozen=True)
class EvictedGroup:
    """The layers that are evicted: those of full attention, which form one KV cache group."""

    index: int
    """Index of the group; vLLM keeps one block table per group."""
    layers: dict[str, int]
    """Index in the page pool by vLLM's layer name; also of layers that read another's cache."""


# Kinds of states that are tested beside full attention.
STATES = frozenset(
    {
        MambaAttentionBackendEnum.GDN_ATTN,
        MambaAttentionBackendEnum.MAMBA2,
        MambaAttentionBackendEnum.SHORT_CONV,
    }
)


def _evicted_group(groups: Sequence[KVCacheGroupSpec], device_type: str) -> int:
    ours = [i for i, g in enumerate(groups) if isinstance(g.kv_cache_spec, EvictionAttentionSpec)]
    kinds = ", ".join(type(g.kv_cache_spec).__name__ for g in groups)
    if len(ours) != 1:
        raise ValueError(
            "KV compression needs the layers of full attention, those of a draft model included, "
            f"all of one shape, in one KV cache group; this model's groups are: {kinds}"
        )
    others = [g.kv_cache_spec for i, g in enumerate(groups) if i not in ours]
    states = [spec for spec in others if isinstance(spec, MambaSpec)]
    if not all(type(spec) is SlidingWindowSpec or isinstance(spec, MambaSpec) for spec in others):
        raise ValueError(
            "KV compression supports no other layers beside those of full attention than ones "
            "with a sliding window, a gated delta net, Mamba-2 or short convolutions; this model's "
            f"KV cache groups are: {kinds}"
        )
    untested = {spec.mamba_type for spec in states} - STATES
    if untested:
        raise ValueError(
            "KV compression is not tested beside layers with states of the kind "
            + ", ".join(sorted(kind.name for kind in untested))
        )
    if states and device_type != "cpu":
        raise ValueError("KV compression beside layers with states is not tested on GPUs")
    if not groups[ours[0]].layer_names:
        raise ValueError(NO_FULL_ATTENTION)
    return ours[0]


def _owner(layer: Any) -> str | None:
    """The name of the layer whose cache a layer reads; None: its own."""
    return getattr(layer, "kv_sharing_target_layer_name", None)


def build_evictors(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    draft_layers: Collection[str] = (),
) -> tuple[Evictor, EvictedGroup, DraftEvictor | None]:
    """Build the evictors of a worker, and find the layers that they evict.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: the allocated cache.
        draft_layers: names of the attention layers of a draft model.

    Returns:
        The evictor of the model's layers, these layers, and the evictor of the draft's layers.

    Raises:
        ValueError: if the cache has no single group of full attention with interchangeable pages.
            Only the allocated cache shows that for certain.
    """
    groups = kv_cache_config.kv_cache_groups
    index = _evicted_group(groups, vllm_config.device_config.device_type)
    context = vllm_config.compilation_config.static_forward_context
    spec = groups[index].kv_cache_spec
    # The runners add layers that read another one's cache to its group, in copies of their own.
    layer_names = {name for name in groups[index].layer_names if _owner(context[name]) is None}
    assert isinstance(spec, EvictionAttentionSpec)
    is_latent = isinstance(spec, EvictionMLASpec)
    if spec.head_size_v != spec.head_size and not is_latent:
        raise ValueError(
            "KV compression needs K and V of one head size, not "
            f"{spec.head_size} and {spec.head_size_v}"
        )
    tensors = [t for t in kv_cache_config.kv_cache_tensors if layer_names.intersection(t.layers)]
    if len(tensors) != 1 or set(tensors[0].layers) != layer_names:
        raise ValueError("KV compression needs the pages of all layers in one allocation")
    (placement,) = tensors
    page_bytes = spec.unpadded_page_size_bytes
    strides = placement.layer_stride, placement.block_stride
    if spec.page_size_bytes != page_bytes or any(stride % page_bytes for stride in strides):
        raise ValueError(
            f"KV compression needs contiguous pages; layout {kv_cache_config.kv_cache_layout} "
            f"places pages of {page_bytes} bytes at strides {strides}"
        )
    layers = [context[name] for name in placement.layers]
    if is_latent:
        from vl_cache_vllm.attention import latent  # imports what only vLLM's CPU build needs
    first = layers[0]
    index_of = {name: i for i, name in enumerate(placement.layers) if name not in draft_layers}
    for name, layer in context.items():
        target = _owner(layer)
        if target in layer_names:
            index_of[name] = index_of[target]
            layers.append(layer)
    others = {
        type(layer.impl).__name__
        for layer in layers
        if not is_latent and not isinstance(layer.impl, PerLayerAttentionMixin)
    }
    if others:
        raise ValueError(
            f"KV compression does not support the attention backend {', '.join(sorted(others))}: "
            "use --attention-backend FLASH_ATTN or TRITON_ATTN"
        )
    if len({layer.num_heads for layer in layers}) > 1:
        raise ValueError(
            "KV compression needs the same number of query heads in all layers of full attention, "
            f"not {', '.join(str(layer.num_heads) for layer in layers)}"
        )
    cache = first.kv_cache.unsqueeze(1) if is_latent else first.kv_cache  # [num_blocks, K, N, C]
    heads, tokens, content = cache.shape[1:]
    head_stride, token_stride = cache.stride()[1:3]
    head_major, token_major = (tokens * content, content), (content, heads * content)
    if tokens != spec.block_size or (head_stride, token_stride) not in (head_major, token_major):
        raise ValueError(
            f"KV compression cannot read pages of {tokens} tokens with strides "
            f"{cache.stride()[1:]}, layout {kv_cache_config.kv_cache_layout}"
        )
    layer_stride, block_stride = (stride // page_bytes for stride in strides)
    cache_dtype, dtype = vllm_config.cache_config.cache_dtype, vllm_config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    names = [name for name in placement.layers if name not in draft_layers]
    draft_names = placement.layers[len(names) :]
    if names != [*placement.layers[: len(names)]] or len(draft_names) != len(draft_layers):
        raise ValueError(
            "KV compression needs a draft model whose layers have the shape of the model's and "
            f"follow them in the KV cache, not {', '.join(draft_layers)}"
        )
    speculative = vllm_config.speculative_config if len(draft_names) > 1 else None
    if speculative is not None and speculative.method == "mtp":
        raise ValueError(
            "KV compression supports a draft model with one MTP module, not "
            f"{len(draft_names)}, of which vLLM runs one in each pass: remove --speculative-config"
        )
    last_page = (len(layer_names) - 1) * layer_stride + (
        kv_cache_config.num_blocks - 1
    ) * block_stride
    pool = PagePool(
        pages=cache.as_strided(
            (last_page + 1, heads, (tokens - 1) * token_stride + content),
            (heads * tokens * content, head_stride, 1),
        ),
        packing=latent.packing(tokens, content)
        if is_latent
        else first.impl.page_packing(first, dtype),
        num_layers=len(names),
        layer_stride=layer_stride,
        block_stride=block_stride,
        number_type=number_type(cache_dtype),
    )
    if is_latent:
        for layer in layers:
            latent.LatentLayer(layer)
    readers = Counter(index_of.values())
    evictor = evictor_over(
        pool,
        spec,
        vllm_config,
        names,
        first.num_heads,
        [readers[layer] for layer in range(pool.num_layers)],
    )
    drafts = None
    if draft_names:
        drafts = _draft_evictor(pool, spec, vllm_config, draft_names, first.num_heads)
    return evictor, EvictedGroup(index, index_of), drafts


def _draft_evictor(
    pool: PagePool,
    spec: EvictionAttentionSpec,
    vllm_config: VllmConfig,
    names: Sequence[str],
    num_heads: int,
) -> DraftEvictor:
    """The evictor of a draft's layers, whose pages follow ``pool``, those of the model's layers."""
    own = replace(
        pool, pages=pool.pages[pool.num_layers * pool.layer_stride :], num_layers=len(names)
    )
    assert spec.kv_compress is not None and vllm_config.speculative_config is not None
    untraced = replace(spec, kv_compress=replace(spec.kv_compress, trace=TraceConfig()))
    return DraftEvictor(
        evictor_over(own, untraced, vllm_config, None, num_heads),
        {name: layer for layer, name in enumerate(names)},
        vllm_config.speculative_config.num_speculative_tokens or 0,
    )


def evictor_over(
    pool: PagePool,
    spec: EvictionAttentionSpec,
    vllm_config: VllmConfig,
    layer_names: Sequence[str] | None,
    num_heads: int,
    readers: Sequence[int] = (),
) -> Evictor:
    """Build the evictor of a page pool.

    Args:
        pool: pages of the layers, in order.
        spec: the KV cache spec that all layers share.
        vllm_config: the engine's configuration.
        layer_names: vLLM's names of the layers, in the order of the pool; None: they are all
            layers of a draft model.
        num_heads: query heads of a layer on this worker.
        readers: as for `Evictor`.
    """
    assert spec.kv_compress is not None
    scheduler = vllm_config.scheduler_config
    model_config = vllm_config.model_config
    # A graph has as many tokens as requests, or more; without graphs the number is 0.
    graph_tokens = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    tp_group = tensor_parallel_group(vllm_config.parallel_config.tensor_parallel_size)
    return Evictor(
        spec.kv_compress,
        pool,
        num_heads=num_heads,
        max_num_reqs=scheduler.max_num_seqs,
        max_num_tokens=scheduler.max_num_batched_tokens,
        max_table_width=cdiv(model_config.max_model_len, spec.block_size) + 1,
        max_graph_reqs=min(scheduler.max_num_seqs, graph_tokens),
        tp_group=tp_group,
        shard=Shard(
            layers=tuple(map(extract_layer_index, layer_names)) if layer_names else None,
            first_kv_head=tp_group.rank * model_config.get_total_num_kv_heads() // tp_group.size,
            num_layers=model_config.get_total_num_hidden_layers() if layer_names else None,
        ),
        readers=readers,
    )
