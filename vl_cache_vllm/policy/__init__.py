# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: token scores x layer budgets, pure torch, one policy a file."""

from vl_cache_vllm.policy.base import EvictionPolicy
from vl_cache_vllm.policy.random import RandomPolicy
from vl_cache_vllm.policy.vlcache import VLCachePlusPolicy, VLCachePolicy

POLICIES: dict[str, type[EvictionPolicy]] = {
    policy.name: policy for policy in (VLCachePolicy, VLCachePlusPolicy, RandomPolicy)
}

__all__ = ["POLICIES", "EvictionPolicy", "RandomPolicy", "VLCachePlusPolicy", "VLCachePolicy"]
