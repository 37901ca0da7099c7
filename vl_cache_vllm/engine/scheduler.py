# SPDX-License-Identifier: Apache-2.0
"""vLLM's schedulers, with their requests shown to our block manager and prefix hits trimmed."""

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vl_cache_vllm.engine.block_manager import CompressedAttentionManager


class _EvictionMixin:
    """What eviction needs from a scheduler; admission, preemption and order stay vLLM's."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers  # type: ignore[attr-defined]
        assert isinstance(manager, CompressedAttentionManager)
        manager.bind_requests(self.requests.get)  # type: ignore[attr-defined]
        self._eviction_manager = manager

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """Trim the hit so that the observed queries are computed, not taken from the cache."""
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)  # type: ignore[misc]
        limit = self._eviction_manager.max_hit_tokens(request) if num_tokens else None
        if limit is not None and num_tokens > limit:
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, limit)  # type: ignore[attr-defined]
            num_tokens = limit
        return blocks, num_tokens, boundary, diverged


class EvictionScheduler(_EvictionMixin, Scheduler):
    """`Scheduler` with eviction."""


class AsyncEvictionScheduler(_EvictionMixin, AsyncScheduler):
    """`AsyncScheduler` with eviction."""
