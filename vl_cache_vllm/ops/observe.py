# SPDX-License-Identifier: Apache-2.0
"""How the observed queries attend: column sums and the count of dense entries."""

import math

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.page_pool import PagedKeys

# Bounds the float32 logits that one slice of queries materialises: 64 MiB.
_MAX_LOGITS = 1 << 24


@operation
def observe(
    query: torch.Tensor,
    key: torch.Tensor | PagedKeys,
    first_position: int,
    scale: float,
    threshold: float,
    softcap: float,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
) -> None:
    """Accumulate attention of consecutive queries over all keys before and at their position.

    Args:
        query: ``[num_queries, num_heads, head_size]``, rotary embedding applied.
        key: ``[num_kv_heads, num_keys, head_size]``, ``num_keys >= first_position + num_queries``;
            later keys are ignored. Triton reads those in pages in place.
        first_position: position of ``query[0]`` in the sequence.
        scale: softmax scale.
        threshold: p; an entry is dense iff it is at least p times its row's maximum.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 disables it.
        column_sums: float32 ``[num_kv_heads, >= num_keys]``, added to: attention per key, summed
            over queries and the heads of the KV head's group.
        dense_entries: int64 scalar tensor, added to: dense entries over all query heads.
        query_weights: of each query in the column sums, ``[num_kv_heads, num_queries]``; None: 1.

    Source: paper sections 1 and 3. Scores in float32 whatever the cache's type.
    """
    if isinstance(key, PagedKeys):
        key = key.read()
    num_queries, num_heads, _ = query.shape
    num_keys = first_position + num_queries
    keys = key[:, :num_keys].float().transpose(1, 2)  # [K, D, S]
    step = max(1, _MAX_LOGITS // (num_heads * num_keys))
    for start in range(0, num_queries, step):
        part = query[start : start + step]
        rows = part.shape[0]
        logits = _logits(part, keys, scale, softcap)
        # Only keys from this slice's first query on can lie after a query.
        recent = first_position + start
        future = torch.ones(rows, num_keys - recent, dtype=torch.bool, device=query.device).triu(1)
        logits[..., recent:].masked_fill_(future, -torch.inf)
        row_max = logits.amax(-1, keepdim=True)
        dense_entries += (logits >= row_max + math.log(threshold)).sum()
        attention = logits.sub_(row_max).exp_()
        attention.div_(attention.sum(-1, keepdim=True))
        if query_weights is not None:
            attention.mul_(query_weights[:, None, start : start + step, None])
        column_sums[:, :num_keys] += attention.sum((1, 2))


def elite_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    first_position: int,
    scale: float,
    softcap: float,
    share: float,
) -> torch.Tensor:
    """The queries whose tokens the last one attends to most.

    Args:
        query, key, first_position, scale, softcap: as for `observe`; the queries are the prompt's
            last.
        share: of the largest attention that the last query pays to the token of any query, on
            average over a KV head's group; whose token receives as much is elite.

    Returns:
        bool ``[num_kv_heads, num_queries]``, at least one of each row true.

    Source: AirCache (arXiv 2503.23956), there over all heads.
    """
    keys = key[:, : first_position + query.shape[0]].float().transpose(1, 2)
    attention = _logits(query[-1:], keys, scale, softcap).softmax(-1).mean(1)[:, 0]  # [K, S]
    received = attention[:, first_position:]
    return received >= share * received.amax(-1, keepdim=True)


def _logits(query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """``[Q, H, D]`` against float32 ``[K, D, S]``: ``[K, H / K, Q, S]``, not masked."""
    num_queries, num_kv_heads = query.shape[0], keys.shape[0]
    grouped = (query.float() * scale).view(num_queries, num_kv_heads, -1, query.shape[-1])
    grouped = grouped.permute(1, 2, 0, 3)
    logits = torch.matmul(grouped.flatten(1, 2), keys).view(*grouped.shape[:3], -1)
    if softcap > 0:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits
