# SPDX-License-Identifier: Apache-2.0
"""Evicts a synthetic prompt while vLLM profiles memory, before there is a KV cache.

vLLM then leaves enough memory for the largest eviction, whatever the policy is, and the first
request finds its kernels compiled. Eviction needs, at most:

- attention: 4 bytes per observed prompt token, layer and KV head, 8 with maxima;
- what the policy and the selection of a few layers allocate at once;
- queries that a step holds, `late_observation.MAX_LATE_QUERIES` of every layer;
- tables: 4 bytes per layer, request of a graph and block of the longest sequence, at most 128 MiB,
  and 8 bytes for each block that requests keep, which the profile does not include.

`vl_cache_vllm.worker.memory` has the formula.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.config import KVCompressConfig, TraceConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.ops.page_pool import PagePacking, PagePool
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.memory import most_selected
from vl_cache_vllm.worker.step import Batch, BatchRow

QUERIES = 64  # most that are observed in each of two steps


def profiling_config(config: KVCompressConfig) -> KVCompressConfig:
    """Settings for the profiling run: evict prompts of any length, write no trace."""
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, min_kept_tokens=0),
        budget=0.5,
        min_prompt_tokens=1,
        trace=TraceConfig(),
    )


def variants(config: KVCompressConfig) -> Iterator[KVCompressConfig]:
    """Settings that requests may choose and that need kernels of their own."""
    kinds: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        (
            {"sink_tokens": 0, "keep_text": False, "max_observation_tokens": 2 * QUERIES},
            {"elite_window": 0.0, "diversity": 0.0},
        ),
        (
            {"sink_tokens": 1, "max_observation_tokens": QUERIES, "evict_after": 0},
            {"elite_window": 0.5},
        ),
        (
            {"max_observation_tokens": 2 * QUERIES},
            {"elite_window": 0.0, "diversity": 0.5},
        ),
    )
    for options, experimental in kinds:
        with contextlib.suppress(ValueError):  # a policy refuses them, so no request can have them
            yield dataclasses.replace(
                config,
                policy=dataclasses.replace(config.policy, **options),
                experimental=dataclasses.replace(config.experimental, **experimental),
            )


def blank_pool(
    num_layers: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PagePool:
    """A page pool of one block, packed like vLLM's GPU caches."""
    content = 2 * head_size
    pages = torch.zeros(num_layers, num_kv_heads, block_size * content, dtype=dtype, device=device)
    packing = PagePacking.side_by_side(block_size, head_size, content)
    return PagePool(pages, packing, num_layers, 1, num_layers)


class WarmupEviction:
    """Observes and evicts one prompt, and allocates scores for others under observation.

    Args:
        worker: over a `blank_pool`, in which all block ids are 0.
        tokens: length of the prompt.
        room: tokens of all prompts under observation at once.
        num_heads: query heads on this worker.
        softcap: the layers' logit soft cap, 0 for none.
        config: the prompt's settings; None: the worker's.
        queries: most that are observed in each of the two steps of the prefill.
    """

    def __init__(
        self,
        worker: Evictor,
        tokens: int,
        room: int,
        num_heads: int,
        softcap: float = 0.0,
        config: KVCompressConfig | None = None,
        queries: int = QUERIES,
    ) -> None:
        self._worker, self._tokens, self._num_heads = worker, tokens, num_heads
        self._softcap = softcap
        config, pool = config or worker.config, worker.pool
        queries = min(queries, tokens // 4)
        self._starts = tokens - 2 * queries, tokens - queries
        self._state = worker.requests.start("warm-up", config, self._starts[0], tokens)
        self._num_blocks = cdiv(tokens, pool.block_size)
        self._kept_blocks = min(
            max(1, config.kept_blocks(self._num_blocks, pool.block_size)), tokens // pool.block_size
        )
        self._evicted_tokens = tokens // pool.block_size * pool.block_size
        shape = pool.num_layers, pool.num_kv_heads
        self._others = AttentionStats(config, *shape, max(0, room - tokens), pool.device)
        # A group may have more scores, of several requests, than this prompt.
        selected = most_selected(*shape, tokens, tokens)
        missing = most_selected(*shape, tokens, max(room, tokens)) - selected
        self._selected = torch.zeros(2, missing, device=pool.device)

    def observe(self) -> None:
        """Run the prefill without its last step."""
        self._run(*self._starts)

    def evict(self) -> None:
        """Run the last step of the prefill, which evicts, and a decode step that evicts again."""
        self._run(self._starts[1], self._tokens, self._evicted_tokens)
        again = self._evicted_tokens + self._worker.pool.block_size
        self._run(again, again + 1, again)
        for report in self._worker.take_reports():
            report()  # waits for the device, so that its errors surface here

    def _run(self, start: int, end: int, evicted_tokens: int = 0) -> None:
        pool = self._worker.pool
        order = EvictionOrder(evicted_tokens, (0,) * self._kept_blocks)
        self._worker.orders = {self._state.request_id: order} if evicted_tokens else {}
        head_size = pool.packing.key_index.shape[1]

        def numbers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=pool.device)

        query = torch.zeros(
            end - start, self._num_heads, head_size, dtype=pool.pages.dtype, device=pool.device
        )
        step = self._worker.begin_step(
            Batch.of([BatchRow(self._state, start, end - start)]),
            numbers(0).expand(1, cdiv(end, pool.block_size)).contiguous(),
            numbers(0, end - start),
            numbers(end),
        )
        if step is not None:
            for layer in range(pool.num_layers):
                self._worker.layer_done(step, layer, query, 1.0, self._softcap)
        self._worker.orders = {}


def warm_up_kernels(worker: Evictor, tokens: int, num_heads: int, softcap: float = 0.0) -> None:
    """Evict short prompts with settings that requests may have; arguments as `WarmupEviction`.

    Few queries take kernels of their own, and so do those that are observed layer by layer.
    """
    tokens, late = min(tokens, 4 * worker.pool.block_size), (worker.max_late_queries, 0)
    for config, queries, most in itertools.product(variants(worker.config), (QUERIES, 1), late):
        worker.max_late_queries = most
        warmup = WarmupEviction(worker, tokens, 0, num_heads, softcap, config, queries)
        warmup.observe()
        warmup.evict()
    worker.max_late_queries = late[0]
