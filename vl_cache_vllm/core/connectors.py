# SPDX-License-Identifier: Apache-2.0
"""KV connectors beside eviction: what they load, what they store, and when blocks may be freed.

A prompt's blocks are ordinary blocks until an eviction replaces them, so connectors store and load
them as always. Three things differ:

- The observed queries must be computed here. A hit that is loaded within a step is shortened like
  a local one. One that is loaded between steps is loaded whole, because connectors place its
  blocks by their number, and its end is computed again.
- Nothing behind the prompt is stored: after an eviction, keys and values depend on it.
- Replaced blocks stay until the connector has read them, and are not offered to it again.

`SUPPORTED` names the connectors that this was written for and tested with. All others are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.v1.request import Request

from vl_cache_vllm.core.admission import whole_blocks


class Reader(Protocol):
    """What the scheduler must know of how a connector reads blocks."""

    def on_new_request(self, request: Request, storable_tokens: int) -> None:
        """Let the connector store only the first tokens of a request."""

    def is_reading(self, request_id: str) -> bool:
        """Whether reads of the request's blocks have been scheduled and are not done."""

    def forget_blocks(self, request_id: str) -> None:
        """Make sure that the connector does not read the request's present blocks any more."""


class _ReadsWithinSteps:
    """A connector that has read a step's blocks when the step ends, or never reads evicted ones."""

    def on_new_request(self, request: Request, storable_tokens: int) -> None:
        pass

    def is_reading(self, request_id: str) -> bool:
        return False

    def forget_blocks(self, request_id: str) -> None:
        pass


class _ReadsBetweenSteps:
    """`OffloadingConnector`, which copies blocks while later steps run.

    vLLM lets it assume that the blocks of full attention stay until their request ends. Its
    scheduler's state is read here, because its interface does not say when a copy is done.
    """

    def __init__(self, connector: Any) -> None:
        self._states: Mapping[str, Any] = connector.connector_scheduler._req_status

    def on_new_request(self, request: Request, storable_tokens: int) -> None:
        state = self._states.get(request.request_id)
        if state is not None:
            own = state.max_offload_tokens  # set by the request's kv_transfer_params
            state.max_offload_tokens = min(storable_tokens, storable_tokens if own is None else own)

    def is_reading(self, request_id: str) -> bool:
        state = self._states.get(request_id)
        return state is not None and bool(state.transfer_jobs)

    def forget_blocks(self, request_id: str) -> None:
        # A copy for which there was no room is tried again, with the ids of blocks that now belong
        # to others.
        state = self._states.get(request_id)
        if state is not None:
            state.max_offload_tokens = 0


SUPPORTED: dict[str, Callable[[Any], Reader]] = {
    "ExampleConnector": lambda _: _ReadsWithinSteps(),
    "NixlConnector": lambda _: _ReadsWithinSteps(),  # what it sends is not evicted
    "NixlPullConnector": lambda _: _ReadsWithinSteps(),
    "OffloadingConnector": _ReadsBetweenSteps,
}
"""Connectors by vLLM's name, and how they read blocks; `MultiConnector` may combine them."""


def hands_over(request: Request) -> bool:
    """Whether a request's blocks are handed to another server when it ends."""
    return bool((request.kv_transfer_params or {}).get("do_remote_decode"))


def configured_connectors(name: str | None, extra: Mapping[str, Any]) -> list[tuple[str, dict]]:
    """Names and options of a configured connector, or of those that a `MultiConnector` combines."""
    if name != "MultiConnector":
        return [(str(name), dict(extra))]
    parts = extra.get("connectors", [])
    return [(str(c.get("kv_connector")), c.get("kv_connector_extra_config") or {}) for c in parts]


class ConnectorGuard:
    """Stands between vLLM's scheduler and its connector.

    Args:
        connector: the scheduler's; None if there is none.
        max_hit_tokens: longest hit of a request, in whole blocks, or None if it is not bounded.
        block_size: tokens per block.
    """

    def __init__(
        self,
        connector: KVConnectorBase_V1 | None,
        max_hit_tokens: Callable[[Request], int | None],
        block_size: int,
    ) -> None:
        self._max_hit_tokens, self._block_size = max_hit_tokens, block_size
        self._readers: list[Reader] = []
        self._loading: set[str] = set()
        if connector is not None:
            parts = getattr(connector, "_connectors", [connector])  # of a MultiConnector
            self._readers = [SUPPORTED[type(part).__name__](part) for part in parts]
            self._matched_tokens = connector.get_num_new_matched_tokens
            connector.get_num_new_matched_tokens = self._shortened  # type: ignore[method-assign]

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

    def is_loading(self, request_id: str) -> bool:
        """Whether a request waits for blocks from outside, so that its step computes nothing."""
        return request_id in self._loading

    def computed_after_load(self, request: Request) -> int:
        """Computed tokens with which a request goes on whose blocks have arrived."""
        self._loading.discard(request.request_id)
        limit = self._max_hit_tokens(request)
        return (
            request.num_computed_tokens
            if limit is None
            else min(request.num_computed_tokens, limit)
        )

    def forget(self, request_id: str) -> None:
        """A request has ended or was preempted; unknown ids are fine."""
        self._loading.discard(request_id)

    def _shortened(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """The connector's `get_num_new_matched_tokens`."""
        self._loading.discard(request.request_id)
        num_tokens, is_async = self._matched_tokens(request, num_computed_tokens)
        limit = self._max_hit_tokens(request)
        if not num_tokens:
            return num_tokens, is_async
        if limit is not None and limit <= num_computed_tokens:
            return 0, False
        if is_async:
            self._loading.add(request.request_id)
            return num_tokens, True
        if limit is not None:
            num_tokens = min(num_tokens, limit - num_computed_tokens)
        return num_tokens, False
