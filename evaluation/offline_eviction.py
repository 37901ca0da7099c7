# SPDX-License-Identifier: Apache-2.0
"""Evictions of an offline model's cache, with the operations of the product."""

import torch
from torch import Tensor

from evaluation.offline import Cache, OfflineModel, PrefilledPrompt
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import plan_eviction, whole_blocks
from vl_cache_vllm.core.later_evictions import AnswerBound
from vl_cache_vllm.policy import Prompt
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.selection import Division, EvictionInput, Selection, select_kept
from vl_cache_vllm.worker.source import EvictionSource


def evict(
    prompt: PrefilledPrompt, config: KVCompressConfig, block_size: int
) -> list[Tensor] | None:
    """Positions that each layer keeps, [KV heads, kept]; None if no block would be freed.

    Raises:
        ValueError: for a policy whose observation window includes the pages, because their queries
            are not recorded.
    """
    policy, tokens, num_layers = config.policy, prompt.tokens, len(prompt.cache)
    asked = prompt.asked
    plan = plan_eviction(config, block_size, asked, prompt.pages)
    if not plan.kept_blocks:
        return None
    start = policy.observation_start(prompt.pages, asked)
    if start < prompt.pages:
        raise ValueError(f"{policy.name}: the observation window must not include the pages")
    observed = AttentionStats(config, num_layers, _kv_heads(prompt.cache), asked, _CPU)
    scale = prompt.cache[0][0].shape[-1] ** -0.5
    ranges = [(start, asked)]
    if prompt.generated:
        ranges.append((tokens - 1, tokens))
    for first, end in ranges:
        if end > observed.tokens:
            observed.extend(end)
        for i, ((keys, _), queries) in enumerate(zip(prompt.cache, prompt.queries, strict=True)):
            seen = queries[first - prompt.pages : end - prompt.pages]
            observed.add(i, seen, keys, first, scale, 0.0)
    selected = select_kept(
        EvictionInput(
            config,
            observed,
            observed.dense_entries,
            Prompt(tokens, prompt.visual, prompt.grids),
            prompt.queries[0].shape[1],
            sum(end - first for first, end in ranges),
            plan.kept_blocks,
            EvictionSource.of_prompt(tokens, num_layers, block_size),
            max(0, prompt.generated - 1),
        )
    )
    return _with_tails(*selected, prompt.cache, tokens % block_size, block_size)


def kept(cache: Cache, positions: list[Tensor]) -> Cache:
    """The cache of these positions of each layer only."""
    return [
        tuple(t.gather(1, p[..., None].expand(-1, -1, t.shape[-1])) for t in layer)
        for layer, p in zip(cache, positions, strict=True)
    ]


@torch.no_grad()
def decode(
    model: OfflineModel,
    prompt: PrefilledPrompt,
    config: KVCompressConfig,
    block_size: int,
    later_queries: int = 1,
) -> Tensor | None:
    """Which expected tokens are decoded if the prompt is evicted, and again as ``every`` says.

    Decoding is teacher-forced.

    Args:
        model: that read the prompt.
        prompt: the prompt, or its beginning of an answer.
        config: the settings.
        block_size: tokens per block.
        later_queries: most queries that a later eviction observes, the last ones since the eviction
            before. The product observes one.

    Returns:
        bool ``[expected tokens]``; None if no block of the prompt would be freed.
    """
    positions = evict(prompt, config, block_size)
    if positions is None:
        return None
    cache, tokens = kept(prompt.cache, positions), prompt.tokens
    if config.every is None:
        return model.correct(prompt, cache)
    plan = plan_eviction(config, block_size, prompt.asked, prompt.pages)
    bound = AnswerBound.of(config, plan, prompt.asked, block_size)
    assert bound is not None, "a prompt that is evicted has a bound"
    output = [torch.tensor([prompt.first])]
    evicted, fed = whole_blocks(tokens, block_size), prompt.expected[:-1]
    while fed:
        # The step of an eviction has one token more than it takes.
        count = evicted + bound.growth * block_size + 1 - tokens
        chunk, fed = fed[:count], fed[count:]
        hidden, cache, queries = model.run(model.embed(chunk), cache, tokens)
        output.append(model.next_tokens(hidden))
        tokens += len(chunk)
        if fed:
            evicted = whole_blocks(tokens - 1, block_size)
            last = [of_layer[-later_queries:] for of_layer in queries]
            tail = tokens - evicted
            cache = _evict_again(cache, last, config, bound.kept_blocks, tail, block_size)
    return torch.cat(output) == torch.tensor(prompt.expected)


def _evict_again(
    cache: Cache,
    queries: list[Tensor],
    config: KVCompressConfig,
    kept_blocks: int,
    tail: int,
    block_size: int,
) -> Cache:
    """The cache after a later eviction.

    Args:
        cache: whose layers have different lengths, all with the same tail.
        queries: the observed ones of each layer, ``[queries, heads, head size]``.
        config: the settings.
        kept_blocks: M.
        tail: tokens after the last whole block that is replaced.
        block_size: tokens per block.
    """
    lengths = torch.tensor([keys.shape[1] for keys, _ in cache])
    pages = (lengths - tail) // block_size
    nowhere = torch.zeros(len(cache), int(pages.max()), dtype=torch.int32)
    source = EvictionSource(
        nowhere, pages, int(pages.max()), int(pages.sum()), tail, block_size, is_first=False
    )
    observed = AttentionStats(config, len(cache), _kv_heads(cache), source.max_tokens, _CPU)
    num_queries, num_heads, head_size = queries[0].shape
    for i, (keys, _) in enumerate(cache):
        first = source.max_tokens - num_queries
        observed.add(i, queries[i], keys, first, head_size**-0.5, 0.0, lengths[i])
    selected = select_kept(
        EvictionInput(
            config,
            observed,
            observed.dense_entries,
            Prompt(source.max_tokens, lengths=source.cached_tokens),
            num_heads,
            num_queries,
            kept_blocks,
            source,
        )
    )
    return kept(cache, _with_tails(*selected, cache, tail, block_size))


def _with_tails(
    division: Division, selection: Selection, cache: Cache, tail: int, block_size: int
) -> list[Tensor]:
    """The selected cache indices of each layer and those of its tail, [KV heads, kept]."""
    sizes = (division.kept_pages * block_size).tolist()
    result = []
    for row, size, (keys, _) in zip(selection.positions, sizes, cache, strict=True):
        length = keys.shape[1]
        end = torch.arange(length - tail, length).expand(row.shape[0], -1)
        result.append(torch.cat((row[:, :size], end), 1))
    return result


def _kv_heads(cache: Cache) -> int:
    return cache[0][0].shape[0]


_CPU = torch.device("cpu")
