# SPDX-License-Identifier: Apache-2.0
"""The KV cache spec: wrapping, merging, row width, and its manager."""

import pickle
import runpy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core import spec as spec_module
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


@pytest.mark.parametrize("max_len", [1, 32, 33, 4000])
def test_rows_are_as_wide_as_vllms(max_len: int) -> None:
    """Kept blocks are not in a request's row."""
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        )
    )
    width = wrapped().max_num_blocks_per_req(config, max_len)
    assert width == full_attention().max_num_blocks_per_req(config, max_len)
    assert width == -(-max_len // 32)
