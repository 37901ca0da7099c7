# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: token scores x layer budgets, pure torch, one policy a file."""

from vl_cache_vllm.policy.base import EvictionPolicy
from vl_cache_vllm.policy.vlcache import VLCachePolicy

POLICIES: dict[str, type[EvictionPolicy]] = {VLCachePolicy.name: VLCachePolicy}

__all__ = ["POLICIES", "EvictionPolicy", "VLCachePolicy"]
