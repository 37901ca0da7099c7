# SPDX-License-Identifier: Apache-2.0
"""Device memory that eviction takes on one worker, as a formula.

vLLM's profiling run measures the same (`vl_cache_vllm.worker.warmup`); the formula says where it
goes. What a policy's own scores and rankings allocate for the moment is not in it.
"""

from dataclasses import dataclass

from vl_cache_vllm.worker.late_observation import MAX_LATE_QUERIES
from vl_cache_vllm.worker.step_tables import TableSizes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one worker."""

    tables: int  # tables, lengths and slots of all layers, and what is kept of every request
    scores: int  # sums and maxima of all prompts under observation
    positions: int  # of the tokens that an eviction of the longest prompt keeps, at most
    queries: int  # that a step holds until its last layer

    @property
    def total(self) -> int:
        """All of them; one eviction runs at a time."""
        return self.tables + self.scores + self.positions + self.queries


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
        wants_maxima: whether the policy reads the maxima over the queries.
        query_bytes: of one token's query in a layer on this worker.
    """
    per_token = 4 * sizes.num_layers * num_kv_heads
    return MemoryUse(
        sizes.num_bytes(),
        per_token * observed_tokens * (2 if wants_maxima else 1),
        per_token * max_model_len,
        sizes.num_layers * MAX_LATE_QUERIES * query_bytes,
    )
