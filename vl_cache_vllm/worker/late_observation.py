# SPDX-License-Identifier: Apache-2.0
"""Observation of a step after its last layer: few launches, however many layers and requests.

On a GPU, a launch for each layer and request can take the host longer than the layer takes the
device. So the observed queries of a step are held, and all layers and requests are observed at
once. The keys need not be held: they stay in the pool until the requests are evicted.
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
"""Observed queries that a step holds at most; requests beyond are observed layer by layer."""


class QueryBuffer:
    """Memory for the held queries of one step, which every step reuses.

    It is as large as the largest step needs, ``[num_layers, MAX_LATE_QUERIES, num_heads,
    head_size]``, and made in the first step that observes. So the memory profile counts all of it.
    """

    def __init__(self) -> None:
        self._queries: torch.Tensor | None = None

    def of(self, query: torch.Tensor, num_layers: int) -> torch.Tensor:
        """The buffer for queries like these, ``[num_tokens, num_heads, head_size]``."""
        if self._queries is None:
            shape = num_layers, MAX_LATE_QUERIES, *query.shape[1:]
            self._queries = torch.empty(shape, dtype=query.dtype, device=query.device)
        return self._queries


def split_late(
    observations: Sequence[ObservedQueries], most: int
) -> tuple[list[ObservedQueries], list[ObservedQueries]]:
    """The observations that can wait for the last layer, with ``most`` queries, and the others."""
    late, others, room = [], [], most
    for observation in observations:
        options = observation.state.config.experimental
        # These options read the keys of each layer on their own.
        waits = not (options.elite_window or options.diversity)
        if waits and observation.num_queries <= room:
            late.append(observation)
            room -= observation.num_queries
        else:
            others.append(observation)
    return late, others


@dataclass(eq=False)
class LateObservation:
    """The observations of one step that wait for its last layer."""

    observations: list[ObservedQueries]
    pool: PagePool
    buffer: QueryBuffer
    _scales: dict[int, float] = field(default_factory=dict)  # of the layers so far
    _softcap: float = 0.0
    _held: torch.Tensor | None = None  # [num_layers, n, num_heads, head_size]
    _tokens: torch.Tensor | None = None  # indices of the held queries, int64 [n]

    def hold(self, layer: int, query: torch.Tensor, scale: float, softcap: float) -> None:
        """Copy the observed queries of a layer; arguments as for `Evictor.layer_done`.

        Raises:
            ValueError: if layers differ in their soft cap.
        """
        observations = self.observations
        if self._scales and softcap != self._softcap:
            raise ValueError(f"layers with soft caps {self._softcap} and {softcap}")
        if self._held is None:
            number = sum(observation.num_queries for observation in observations)
            self._held = self.buffer.of(query, self.pool.num_layers)[:, :number]
            if len(observations) > 1:
                tokens = [
                    token for one in observations for token in range(one.query_start, one.query_end)
                ]
                self._tokens = to_device(tokens, query.device)
        if self._tokens is None:
            only = observations[0]
            self._held[layer].copy_(query[only.query_start : only.query_end])
        else:
            torch.index_select(query, 0, self._tokens, out=self._held[layer])
        self._scales[layer] = scale
        self._softcap = softcap

    def observe(
        self,
        keys_of: Callable[[ObservedQueries], tuple[torch.Tensor, torch.Tensor | None]],
        stats_of: Callable[[ObservedQueries], AttentionStats],
    ) -> None:
        """Observe all layers.

        Args:
            keys_of: ``table`` and ``num_keys`` of a `RequestObservation`.
            stats_of: what the attention is added to.
        """
        assert self._held is not None
        requests: list[RequestObservation] = []
        stopwatch, first_query, number = Stopwatch(self.pool.device), 0, self._held.shape[1]
        for observation in self.observations:
            stats, num_queries = stats_of(observation), observation.num_queries
            requests.append(
                stats.of_layers(
                    first_query, num_queries, observation.first_position, *keys_of(observation)
                )
            )
            stats.stopwatch.share(stopwatch, num_queries / number)
            first_query += num_queries
        with stopwatch:
            scales = [self._scales[layer] for layer in range(self.pool.num_layers)]
            observe_layers(self._held, self.pool, scales, self._softcap, requests)
