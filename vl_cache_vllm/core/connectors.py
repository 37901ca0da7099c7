# SPDX-License-Identifier: Apache-2.0
"""KV connectors beside eviction: what they load, what they store, and when blocks may be freed.

A prompt's blocks are ordinary blocks until an eviction replaces them, so connectors store and load
them as always. Four things differ:

- The observed queries must be computed here. A hit that is loaded within a step is shortened like
  a local one. One that is loaded between steps is loaded whole, because connectors place its
  blocks by their number, and its end is computed again. Sliding windows and states do not allow
  that; `OffloadingConnector` then looks for no longer hits.
- Nothing behind the prompt is stored: after an eviction, keys and values depend on it.
- Replaced blocks stay until the connector has read them, and are not offered to it again.
- Kept blocks are in no request's row, so the connector is told when they are taken: a copy of their
  last owner's contents may still be due.

`SUPPORTED` names the connectors that this was written for and tested with. All others are refused.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vl_cache_vllm.core.admission import whole_blocks


class Reader:
    """What the scheduler must know of how a connector reads blocks.

    This class suits a connector that has read a step's blocks when the step ends, or never reads
    evicted ones.
    """

    def __init__(self, connector: Any) -> None:
        pass

    def on_new_request(self, request: Request, storable_tokens: int) -> None:
        """Let the connector store only the first tokens of a request."""

    def bound_hit(self, request_id: str, num_tokens: int) -> AbstractContextManager[None]:
        """Within it, the connector finds hits of no more than so many tokens, if it can."""
        return nullcontext()

    def on_start(self, request_id: str, num_tokens: int) -> None:
        """A request is computed from here on, whatever hit the connector found or loaded."""

    def on_hit_ignored(self, request_id: str) -> None:
        """A hit that the connector found will not be loaded."""

    def is_reading(self, request_id: str) -> bool:
        """Whether reads of the request's blocks have been scheduled and are not done."""
        return False

    def forget_blocks(self, request_id: str) -> None:
        """Make sure that the connector does not read the request's present blocks any more."""

    def on_blocks_taken(self, block_ids: Iterable[int]) -> None:
        """Let the connector copy these blocks before the step that overwrites them."""


def _lowered(own: int | None, bound: int) -> int:
    """The bound, or a lower one that the request's ``kv_transfer_params`` have set."""
    return bound if own is None else min(own, bound)


class _Offloading(Reader):
    """`OffloadingConnector`, which copies blocks while later steps run.

    vLLM lets it assume that the blocks of full attention stay until their request ends. Its
    scheduler's state is read here, because its interface does not say when a copy is done.
    """

    def __init__(self, connector: Any) -> None:
        self._scheduler: Any = connector.connector_scheduler
        self._states: Mapping[str, Any] = self._scheduler._req_status

    def on_new_request(self, request: Request, storable_tokens: int) -> None:
        state = self._states.get(request.request_id)
        if state is not None:
            state.max_offload_tokens = _lowered(state.max_offload_tokens, storable_tokens)

    @contextmanager
    def bound_hit(self, request_id: str, num_tokens: int) -> Iterator[None]:
        state = self._states[request_id]
        own = state.max_load_tokens
        # One more than whole blocks: beside other layers it looks for hits that leave a token out.
        state.max_load_tokens = _lowered(own, num_tokens + 1)
        try:
            yield
        finally:
            state.max_load_tokens = own

    def is_reading(self, request_id: str) -> bool:
        state = self._states.get(request_id)
        return state is not None and bool(state.transfer_jobs)

    def forget_blocks(self, request_id: str) -> None:
        # A copy for which there was no room is tried again, with the ids of blocks that now belong
        # to others.
        state = self._states.get(request_id)
        if state is not None:
            state.max_offload_tokens = 0

    def on_blocks_taken(self, block_ids: Iterable[int]) -> None:
        # It waits for copies from the blocks that it finds here when a step has been scheduled.
        self._scheduler._current_batch_allocated_block_ids.update(block_ids)


