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


@dataclass
class Selection:
    """``density``: float64 ``[num_layers]``; ``kept_pages``: int64 ``[num_layers]``.

    ``scores``: what the tokens of each KV head rank by, ``[num_layers, num_kv_heads, tokens]``.

    ``positions``: as `select` gives them, the first ``kept_pages[l] * block_size`` of layer l.
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
    first_query: int,
    kept_blocks: int,
    block_size: int,
) -> Selection:
    """The layers' pages and each KV head's tokens.

    Args:
        config: the request's settings.
        observed: the queries from ``first_query`` to the prompt's last.
        dense_entries: the observed ones, of all ranks.
        prompt: what its tokens are.
        num_heads: query heads of a layer, of all ranks.
        first_query: position of the first observed query.
        kept_blocks: of the prompt.
        block_size: tokens of a page.
    """
    policy, options = config.policy, config.experimental
    num_layers = len(dense_entries)
    full_pages = prompt.tokens // block_size
    total_pages = kept_blocks * num_layers
    # Query at position t has t + 1 causal entries.
    entries = (prompt.tokens - first_query) * (first_query + 1 + prompt.tokens) // 2
    density = dense_entries.double() / (entries * num_heads)
    budget = config.budget
    if policy.min_kept_tokens:  # which may keep more than the budget
        budget = max(budget, min(1.0, kept_blocks * block_size / prompt.tokens))
    weights = policy.layer_weights(density, budget, prompt)
    kept_pages = apportion(weights, total_pages, full_pages)
    scores = policy.token_scores(observed.attention, prompt)
    if observed.similarity is not None:
        scores = mix_diversity(scores, observed.similarity, options.diversity)
    positions = select(
        scores,
        kept_pages * block_size,
        policy.recent_ratio,
        min(full_pages, total_pages - num_layers + 1) * block_size,
        policy.precedence(prompt, scores.device),
    )
    return Selection(density, scores, kept_pages, positions)
