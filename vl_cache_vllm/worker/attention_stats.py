# SPDX-License-Identifier: Apache-2.0
"""How a prompt's observed queries attend, collected layer by layer and chunk by chunk."""

import torch

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.device import Stopwatch
from vl_cache_vllm.ops.observe import AttentionParams, elite_queries, observe
from vl_cache_vllm.ops.page_pool import PagedKeys
from vl_cache_vllm.policy.diversity import key_similarity


class AttentionStats:
    """What a policy decides on, of every layer of one prompt.

    Args:
        config: the request's settings.
        num_layers, num_kv_heads: of the cache.
        tokens: of the prompt.
        device: of the results.

    ``column_sums``, float32 ``[num_layers, num_kv_heads, tokens]``, and ``dense_entries``, int64
    ``[num_layers]``, are those of `observe`; ``similarity`` is that of `key_similarity`, shaped as
    the sums, None without the option ``diversity``. ``stopwatch`` is for who adds to them.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        num_layers: int,
        num_kv_heads: int,
        tokens: int,
        device: torch.device,
    ) -> None:
        self._threshold = config.policy.density_threshold
        self._options = config.experimental
        self.tokens = tokens
        self.stopwatch = Stopwatch(device)
        self.column_sums = torch.zeros(num_layers, num_kv_heads, tokens, device=device)
        self.dense_entries = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.similarity = torch.zeros_like(self.column_sums) if self._options.diversity else None
        # Queries of earlier chunks, by layer, of which only the last one tells which are elite.
        self._waiting: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]

    def add(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | PagedKeys,
        first_position: int,
        scale: float,
        softcap: float,
    ) -> None:
        """Take in the next queries of a layer; arguments as for `observe` and `AttentionParams`."""
        options = self._options
        params = AttentionParams(scale, softcap, self._threshold)
        end = first_position + query.shape[0]
        weights = None
        is_last = end == self.tokens
        if isinstance(key, PagedKeys) and is_last and (options.elite_window or options.diversity):
            key = key.read()
        if options.elite_window:
            if not is_last:
                self._waiting[layer].append(query.clone())  # the runner reuses its buffers
                return
            query = torch.cat((*self._waiting[layer], query))
            self._waiting[layer].clear()
            first_position = end - query.shape[0]
            assert isinstance(key, torch.Tensor)
            weights = elite_queries(query, key, first_position, params, options.elite_window)
        observe(
            query,
            key,
            first_position,
            params,
            self.column_sums[layer],
            self.dense_entries[layer],
            weights,
        )
        if self.similarity is not None and is_last:
            assert isinstance(key, torch.Tensor)
            self.similarity[layer] = key_similarity(key[:, :end])