class _SimpleOffloading(Reader):
    """`SimpleCPUOffloadConnector`, which holds references to the blocks that it copies.

    It stores a block by the block's own hash, whoever owns it, and blocks without a hash never.
    """

    def __init__(self, connector: Any) -> None:
        self._scheduler: Any = connector.scheduler_manager  # None without a prefix cache

    def on_hit_ignored(self, request_id: str) -> None:
        # It holds the host blocks of a hit until it is loaded, and would warn of one that is not.
        if self._scheduler and (hit := self._scheduler._pending_cpu_hits.pop(request_id, None)):
            self._scheduler._free_pending_cpu_hit(hit)

    def is_reading(self, request_id: str) -> bool:
        # It takes the blocks of a step when the next one has been scheduled. Until then they stay,
        # if there is room for them.
        state = self._scheduler and self._scheduler._reqs_to_store.get(request_id)
        if not state or not self._scheduler.cpu_block_pool.get_num_free_blocks():
            return False
        return bool(
            state.num_stored_blocks[0]
            < state.request.num_prompt_tokens // self._scheduler.fa_block_size
        )


class _LMCache(Reader):
    """`LMCacheMPConnector`, which stores the chunks of a prompt in the steps that compute them.

    Its server copies them while later steps run, and the scheduler's side is not told when it is
    done. For preempted requests, LMCache lets its workers wait before the step that may overwrite
    blocks. This makes them wait after evictions, too.
    """

    def __init__(self, connector: Any) -> None:
        self._trackers: Mapping[str, Any] = connector.request_trackers
        self._freed = False
        self._build_metadata = connector.build_connector_meta
        connector.build_connector_meta = self._metadata

    def on_start(self, request_id: str, num_tokens: int) -> None:
        # It takes the hit and the tokens of all steps since for what has been computed. Tokens of a
        # hit that are computed nevertheless would be in both, and chunks be stored too early.
        if tracker := self._trackers.get(request_id):
            hit = max(tracker.num_vllm_hit_tokens, tracker.num_lmcache_hit_tokens)
            tracker.num_scheduled_tokens = num_tokens - hit

    def forget_blocks(self, request_id: str) -> None:
        self._freed = True
        if tracker := self._trackers.get(request_id):
            tracker.max_offload_tokens = 0

    def _metadata(self, output: SchedulerOutput) -> Any:
        """The connector's `build_connector_meta`."""
        metadata = self._build_metadata(output)
        metadata.need_flush_before_forward |= self._freed
        if output.total_num_scheduled_tokens:  # a step that overwrites nothing does not wait
            self._freed = False
        return metadata


SUPPORTED: dict[str, Callable[[Any], Reader]] = {
    "ExampleConnector": Reader,
    "LMCacheMPConnector": _LMCache,
    "NixlConnector": Reader,  # what it sends is not evicted
    "NixlPullConnector": Reader,
    "OffloadingConnector": _Offloading,
    "SimpleCPUOffloadConnector": _SimpleOffloading,
}
"""Connectors by vLLM's name, and how they read blocks; `MultiConnector` may combine them."""

LMCACHE = "0.5.6"
"""The release of LMCache whose fields `_LMCache` uses. Earlier ones store generated tokens."""

BOUNDS_HITS = "OffloadingConnector"
"""The only one with models whose layers do not all have full attention."""

RAN_WITH_MLA = frozenset({"LMCacheMPConnector", "OffloadingConnector"})
"""Connectors that were run with multi-head latent attention."""

_HANDS_OVER = {"NixlConnector", "NixlPullConnector"}


def _parts(connector: KVConnectorBase_V1 | None) -> list[Any]:
    """The connectors that a `MultiConnector` combines, or the connector itself."""
    return [] if connector is None else getattr(connector, "_connectors", [connector])


def bounds_hits(connector: KVConnectorBase_V1 | None) -> bool:
    """Whether no hit of the connector ends behind where a request must be computed."""
    return connector is None or type(connector).__name__ == BOUNDS_HITS


def lmcache_version() -> str | None:
    """The installed release of LMCache; vLLM's own copy of its connector needs the package, too."""
    try:
        return version("lmcache")
    except PackageNotFoundError:
        return None


def hands_over(connector: KVConnectorBase_V1 | None) -> Callable[[Request], bool]:
    """Which requests' blocks the connector hands to another server when they end."""
    if not any(type(part).__name__ in _HANDS_OVER for part in _parts(connector)):
        return lambda request: False
    return lambda request: bool((request.kv_transfer_params or {}).get("do_remote_decode"))


