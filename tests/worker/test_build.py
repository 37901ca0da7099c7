# SPDX-License-Identifier: Apache-2.0
"""What only the allocated cache can show is refused when the worker is built."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)

from vl_cache_vllm.attention.cpu import EvictionCPUAttentionImpl
from vl_cache_vllm.attention.per_layer import PerLayerAttentionMixin
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.spec import EvictionAttentionSpec
from vl_cache_vllm.policy import Shard
from vl_cache_vllm.worker.build import EvictedGroup, build_evictors

NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE = 5, 32, 2, 32
LAYERS = ["layers.0", "layers.1", "layers.2"]
MAX_NUM_SEQS = 3
PAGE_BYTES = NUM_HEADS * BLOCK_SIZE * 2 * HEAD_SIZE * 4


def spec(**fields: Any) -> EvictionAttentionSpec:
    plain = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE, dtype=torch.float32
    )
    return replace(EvictionAttentionSpec.wrap(plain, KVCompressConfig()), **fields)


def window_spec() -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        sliding_window=64,
    )


def cache_config(*groups: KVCacheGroupSpec, **placement: Any) -> KVCacheConfig:
    """One allocation in layer-outermost order, unless told otherwise."""
    values = {
        "size": len(LAYERS) * NUM_BLOCKS * PAGE_BYTES,
        "layers": LAYERS,
        "layer_stride": NUM_BLOCKS * PAGE_BYTES,
        "block_stride": PAGE_BYTES,
    }
    tensor = KVCacheTensor(**{**values, **placement})
    return KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=list(groups) or [KVCacheGroupSpec(LAYERS, spec())],
        kv_cache_layout="LBHNC",
    )


def vllm_config(
    cache: KVCacheConfig,
    impl: type = EvictionCPUAttentionImpl,
    token_major: bool = False,
    graph_tokens: int | None = None,
) -> Any:
    """As much of a config as is read, with layers bound to views of one buffer."""
    placement = cache.kv_cache_tensors[0]
    buffer = torch.zeros(placement.size // 4)
    content = 2 * HEAD_SIZE
    head_stride, token_stride = BLOCK_SIZE * content, content
    if token_major:
        head_stride, token_stride = content, NUM_HEADS * content
    strides = (placement.layer_stride // 4, placement.block_stride // 4)
    views = buffer.as_strided(
        (len(LAYERS), NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, content),
        (*strides, head_stride, token_stride, 1),
    )
    layers = {
        name: SimpleNamespace(
            kv_cache=views[i],
            isa="vec",
            num_heads=4,
            head_size=HEAD_SIZE,
            kv_cache_dtype="auto",
            impl=object.__new__(impl),
        )
        for i, name in enumerate(LAYERS)
    }
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            static_forward_context=layers, max_cudagraph_capture_size=graph_tokens
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=64),
        model_config=SimpleNamespace(
            max_model_len=256,
            dtype=torch.float32,
            get_total_num_kv_heads=lambda: 2,
            get_total_num_hidden_layers=lambda: len(LAYERS),
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
    )


@pytest.mark.parametrize("order", ["layer-outermost", "block-outermost"])
def test_a_drafts_layers_have_a_pool_of_their_own(order: str) -> None:
    cache = cache_config(**page_strides(order))
    config = vllm_config(cache)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=2, method="mtp")
    worker, group, drafts = build_evictors(config, cache, {LAYERS[2]})
    assert group.layers == {LAYERS[0]: 0, LAYERS[1]: 1}
    assert worker.pool.num_layers == 2 and drafts is not None
    pool = drafts.evictor.pool
    assert drafts.layers == {LAYERS[2]: 0} and pool.num_layers == 1
    layer = config.compilation_config.static_forward_context[LAYERS[2]]
    for block in range(NUM_BLOCKS):
        layer.kv_cache[block] = block + 1
        page = pool.pages[int(pool.page_ids(0, torch.tensor(block)))]
        assert (page == block + 1).all()


def test_several_mtp_modules_are_refused() -> None:
    cache = cache_config()
    config = vllm_config(cache)
    config.speculative_config = SimpleNamespace(num_speculative_tokens=1, method="mtp")
    with pytest.raises(ValueError, match="one MTP module, not 2"):
        build_evictors(config, cache, set(LAYERS[1:]))
    config.speculative_config.method = "eagle3"
    drafts = build_evictors(config, cache, set(LAYERS[1:]))[2]
    assert drafts is not None and drafts.evictor.pool.num_layers == 2
    # They are a model of their own for policies that give layers shares by their depth.
    assert drafts.evictor.shard == Shard()


@pytest.mark.parametrize("draft", [LAYERS[:1], ["elsewhere"]])
def test_a_draft_that_does_not_follow_the_model_is_refused(draft: list[str]) -> None:
    cache = cache_config()
    config = vllm_config(cache)
    with pytest.raises(ValueError, match="needs a draft model whose layers have the shape"):
        build_evictors(config, cache, draft)


def page_strides(order: str) -> dict[str, int]:
    if order == "layer-outermost":
        return {}
    return {"layer_stride": PAGE_BYTES, "block_stride": len(LAYERS) * PAGE_BYTES}


@pytest.mark.parametrize("order", ["layer-outermost", "block-outermost"])
def test_pages_are_the_layers_own_memory(order: str) -> None:
    cache = cache_config(**page_strides(order))
    config = vllm_config(cache)
    worker, group, _ = build_evictors(config, cache)
    assert group == EvictedGroup(0, {name: i for i, name in enumerate(LAYERS)})
    for name, layer in config.compilation_config.static_forward_context.items():
        for block in range(NUM_BLOCKS):
            layer.kv_cache[block] = 1.0
            page = worker.pool.page_ids(group.layers[name], torch.tensor(block))
            assert worker.pool.pages[page].eq(1.0).all()
            assert worker.pool.pages.sum() == PAGE_BYTES // 4
            layer.kv_cache[block] = 0.0


@pytest.mark.parametrize(
    ("graph_tokens", "expected"),
    [
        pytest.param(None, 0, id="no-graphs"),
        pytest.param(0, 0, id="graphs-are-off"),
        pytest.param(2, 2, id="small-graphs"),
        pytest.param(512, MAX_NUM_SEQS, id="graphs-for-all-requests"),
    ],
)
def test_tables_are_as_large_as_graphs(graph_tokens: int | None, expected: int) -> None:
    cache = cache_config()
    worker, _, _ = build_evictors(vllm_config(cache, graph_tokens=graph_tokens), cache)
    tables = worker.tables
    assert tables._block_table.numel() == len(LAYERS) * expected * tables.sizes.width


def test_of_a_hybrid_model_the_group_of_full_attention() -> None:
    """Its blocks are as large as the other group's, whose layers are more: every third page."""
    cache = cache_config(
        KVCacheGroupSpec(["window.0", "window.1", "window.2"], window_spec()),
        KVCacheGroupSpec(LAYERS[1:2], spec()),
        layers=LAYERS[1:2],
        layer_stride=PAGE_BYTES,
        block_stride=3 * PAGE_BYTES,
    )
    cache.kv_cache_tensors.append(
        KVCacheTensor(
            size=3 * NUM_BLOCKS * PAGE_BYTES,
            layers=["window.0", "window.1", "window.2"],
            layer_stride=PAGE_BYTES,
            block_stride=3 * PAGE_BYTES,
        )
    )
    config = vllm_config(cache)
    layers = config.compilation_config.static_forward_context
    layers[LAYERS[1]].kv_cache = layers[LAYERS[0]].kv_cache
    worker, group, _ = build_evictors(config, cache)
    assert group == EvictedGroup(1, {LAYERS[1]: 0})
    assert worker.shard.layers == (1,)
    assert worker.pool.num_layers == 1
    for block in range(NUM_BLOCKS):
        layers[LAYERS[1]].kv_cache[block] = 1.0
        page = worker.pool.page_ids(0, torch.tensor(block))
        assert worker.pool.pages[page].eq(1.0).all()
        layers[LAYERS[1]].kv_cache[block] = 0.0


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        pytest.param(
            cache_config(
                KVCacheGroupSpec(LAYERS[:1], spec()), KVCacheGroupSpec(LAYERS[1:], spec())
            ),
            "in one KV cache group",
            id="two groups",
        ),
        pytest.param(
            cache_config(KVCacheGroupSpec([], spec()), KVCacheGroupSpec(LAYERS, window_spec())),
            "smaller --pipeline-parallel-size",
            id="a stage without full attention",
        ),
        pytest.param(
            cache_config(
                KVCacheGroupSpec(LAYERS[:1], spec()),
                KVCacheGroupSpec(
                    LAYERS[1:],
                    ChunkedLocalAttentionSpec(
                        block_size=BLOCK_SIZE,
                        num_kv_heads=NUM_HEADS,
                        head_size=HEAD_SIZE,
                        dtype=torch.float32,
                        attention_chunk_size=64,
                    ),
                ),
            ),
            "ones with a sliding window",
            id="chunked attention",
        ),
        pytest.param(
            cache_config(
                KVCacheGroupSpec(
                    LAYERS,
                    FullAttentionSpec(
                        block_size=BLOCK_SIZE,
                        num_kv_heads=NUM_HEADS,
                        head_size=HEAD_SIZE,
                        dtype=torch.float32,
                    ),
                )
            ),
            "in one KV cache group",
            id="a spec that is not ours",
        ),
        pytest.param(cache_config(layers=LAYERS[:2]), "one allocation", id="layers elsewhere"),
        pytest.param(
            cache_config(block_stride=PAGE_BYTES + 64, size=8 * len(LAYERS) * PAGE_BYTES),
            "contiguous pages",
            id="pages not contiguous",
        ),
        pytest.param(
            cache_config(KVCacheGroupSpec(LAYERS, spec(page_size_padded=2 * PAGE_BYTES))),
            "contiguous pages",
            id="padded pages",
        ),
        pytest.param(
            cache_config(KVCacheGroupSpec(LAYERS, spec(head_size_v=64))),
            "one head size",
            id="another head size of V",
        ),
    ],
)
def test_refused(cache: KVCacheConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_evictors(vllm_config(cache), cache)


def test_token_major_pages_of_a_cpu_are_refused() -> None:
    cache = cache_config()
    with pytest.raises(ValueError, match="head-major"):
        build_evictors(vllm_config(cache, token_major=True), cache)


def sharer(config: Any, target: str, num_heads: int = 4) -> None:
    """Add a layer that reads another one's cache."""
    layers = config.compilation_config.static_forward_context
    fields = vars(layers[target]) | {"kv_sharing_target_layer_name": target, "num_heads": num_heads}
    layers[f"layers.{len(layers)}"] = SimpleNamespace(**fields)


def test_layers_that_read_anothers_cache() -> None:
    cache = cache_config()
    config = vllm_config(cache)
    for target in (LAYERS[2], "other", LAYERS[0], LAYERS[2]):
        if target == "other":  # in a group with a sliding window
            layers = config.compilation_config.static_forward_context
            layers["window.0"] = SimpleNamespace(kv_sharing_target_layer_name=target)
        else:
            sharer(config, target)
    worker, group, _ = build_evictors(config, cache)
    shared = {"layers.3": 2, "layers.5": 0, "layers.6": 2}
    assert group == EvictedGroup(0, {name: i for i, name in enumerate(LAYERS)} | shared)
    assert worker.pool.num_layers == len(LAYERS)
    assert worker._readers is not None
    assert worker._readers.tolist() == [2, 1, 3]


def test_readers_with_other_heads_are_refused() -> None:
    cache = cache_config()
    config = vllm_config(cache)
    sharer(config, LAYERS[1], num_heads=8)
    with pytest.raises(ValueError, match="same number of query heads in all layers"):
        build_evictors(config, cache)


def with_states(kind: MambaAttentionBackendEnum) -> KVCacheConfig:
    """A group of full attention beside one whose layers keep a state."""
    states = MambaSpec(
        block_size=256,
        shapes=((PAGE_BYTES // 4,),),
        dtypes=(torch.float32,),
        mamba_type=kind,
    )
    return cache_config(
        KVCacheGroupSpec(["state.0"], states), KVCacheGroupSpec(LAYERS, spec()), layers=LAYERS
    )


@pytest.mark.parametrize("name", ["GDN_ATTN", "MAMBA2", "SHORT_CONV"])
def test_states_that_are_tested(name: str) -> None:
    cache = with_states(MambaAttentionBackendEnum[name])
    _, group, _ = build_evictors(vllm_config(cache), cache)
    assert group == EvictedGroup(1, {name: i for i, name in enumerate(LAYERS)})


def test_states_that_are_not_tested_are_refused() -> None:
    cache = with_states(MambaAttentionBackendEnum.MAMBA1)
    with pytest.raises(ValueError, match="not tested beside layers with states of the kind MAMBA1"):
        build_evictors(vllm_config(cache), cache)


def test_states_on_a_gpu_are_refused() -> None:
    cache = with_states(MambaAttentionBackendEnum.GDN_ATTN)
    config = vllm_config(cache)
    config.device_config.device_type = "cuda"
    with pytest.raises(ValueError, match="states is not tested on GPUs"):
        build_evictors(config, cache)


def test_attention_of_somebody_else_is_refused() -> None:
    cache = cache_config()
    with pytest.raises(ValueError, match="attention backend object: use --attention-backend"):
        build_evictors(vllm_config(cache, impl=object), cache)


def test_layers_with_different_query_heads_are_refused() -> None:
    """vLLM would build their metadata apart, and all layers read that of the first."""
    cache = cache_config()
    config = vllm_config(cache)
    config.compilation_config.static_forward_context[LAYERS[1]].num_heads = 8
    with pytest.raises(
        ValueError, match=r"query heads in all layers of full attention, not 4, 8, 4"
    ):
        build_evictors(config, cache)


def test_pages_in_an_order_of_their_own_are_refused() -> None:
    cache = cache_config()
    config = vllm_config(cache, impl=PerLayerAttentionMixin)
    for layer in config.compilation_config.static_forward_context.values():
        layer.kv_cache = layer.kv_cache[:, :, :16]
    with pytest.raises(ValueError, match="cannot read pages of 16 tokens"):
        build_evictors(config, cache)


@pytest.mark.parametrize("token_major", [False, True])
def test_tokens_of_a_gpu_cache(token_major: bool) -> None:
    cache = cache_config()
    config = vllm_config(cache, PerLayerAttentionMixin, token_major)
    worker, group, _ = build_evictors(config, cache)
    assert worker.pool.block_size == BLOCK_SIZE
    layers = config.compilation_config.static_forward_context
    for layer in layers.values():
        layer.kv_cache.copy_(torch.randn(layer.kv_cache.shape))
    row = torch.tensor([3, 1])
    for name, index in group.layers.items():
        page_ids = worker.pool.block_pages(row)[index]
        tokens = layers[name].kv_cache[row].transpose(0, 1).flatten(1, 2)
        assert torch.equal(worker.pool.read_keys(page_ids), tokens[..., :HEAD_SIZE])
        assert torch.equal(worker.pool.read_values(page_ids), tokens[..., HEAD_SIZE:])
