# SPDX-License-Identifier: Apache-2.0
"""Whether blocks are scarce enough to evict: ``--kv-compress-when pressure``.

Load is the number of blocks that running requests hold plus the number that waiting requests will
ask for, as a ratio of the block pool.
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.single_type_kv_cache_manager import MambaManager, SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request


class PressureGauge:
    """A switch with hysteresis: on from ``high`` upwards, off again only at ``low`` or below."""

    def __init__(self, high: float, low: float) -> None:
        self._high, self._low = high, low
        self.is_on = False

    def update(self, used: int, demands: Iterable[int], total: int) -> None:
        """Read the load once per step, before anything is decided in it.

        Args:
            used: blocks that requests hold.
            demands: blocks that each unfinished prefill still asks for; read only as far as the
                result depends on them.
            total: blocks of the pool.
        """
        high, low = self._high * total, self._low * total
        load = used
        for demand in demands:
            if (load > low) if self.is_on else (load >= high):
                break
            load += demand
        self.is_on = load > low if self.is_on else load >= high


class PrefillDemand:
    """Blocks that unfinished prefills still take from the pool.

    Args:
        manager: of the evicted KV cache group.
        others: managers of the cache's other groups.
    """

    def __init__(
        self, manager: SingleTypeKVCacheManager, others: Sequence[SingleTypeKVCacheManager]
    ) -> None:
        self._manager, self._others = manager, others

    def blocks(self, request: Request) -> int:
        """Blocks that a prefill still needs in all groups, without the kept blocks.

        Blocks of its prefix that other requests hold need not be taken.
        """
        missing = self.blocks_of_evicted_group(request)
        return missing + sum(self._missing(other, request) for other in self._others)

    def blocks_of_evicted_group(self, request: Request) -> int:
        """The same for the evicted group alone."""
        held = len(self._manager.req_to_blocks.get(request.request_id, ()))
        if not held:
            held = sum(1 for _ in takewhile(self._is_held, request.block_hashes))
        return max(0, cdiv(request.num_tokens, self._manager.block_size) - held)

    def uncounted(
        self, request: Request, num_tokens: int, computed_tokens: int, is_capped: bool
    ) -> int:
        """Blocks of windows that a prefill still needs behind a hit, and vLLM does not count.

        vLLM takes the blocks before a window, which a hit leaves out, for blocks of the request.

        Args:
            request: whose blocks vLLM counts.
            num_tokens: up to where it counts them.
            computed_tokens: up to where the request has been computed or will be loaded.
            is_capped: whether vLLM counts no more than a request holds at once.
        """
        missing = 0
        for other in self._others:
            if other.max_admission_blocks_per_request is not None:
                counted = other.get_num_blocks_to_allocate(
                    request.request_id,
                    num_tokens,
                    (),
                    computed_tokens,
                    computed_tokens,
                    num_tokens,
                    apply_admission_cap=is_capped,
                )
                missing += max(0, self._missing(other, request) - counted)
        return missing

    def _missing(self, other: SingleTypeKVCacheManager, request: Request) -> int:
        """Blocks of another group."""
        blocks = other.req_to_blocks.get(request.request_id, ())
        held = sum(1 for block in blocks if not block.is_null)
        return max(0, max_blocks(other, request.num_tokens, for_a_moment=False) - held)

    def _is_held(self, block_hash: BlockHash) -> bool:
        pool = self._manager.block_pool
        cached = pool.get_cached_block(block_hash, [self._manager.kv_cache_group_id])
        return cached is not None and cached[0].ref_cnt > 0


def max_blocks(
    manager: SingleTypeKVCacheManager, num_tokens: int, for_a_moment: bool = True
) -> int:
    """The most blocks that another group's manager holds for one request.

    Args:
        manager: of the group.
        num_tokens: of the request.
        for_a_moment: count what is held only until a step has been processed.
    """
    blocks = cdiv(num_tokens, manager.block_size)
    limit = manager.max_admission_blocks_per_request
    if isinstance(manager, MambaManager):  # a block holds the state after some token
        spec = manager.kv_cache_spec
        assert isinstance(spec, MambaSpec)
        blocks += spec.num_speculative_blocks
        if manager.mamba_cache_mode == "align":
            # The last state, the one before it, and for a moment one that the step is leaving.
            limit = 2 + for_a_moment + spec.num_speculative_blocks
            limit += spec.num_prefill_checkpoint_blocks
    return blocks if limit is None else min(blocks, limit)
