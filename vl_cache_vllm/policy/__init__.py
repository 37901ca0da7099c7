# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: token scores x layer budgets, pure torch, one policy a file."""

from vl_cache_vllm.policy.base import EvictionPolicy
from vl_cache_vllm.policy.h2o import H2OPolicy
from vl_cache_vllm.policy.pyramidkv import PyramidKVPolicy
from vl_cache_vllm.policy.random import RandomPolicy
from vl_cache_vllm.policy.snapkv import SnapKVPolicy
from vl_cache_vllm.policy.streamingllm import StreamingLLMPolicy
from vl_cache_vllm.policy.vlcache import VLCachePlusPolicy, VLCachePolicy

POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy
    for policy in (
        VLCachePolicy,
        VLCachePlusPolicy,
        SnapKVPolicy,
        PyramidKVPolicy,
        H2OPolicy,
        StreamingLLMPolicy,
        RandomPolicy,
    )
}

__all__ = [
    "POLICIES",
    "EvictionPolicy",
    "H2OPolicy",
    "PyramidKVPolicy",
    "RandomPolicy",
    "SnapKVPolicy",
    "StreamingLLMPolicy",
    "VLCachePlusPolicy",
    "VLCachePolicy",
]
