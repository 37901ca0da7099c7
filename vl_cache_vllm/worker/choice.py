# SPDX-License-Identifier: Apache-2.0
"""What an eviction keeps, from what was observed: a policy's decisions made whole pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.select import select
from vl_cache_vllm.policy import EvictionPolicy


@dataclass
class Choice:
    """``density``: float64 ``[num_layers]``; ``kept_pages``: int64 ``[num_layers]``.

    ``positions``: as `select` gives them, the first ``kept_pages[l] * block_size`` of layer l.
    """

    density: torch.Tensor
    kept_pages: torch.Tensor
    positions: torch.Tensor


def choose(
    policy: EvictionPolicy,
    budget: float,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    num_heads: int,
    first_query: int,
    kept_blocks: int,
    block_size: int,
    visual: Sequence[tuple[int, int]],
) -> Choice:
    """The layers' pages and each KV head's tokens.

    Args:
        policy, budget: the request's.
        column_sums, dense_entries: of `observe`, over the queries from ``first_query`` to the
            prompt's last; ``[num_layers, num_kv_heads, prompt_tokens]`` and ``[num_layers]``.
        num_heads: query heads of a layer.
        first_query: position of the first observed query.
        kept_blocks: of the prompt.
        block_size: tokens of a page.
        visual: (first, end) positions of each image of the prompt.
    """
    num_layers, _, prompt_tokens = column_sums.shape
    full_pages = prompt_tokens // block_size
    total_pages = kept_blocks * num_layers
    # Query at position t has t + 1 causal entries.
    entries = (prompt_tokens - first_query) * (first_query + 1 + prompt_tokens) // 2
    density = dense_entries.double() / (entries * num_heads)
    weights = policy.layer_weights(density, budget, prompt_tokens)
    kept_pages = apportion(weights, total_pages, full_pages)
    positions = select(
        policy.token_scores(column_sums),
        kept_pages * block_size,
        policy.recent_ratio,
        min(full_pages, total_pages - num_layers + 1) * block_size,
        policy.precedence(prompt_tokens, visual, column_sums.device),
    )
    return Choice(density, kept_pages, positions)
