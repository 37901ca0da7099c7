# SPDX-License-Identifier: Apache-2.0
"""Eviction policies: token scores and layer weights as pure torch functions, one policy a file.

Packages outside this project import from here; docs/policies.md shows how to add a policy.
"""

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import EvictionPolicy, setting
from vl_cache_vllm.policy.prompt import PatchGrid, Prompt, Shard
from vl_cache_vllm.policy.registry import POLICIES

parameter = setting  # deprecated name

__all__ = ["POLICIES", "Attention", "EvictionPolicy", "PatchGrid", "Prompt", "Shard", "setting"]
