# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: token scores x layer budgets, pure torch, one policy a file."""

from vl_cache_vllm.policy.base import EvictionPolicy, setting
from vl_cache_vllm.policy.prompt import PatchGrid, Prompt, Shard
from vl_cache_vllm.policy.registry import POLICIES

__all__ = ["POLICIES", "EvictionPolicy", "PatchGrid", "Prompt", "Shard", "setting"]