def configured_connectors(transfer: KVTransferConfig) -> list[dict[str, Any]]:
    """The fields of a configured connector, or of those that a `MultiConnector` combines."""
    extra = transfer.kv_connector_extra_config
    if transfer.kv_connector == "MultiConnector":
        return [dict(part) for part in extra.get("connectors", [])]
    return [
        {
            "kv_connector": transfer.kv_connector,
            "kv_connector_extra_config": extra,
            "kv_connector_module_path": transfer.kv_connector_module_path,
        }
    ]


class ConnectorGuard:
    """Stands between vLLM's scheduler and its connector.

    Args:
        connector: the scheduler's; None if there is none.
        max_hit_tokens: longest hit of a request, in whole blocks, or None if it is not bounded.
        block_size: tokens per block.
        has_other_layers: whether a hit must not be longer, because its end cannot be computed
            again.
    """

    def __init__(
        self,
        connector: KVConnectorBase_V1 | None,
        max_hit_tokens: Callable[[Request], int | None],
        block_size: int,
        has_other_layers: bool = False,
    ) -> None:
        self._max_hit_tokens, self._block_size = max_hit_tokens, block_size
        self._has_other_layers = has_other_layers
        self._readers: list[Reader] = []
        self._loading: set[str] = set()
        if connector is not None:
            for name in (type(part).__name__ for part in _parts(connector)):
                if name not in SUPPORTED:
                    raise ValueError(
                        f"KV compression cannot be used with the KV connector {name}; vLLM chose "
                        "it because of LMCACHE_USE_UPSTREAM_MP or a broken installation of LMCache"
                    )
            self._readers = [SUPPORTED[type(part).__name__](part) for part in _parts(connector)]
            self._matched_tokens = connector.get_num_new_matched_tokens
            connector.get_num_new_matched_tokens = self._shortened  # type: ignore[method-assign]

    @property
    def is_used(self) -> bool:
        """Whether there is a connector."""
        return bool(self._readers)

    def on_new_request(self, request: Request) -> None:
        """Bound what is stored of a request that the connector has just been told about."""
        storable = whole_blocks(request.num_prompt_tokens, self._block_size)
        for reader in self._readers:
            reader.on_new_request(request, storable)

    def is_reading(self, request_id: str) -> bool:
        """Whether the connector still reads blocks of a request."""
        return any(reader.is_reading(request_id) for reader in self._readers)

    def forget_blocks(self, request_id: str) -> None:
        """Blocks of a request are about to be freed while it runs."""
        for reader in self._readers:
            reader.forget_blocks(request_id)

    def on_blocks_taken(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Blocks have left the pool that will be overwritten, but are in no request's row."""
        for reader in self._readers:
            reader.on_blocks_taken(block.block_id for block in blocks)

    def is_loading(self, request_id: str) -> bool:
        """Whether a request waits for blocks from outside, so that its step computes nothing."""
        return request_id in self._loading

    def computed_after_load(self, request: Request) -> int:
        """Computed tokens with which a request goes on whose blocks have arrived."""
        self._loading.discard(request.request_id)
        computed, limit = request.num_computed_tokens, self._max_hit_tokens(request)
        if limit is not None:
            computed = min(computed, limit)
        self._on_start(request, computed)
        return computed

    def forget(self, request_id: str) -> None:
        """A request has ended or was preempted; unknown ids are fine."""
        self._loading.discard(request_id)

    def _shortened(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The connector's `get_num_new_matched_tokens`."""
        self._loading.discard(request.request_id)
        limit = self._max_hit_tokens(request)
        with ExitStack() as stack:
            if limit is not None and self._has_other_layers:
                room = max(0, limit - num_computed_tokens)
                for reader in self._readers:
                    stack.enter_context(reader.bound_hit(request.request_id, room))
            num_tokens, is_async = self._matched_tokens(request, num_computed_tokens)
        self._on_start(request, num_computed_tokens)  # or later, if the hit is loaded
        if not num_tokens or request.skip_reading_prefix_cache:  # the scheduler ignores the hit
            return num_tokens, is_async
        if limit is not None and limit <= num_computed_tokens:
            for reader in self._readers:
                reader.on_hit_ignored(request.request_id)
            return 0, False
        if is_async:
            self._loading.add(request.request_id)
            return num_tokens, True
        if limit is not None:
            num_tokens = min(num_tokens, limit - num_computed_tokens)
        return num_tokens, False

    def _on_start(self, request: Request, num_tokens: int) -> None:
        for reader in self._readers:
            reader.on_start(request.request_id, num_tokens)
