# SPDX-License-Identifier: Apache-2.0
"""Device memory that eviction takes on one worker, as a formula.

vLLM's profiling run measures the same (`vl_cache_vllm.worker.warmup`); the formula says where it
goes. Rankings are those of `vlcache-plus`. What other policies allocate for the moment is in the
profile alone.
"""

from dataclasses import dataclass

from vl_cache_vllm.worker.late_observation import MAX_LATE_QUERIES
from vl_cache_vllm.worker.selection import MAX_GROUP_SCORES, MAX_POLICY_SCORES
from vl_cache_vllm.worker.step_tables import TableSizes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one worker."""

    tables: int  # tables, lengths and slots of all layers, and what is kept of every request
    observed: int  # sums and maxima of all prompts under observation
    selected: int  # scores of the layers that are selected at once, and the positions they keep
    rankings: int  # of the layers that are ranked at once
    queries: int  # that a step holds for several layers

    @property
    def total(self) -> int:
        """All of them."""
        return self.tables + self.observed + self.selected + self.rankings + self.queries


def most_selected(
    num_layers: int, num_kv_heads: int, max_model_len: int, observed_tokens: int
) -> int:
    """Scores of the largest group of layers, which may be of several requests."""
    everything = num_layers * num_kv_heads * observed_tokens
    return min(everything, max(MAX_GROUP_SCORES, num_kv_heads * max_model_len))


def memory_use(
    sizes: TableSizes,
    num_kv_heads: int,
    max_model_len: int,
    observed_tokens: int,
    wants_maxima: bool,
    query_bytes: int,
) -> MemoryUse:
    """The bytes that eviction takes.

    Args:
        sizes: of the step's tables.
        num_kv_heads: of a layer on this worker.
        max_model_len: tokens of the longest prompt.
        observed_tokens: bound of the tokens under observation
            (`vl_cache_vllm.core.observation_budget`).
        wants_maxima: whether the policy reads the maxima over the queries, as `vlcache-plus`,
            which also ranks.
        query_bytes: of one token's query in a layer on this worker.
    """
    of_layer = num_kv_heads * max_model_len
    of_prompt = sizes.num_layers * of_layer
    observed = 4 * sizes.num_layers * num_kv_heads * observed_tokens
    return MemoryUse(
        sizes.num_bytes(),
        observed * (2 if wants_maxima else 1),
        8 * most_selected(sizes.num_layers, num_kv_heads, max_model_len, observed_tokens),
        # Attention without sinks, shared scores, those of the look-ahead, and 16 bytes to sort.
        28 * min(of_prompt, max(MAX_POLICY_SCORES, of_layer)) if wants_maxima else 0,
        sizes.num_layers * MAX_LATE_QUERIES * query_bytes,
    )
