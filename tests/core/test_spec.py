# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec: wrapping, merging, row width, and its manager."""

import pickle
import runpy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core import spec as spec_module
from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.spec import EvictionAttentionSpec


def full_attention(**values: Any) -> FullAttentionSpec:
    return FullAttentionSpec(
        **{
            "block_size": 32,
            "num_kv_heads": 3,
            "head_size": 80,
            "dtype": torch.bfloat16,
            **values,
        }
    )


def wrapped(budget: float = 0.1, **values: Any) -> EvictionAttentionSpec:
    return EvictionAttentionSpec.wrap(full_attention(**values), KVCompressConfig(budget=budget))


def test_wrap_keeps_the_layer_format() -> None:
    plain = full_attention(max_tp_shards=3, page_size_padded=1 << 20)
    spec = EvictionAttentionSpec.wrap(plain, KVCompressConfig())
    for name in vars(plain):
        assert getattr(spec, name) == getattr(plain, name), name
    assert spec.page_size_bytes == plain.page_size_bytes
    assert spec.kv_compress == KVCompressConfig()


def test_merge_keeps_settings() -> None:
    specs = [wrapped(0.3) for _ in range(4)]
    merged = EvictionAttentionSpec.merge(specs)
    assert type(merged) is EvictionAttentionSpec
    assert merged == specs[0]
    assert merged.kv_compress == KVCompressConfig(budget=0.3)


def test_merge_of_one_layer() -> None:
    assert EvictionAttentionSpec.merge([wrapped(0.3)]) == wrapped(0.3)


def test_merge_refuses_different_settings() -> None:
    with pytest.raises(AssertionError, match="share their settings"):
        EvictionAttentionSpec.merge([wrapped(0.1), wrapped(0.2)])


def test_merge_refuses_different_formats() -> None:
    with pytest.raises(AssertionError, match="same attention spec"):
        EvictionAttentionSpec.merge([wrapped(), wrapped(head_size=64)])


def test_copies_keep_settings() -> None:
    """vLLM copies specs to other processes and to other block sizes."""
    spec = wrapped(0.3)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(pickle.loads(pickle.dumps(spec))) == hash(spec)
    assert spec.copy_with_new_block_size(64) == replace(spec, block_size=64)
    assert spec.copy_with_new_block_size(64).kv_compress == spec.kv_compress


def test_registry() -> None:
    register_all_kvcache_specs(None)  # as the engine core does
    assert KVCacheSpecRegistry.get_manager_class(wrapped()) is EvictionBlockManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(wrapped()) is FullAttentionSpec
    KVCacheSpecRegistry.check_kv_cache_spec_registry({"layer": wrapped()})
    # Grouped as full attention, so that the layers of a model make one group.
    assert wrapped().is_uniform_with_collection({"a": wrapped(), "b": wrapped()})


def test_importing_ours_leaves_vllms_own_specs_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a worker process, where nobody calls register_all_kvcache_specs beforehand."""
    monkeypatch.setattr(kv_cache_spec_registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    runpy.run_path(spec_module.__file__, run_name="imported_first")
    KVCacheSpecRegistry.check_kv_cache_spec_registry({"layer": full_attention()})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    budget=st.floats(1e-3, 1.0),
    block_size=st.sampled_from([1, 5, 16, 32]),
    max_len=st.integers(1, 4000),
    data=st.data(),
)
def test_rows_hold_every_request(
    budget: float, block_size: int, max_len: int, data: st.DataObject
) -> None:
    """[N prompt][M kept][decode], for any end of prefill and any length up to the maximum."""
    spec = wrapped(budget, block_size=block_size)
    assert spec.kv_compress is not None
    width = spec.max_num_blocks_per_req(None, max_len)  # type: ignore[arg-type]
    assert width >= -(-max_len // block_size)  # not evicted
    end_of_prefill = data.draw(st.integers(1, max_len))
    plan = plan_eviction(spec.kv_compress, block_size, end_of_prefill, vision_end=0)
    if plan.kept_blocks:
        decode_blocks = -(-(max_len - end_of_prefill) // block_size)
        assert plan.prompt_blocks + plan.kept_blocks + decode_blocks <= width


@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("budget", [0.1, 0.34, 0.5, 0.99])  # a request may bring any
def test_rows_hold_every_request_exhaustively(budget: float, block_size: int) -> None:
    spec = wrapped(budget, block_size=block_size)
    assert spec.kv_compress is not None
    for max_len in range(1, 80):
        width = spec.max_num_blocks_per_req(None, max_len)  # type: ignore[arg-type]
        longest = 0
        for prompt_tokens in range(1, max_len + 1):
            plan = plan_eviction(spec.kv_compress, block_size, prompt_tokens, vision_end=0)
            for length in range(prompt_tokens, max_len + 1):
                if plan.kept_blocks:
                    decode_blocks = -(-(length - prompt_tokens) // block_size)
                    row = plan.prompt_blocks + plan.kept_blocks + decode_blocks
                else:
                    row = -(-length // block_size)
                longest = max(longest, row)
        assert longest <= width
