# SPDX-License-Identifier: Apache-2.0
"""Accumulate, over the observation window, the attention that each key receives.

The same pass counts the attention entries above the density threshold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool

# Upper bound of the float32 logits that one slice of queries holds at once: 64 MiB.
_MAX_LOGITS = 1 << 24


@dataclass(frozen=True)
class AttentionParams:
    """How a layer turns logits into attention, and when an entry counts as dense."""

    scale: float  # softmax scale, a factor of the logits
    softcap: float  # logits become softcap * tanh(logits / softcap); 0 disables it
    threshold: float  # p, 0 < p <= 1: an entry is dense if it reaches p times its row's maximum


@operation
def observe(
    query: torch.Tensor,
    key: torch.Tensor | PagedKeys,
    first_position: int,
    params: AttentionParams,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
    column_maxima: torch.Tensor | None = None,
    num_keys: torch.Tensor | None = None,
) -> None:
    """Add the causal attention of consecutive queries to the sums and maxima of the keys.

    Example: two queries at the positions 2 and 3, one head. Columns are summed over the rows; at
    p = 0.5 the entries marked with * are dense, since they reach half of their row's maximum::

        key                 0      1      2      3
        query at 2         0.5*   0.1    0.4*    -      masked: key 3 is later than the query
        query at 3         0.6*   0.1    0.2    0.1
        column_sums    +=  1.1    0.2    0.6    0.1
        column_maxima max= 0.6    0.1    0.4    0.1
        dense_entries  +=  3

    Arithmetic is in float32 for every type of the cache. The density test needs no softmax:
    ``A[q, j] >= p * max A[q]`` holds if and only if ``logit[q, j] >= max logit[q] + ln p``.

    Args:
        query: queries with the rotary embedding applied, ``[num_queries, num_heads, head_size]``.
        key: keys of the sequence, ``[num_kv_heads, num_keys, head_size]``, with
            ``num_keys >= first_position + num_queries``; later keys are ignored. Triton reads
            `PagedKeys` in place, the other implementations copy them.
        first_position: position of ``query[0]`` in the sequence.
        params: parameters of the layer's attention and of the density.
        column_sums: float32 ``[num_kv_heads, >= num_keys]``, added to. The attention of a key is
            summed over the queries and over the query heads of the KV head's group.
        dense_entries: int64 ``[]``, added to: number of dense entries, over all query heads.
        query_weights: factor of each query in ``column_sums``, ``[num_kv_heads, num_queries]``;
            None: 1. It does not change ``dense_entries`` nor ``column_maxima``.
        column_maxima: float32 ``[num_kv_heads, >= num_keys]``, raised to the largest attention that
            any of the queries pays to the key with any head of the group; None: not computed. A
            maximum does not depend on how a prompt is divided into chunks.
        num_keys: keys up to the last query, an integer ``[]`` on the device that overrides
            ``first_position + num_queries``; that sum is then an upper bound which the host knows.

    Source: docs/method.md, Density of a layer and Token scores.
    """
    if isinstance(key, PagedKeys):
        key = key.read()
    num_queries, num_heads, _ = query.shape
    if num_keys is not None:
        first_position = int(num_keys) - num_queries
    end = first_position + num_queries
    keys = key[:, :end].float().transpose(1, 2)  # [num_kv_heads, head_size, end]
    step = max(1, _MAX_LOGITS // (num_heads * end))
    for start in range(0, num_queries, step):
        part = query[start : start + step]
        rows = part.shape[0]
        logits = _logits(part, keys, params)  # [num_kv_heads, group, rows, end]
        # Only keys at or after this slice's first query can be later than a query.
        recent = first_position + start
        future = torch.ones(rows, end - recent, dtype=torch.bool, device=query.device).triu(1)
        logits[..., recent:].masked_fill_(future, -torch.inf)
        row_max = logits.amax(-1, keepdim=True)
        dense_entries += (logits >= row_max + math.log(params.threshold)).sum()
        attention = logits.sub_(row_max).exp_()
        attention.div_(attention.sum(-1, keepdim=True))
        if column_maxima is not None:
            seen = column_maxima[:, :end]
            torch.maximum(seen, attention.amax((1, 2)), out=seen)
        if query_weights is not None:
            attention.mul_(query_weights[:, None, start : start + step, None])
        column_sums[:, :end] += attention.sum((1, 2))


@dataclass(frozen=True)
class RequestObservation:
    """Consecutive queries of one request that are observed in several layers at once.

    L consecutive layers, K KV heads.
    """

    first_query: int  # index into the held queries
    num_queries: int
    most_keys: int  # keys up to the last query in the longest layer
    threshold: float  # as in `AttentionParams`
    table: torch.Tensor
    """int32: ids of the blocks that hold the keys ``[n]``, or of each layer's pages ``[L, n]``."""
    column_sums: torch.Tensor  # float32 [L, K, >= most_keys], contiguous, added to
    dense_entries: torch.Tensor  # int64 [L], contiguous, added to
    column_maxima: torch.Tensor | None = None  # as the sums, raised; None: not computed
    first_summed: int | None = None
    """Queries before this one have the weight 0 in the sums, the others 1; None: all have 1."""
    num_keys: torch.Tensor | None = None
    """Keys up to the last query in each layer, int32 ``[L]``; None: ``most_keys`` in all."""

    def of_layers(self, layers: slice) -> "RequestObservation":
        """The part of some of the layers."""
        maxima, num_keys, table = self.column_maxima, self.num_keys, self.table
        return replace(
            self,
            table=table if table.dim() == 1 else table[layers],
            column_sums=self.column_sums[layers],
            dense_entries=self.dense_entries[layers],
            column_maxima=None if maxima is None else maxima[layers],
            num_keys=None if num_keys is None else num_keys[layers],
        )


