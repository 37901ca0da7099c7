# SPDX-License-Identifier: Apache-2.0
"""What an eviction keeps, from what was observed: a policy's decisions made whole pages."""

from dataclasses import dataclass

import torch

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.select import select
from vl_cache_vllm.policy import Prompt
from vl_cache_vllm.policy.diversity import mix_diversity
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.source import EvictionSource


@dataclass
class Selection:
    """``density``: float64 ``[num_layers]``; ``kept_pages``: int64 ``[num_layers]``.

    ``scores``: what the tokens of each KV head rank by, ``[num_layers, num_kv_heads, tokens]``.

    ``positions``: cache indices as `select` gives them, the first ``kept_pages[l] * block_size`` of
    layer l.
    """

    density: torch.Tensor
    scores: torch.Tensor
    kept_pages: torch.Tensor
    positions: torch.Tensor


def select_kept(
    config: KVCompressConfig,
    observed: AttentionStats,
    dense_entries: torch.Tensor,
    prompt: Prompt,
    num_heads: int,
    num_queries: int,
    kept_blocks: int,
    source: EvictionSource,
    unobserved: int = 0,
) -> Selection:
    """The layers' pages and each KV head's tokens.

    Args:
        config: the request's settings.
        observed: attention of the observed queries.
        dense_entries: the observed ones, of all ranks.
        prompt: what the tokens are.
        num_heads: query heads of a layer, of all ranks.
        num_queries: number of observed queries, the last of `EvictionSource.cached_tokens`.
        unobserved: tokens between the last of them and the one before it.
        kept_blocks: of the request.
        source: what is chosen from.
    """
    policy, options = config.policy, config.experimental
    total_pages = kept_blocks * len(dense_entries)
    # The last query has as many causal entries as tokens are cached, the one before it one less.
    # Before the first eviction the host knows their number, which saves launches on a GPU.
    cached_tokens = source.max_tokens if source.is_first else source.cached_tokens
    entries = num_queries * (2 * cached_tokens - num_queries + 1) // 2
    entries = entries - unobserved * (num_queries - 1)
    density = dense_entries.double() / (entries * num_heads)
    budget = config.budget
    if policy.min_kept_tokens:  # which may keep more than the budget
        budget = max(budget, min(1.0, kept_blocks * source.block_size / prompt.tokens))
    weights = policy.layer_weights(density, budget, prompt)
    kept_pages = apportion(weights, total_pages, source.pages, source.total_pages)
    scores = policy.token_scores(observed.attention, prompt)
    if observed.similarity is not None:
        scores = mix_diversity(scores, observed.similarity, options.diversity)
    most_pages = min(source.max_pages, total_pages - len(dense_entries) + 1)
    positions = select(
        scores,
        source.num_tokens,
        kept_pages * source.block_size,
        policy.recent_ratio,
        most_pages * source.block_size,
        policy.precedence(prompt, scores.device),
    )
    return Selection(density, scores, kept_pages, positions)
