# SPDX-License-Identifier: Apache-2.0
"""Observation of several layers at once: few launches, however many layers and requests.

On a GPU, a launch for each layer and request can take the host longer than the layer takes the
device. So the observed queries of a step are held, and its requests are observed together: after
the last layer, or, where the queries of all layers do not fit the buffer, after every few layers.
The keys need not be held: they stay in the pool until the requests are evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vl_cache_vllm.ops.device import Stopwatch, to_device
from vl_cache_vllm.ops.observe import RequestObservation, observe_layers
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.step import ObservedQueries

MAX_LATE_QUERIES = 384
"""Queries that the buffer has room for if it holds all layers; of more it holds fewer layers.

A request with more queries of its own is observed layer by layer: its launches take the device
longer than the host.
"""


class QueryBuffer:
    """Memory for held queries, which every step reuses.

    It has room for `MAX_LATE_QUERIES` of each layer, and is made in the first step that observes.
    So the memory profile counts all of it.
    """

    def __init__(self) -> None:
        self._queries: torch.Tensor | None = None

    def of(self, query: torch.Tensor, num_layers: int, number: int) -> torch.Tensor:
        """Room for queries of as many layers as fit.

        Args:
            query: queries like those to be held, ``[num_tokens, num_heads, head_size]``.
            num_layers: of the model.
            number: queries of a layer, at most ``num_layers * MAX_LATE_QUERIES``.

        Returns:
            ``[1 to num_layers, number, num_heads, head_size]``.
        """
        if self._queries is None:
            shape = num_layers * MAX_LATE_QUERIES, *query.shape[1:]
            self._queries = torch.empty(shape, dtype=query.dtype, device=query.device)
        held = min(num_layers, len(self._queries) // number)
        return self._queries[: held * number].view(held, number, *query.shape[1:])


def split_late(
    observations: Sequence[ObservedQueries], most: int, num_layers: int
) -> tuple[list[ObservedQueries], list[ObservedQueries]]:
    """The observations of several layers at once, and those of one layer after the other.

    Args:
        observations: of a step.
        most: queries of all layers that can be held.
        num_layers: of the model.
    """
    late, others, room = [], [], most * num_layers
    for observation in observations:
        options = observation.state.config.experimental
        # These options read the keys of each layer on their own.
        waits = not (options.elite_window or options.diversity)
        if waits and observation.num_queries <= min(most, room):
            late.append(observation)
            room -= observation.num_queries
        else:
            others.append(observation)
    return late, others


@dataclass(eq=False)
class LateObservation:
    """The observations of one step that are made several layers at a time."""

    observations: list[ObservedQueries]
    pool: PagePool
    buffer: QueryBuffer
    _scales: dict[int, float] = field(default_factory=dict)  # of the held layers
    _softcap: float | None = None
    _held: torch.Tensor | None = None  # [layers, n, num_heads, head_size]
    _first_layer: int = 0  # of the held ones
    _tokens: torch.Tensor | None = None  # indices of the held queries, int64 [n]

    def __post_init__(self) -> None:
        self._stopwatch = Stopwatch(self.pool.device)

    def hold(self, layer: int, query: torch.Tensor, scale: float, softcap: float) -> None:
        """Copy the observed queries of a layer; arguments as for `Evictor.layer_done`.

        Raises:
            ValueError: if layers differ in their soft cap.
        """
        if self._softcap is None:
            self._softcap = softcap
        if softcap != self._softcap:
            raise ValueError(f"layers with soft caps {self._softcap} and {softcap}")
        observations = self.observations
        if self._held is None:
            number = sum(observation.num_queries for observation in observations)
            self._held = self.buffer.of(query, self.pool.num_layers, number)
            if len(observations) > 1:
                tokens = [
                    token for one in observations for token in range(one.query_start, one.query_end)
                ]
                self._tokens = to_device(tokens, query.device)
        place = layer - self._first_layer
        assert 0 <= place < len(self._held), (
            "a buffer without room for all layers needs them in the order of the pool"
        )
        if self._tokens is None:
            only = observations[0]
            self._held[place].copy_(query[only.query_start : only.query_end])
        else:
            torch.index_select(query, 0, self._tokens, out=self._held[place])
        self._scales[layer] = scale

    @property
    def is_due(self) -> bool:
        """Whether the held layers are to be observed now."""
        assert self._held is not None
        number = len(self._scales)
        return number == len(self._held) or self._first_layer + number == self.pool.num_layers

    def observe(
        self,
        keys_of: Callable[[ObservedQueries], tuple[torch.Tensor, torch.Tensor | None]],
        stats_of: Callable[[ObservedQueries], AttentionStats],
    ) -> None:
        """Observe the held layers, and forget their queries.

        Args:
            keys_of: ``table`` and ``num_keys`` of a `RequestObservation`, of all layers.
            stats_of: what the attention is added to.
        """
        assert self._held is not None and self._softcap is not None
        first, number, queries = self._first_layer, len(self._scales), self._held.shape[1]
        requests: list[RequestObservation] = []
        first_query = 0
        for observation in self.observations:
            stats, num_queries = stats_of(observation), observation.num_queries
            request = stats.of_layers(
                first_query, num_queries, observation.first_position, *keys_of(observation)
            )
            requests.append(request.of_layers(slice(first, first + number)))
            if first == 0:  # it counts later blocks as well
                stats.stopwatch.share(self._stopwatch, num_queries / queries)
            first_query += num_queries
        with self._stopwatch:
            scales = [self._scales[layer] for layer in range(first, first + number)]
            observe_layers(self._held[:number], self.pool, scales, self._softcap, requests, first)
        self._first_layer, self._scales = first + number, {}