@operation
def observe_layers(
    query: torch.Tensor,
    pool: PagePool,
    scales: Sequence[float],
    softcap: float,
    requests: Sequence[RequestObservation],
    first_layer: int = 0,
) -> None:
    """`observe` for consecutive layers of several requests, after these layers have run.

    The keys of all layers stay in the pool until the requests are evicted; the queries must have
    been held.

    Args:
        query: held queries of each layer, ``[L, n, num_heads, head_size]``.
        pool: the keys.
        scales: softmax scale of each of the L layers.
        softcap: of all layers, 0 for none.
        requests: at least one.
        first_layer: index in the pool of the first of the layers.
    """
    for request in requests:
        queries = slice(request.first_query, request.first_query + request.num_queries)
        maxima, weights = request.column_maxima, None
        if request.first_summed is not None:
            weights = query.new_ones(request.column_sums.shape[1], request.num_queries)
            weights[:, : request.first_summed] = 0
        for layer, scale in enumerate(scales):
            if request.table.dim() == 1:
                keys = PagedKeys.of_blocks(pool, first_layer + layer, request.table)
            else:
                keys = PagedKeys(pool, request.table[layer])
            observe(
                query[layer, queries],
                keys,
                request.most_keys - request.num_queries,
                AttentionParams(scale, softcap, request.threshold),
                request.column_sums[layer],
                request.dense_entries[layer],
                weights,
                None if maxima is None else maxima[layer],
                None if request.num_keys is None else request.num_keys[layer],
            )


def elite_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    first_position: int,
    params: AttentionParams,
    fraction: float,
) -> torch.Tensor:
    """Mark the queries whose own tokens receive the most attention from the last query.

    A query is elite if its token receives at least ``fraction`` of the largest attention that the
    last query pays to the token of any query. Attention is the mean over a KV head's group.

    Args:
        query: as for `observe`; the last query is the last token of the prompt.
        key: as for `observe`, but not in pages.
        first_position: as for `observe`.
        params: as for `observe`; the threshold is not used.
        fraction: 0 to 1.

    Returns:
        bool ``[num_kv_heads, num_queries]``; each row has at least one true entry.

    Source: AirCache (arXiv 2503.23956), which takes the mean over all heads.
    """
    keys = key[:, : first_position + query.shape[0]].float().transpose(1, 2)
    attention = _logits(query[-1:], keys, params).softmax(-1).mean(1)[:, 0]  # [kv_heads, num_keys]
    received = attention[:, first_position:]
    return received >= fraction * received.amax(-1, keepdim=True)


def _logits(query: torch.Tensor, keys: torch.Tensor, params: AttentionParams) -> torch.Tensor:
    """Logits before masking, float32 ``[num_kv_heads, group, num_queries, num_keys]``.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        keys: float32 ``[num_kv_heads, head_size, num_keys]``.
        params: scale and softcap.
    """
    num_queries, num_kv_heads = query.shape[0], keys.shape[0]
    grouped = (query.float() * params.scale).view(num_queries, num_kv_heads, -1, query.shape[-1])
    grouped = grouped.permute(1, 2, 0, 3)
    logits = torch.matmul(grouped.flatten(1, 2), keys).view(*grouped.shape[:3], -1)
    if params.softcap > 0:
        logits.div_(params.softcap).tanh_().mul_(params.softcap)
    return logits
