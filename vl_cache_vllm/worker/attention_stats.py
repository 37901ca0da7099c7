# SPDX-License-Identifier: Apache-2.0
"""How a request's observed queries attend, collected layer by layer and chunk by chunk."""

from collections import defaultdict

import torch
from torch.nn.functional import pad

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.device import Stopwatch
from vl_cache_vllm.ops.observe import (
    AttentionParams,
    RequestObservation,
    elite_queries,
    observe,
)
from vl_cache_vllm.ops.page_pool import PagedKeys
from vl_cache_vllm.policy import Attention
from vl_cache_vllm.policy.diversity import key_similarity

MAX_GENERATED = 64
"""Generated tokens for which memory is taken with that of the prompt."""


class AttentionStats:
    """What a policy decides on, of every layer of one request.

    Args:
        config: the request's settings.
        num_layers, num_kv_heads: of the cache.
        tokens: up to the last observed query, in the longest layer.
        device: of the results.
        generated: tokens that are generated before the eviction; `extend` needs no copy for the
            first `MAX_GENERATED` of them.

    ``attention`` is what the policy scores by. ``dense_entries``, int64 ``[num_layers]``, is that
    of `observe`; ``similarity`` is that of `key_similarity`, shaped as the sums, None without the
    option ``diversity``. ``stopwatch`` is for who adds to them.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        num_layers: int,
        num_kv_heads: int,
        tokens: int,
        device: torch.device,
        generated: int = 0,
    ) -> None:
        policy = config.policy
        self._threshold = policy.density_threshold
        self._summed_queries = policy.summed_queries
        self._options = config.experimental
        self.tokens = tokens
        self.stopwatch = Stopwatch(device)
        # float32 [num_layers, num_kv_heads, >= tokens], zero beyond the tokens so far
        self._sums = torch.zeros(
            num_layers, num_kv_heads, tokens + min(generated, MAX_GENERATED), device=device
        )
        self._maxima = torch.zeros_like(self._sums) if policy.wants_maxima else None
        self._similarity = torch.zeros_like(self._sums) if self._options.diversity else None
        self.dense_entries = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self._last_weights: tuple[tuple[int, int], torch.Tensor] | None = None
        # Queries of earlier chunks, by attention layer, of which only the last one tells which are
        # elite.
        self._waiting: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    @property
    def attention(self) -> Attention:
        """What the observed queries pay to the tokens so far."""
        maxima = self._maxima
        return Attention(
            self._sums[..., : self.tokens], None if maxima is None else maxima[..., : self.tokens]
        )

    @property
    def similarity(self) -> torch.Tensor | None:
        """Mean similarity of the keys so far, if the option ``diversity`` is on."""
        return None if self._similarity is None else self._similarity[..., : self.tokens]

    def extend(self, tokens: int) -> None:
        """Make room for tokens that were generated; the last query is one of theirs.

        Args:
            tokens: up to the last observed query, more than before.
        """
        if self._summed_queries is not None:
            self._sums.zero_()  # of queries that are no longer the last
        more = tokens - self._sums.shape[-1]
        if more > 0:
            self._sums = pad(self._sums, (0, more))
            if self._maxima is not None:
                self._maxima = pad(self._maxima, (0, more))
            if self._similarity is not None:
                self._similarity = pad(self._similarity, (0, more))
        self.tokens = tokens
        self._last_weights = None

    def divide(self, readers: torch.Tensor) -> None:
        """Turn sums over all attention layers that read a layer's cache into means.

        Args:
            readers: number of them, ``[num_layers]``.
        """
        self._sums.div_(readers[:, None, None])

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | PagedKeys,
        first_position: int,
        scale: float,
        softcap: float,
        num_keys: torch.Tensor | None = None,
        reader: int | None = None,
    ) -> None:
        """Take in the next queries of a layer; arguments as for `observe` and `AttentionParams`.

        Several attention layers may read the cache of one; ``reader`` tells them apart.
        """
        reader = layer if reader is None else reader
        options = self._options
        params = AttentionParams(scale, softcap, self._threshold)
        end = first_position + query.shape[0]
        weights = None
        is_last = end == self.tokens
        if isinstance(key, PagedKeys) and is_last and (options.elite_window or options.diversity):
            key = key.read()
        if options.elite_window:
            if not is_last:
                self._waiting[reader].append(query.clone())  # the runner reuses its buffers
                return
            query = torch.cat((*self._waiting.pop(reader, ()), query))
            first_position = end - query.shape[0]
            assert isinstance(key, torch.Tensor)
            weights = elite_queries(query, key, first_position, params, options.elite_window)
        if self._summed_queries is not None:
            weights = self._only_last(query.shape[0], first_position)
        maxima = self._maxima
        observe(
            query,
            key,
            first_position,
            params,
            self._sums[layer],
            self.dense_entries[layer],
            weights,
            None if maxima is None else maxima[layer],
            num_keys,
        )
        if self._similarity is not None and is_last:
            assert isinstance(key, torch.Tensor)
            self._similarity[layer, :, :end] = key_similarity(key[:, :end])

    def of_layers(
        self,
        first_query: int,
        num_queries: int,
        first_position: int,
        table: torch.Tensor,
        num_keys: torch.Tensor | None,
    ) -> RequestObservation:
        """The next queries of all layers, to be added to these by `observe_layers`.

        Args:
            first_query: index into the held queries.
            num_queries: of them.
            first_position: as for `observe`.
            table, num_keys: as in `RequestObservation`.
        """
        assert not (self._options.elite_window or self._options.diversity)
        first_summed = None
        if self._summed_queries is not None:
            first_summed = max(0, self.tokens - self._summed_queries - first_position)
        return RequestObservation(
            first_query,
            num_queries,
            first_position + num_queries,
            self._threshold,
            table,
            self._sums,
            self.dense_entries,
            self._maxima,
            first_summed,
            num_keys,
        )

    def _only_last(self, num_queries: int, first_position: int) -> torch.Tensor:
        """Weights of a chunk's queries: 0 before the last summed ones of the prompt, then 1.

        Every layer of a step has the same chunk.
        """
        chunk = num_queries, first_position
        if self._last_weights is None or self._last_weights[0] != chunk:
            assert self._summed_queries is not None
            weights = self._sums.new_ones(self._sums.shape[1], num_queries)
            weights[:, : max(0, self.tokens - self._summed_queries - first_position)] = 0
            self._last_weights = chunk, weights
        return self._last_weights[1]
