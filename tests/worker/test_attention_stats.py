# SPDX-License-Identifier: Apache-2.0
"""What is collected of a prompt's queries does not depend on how its prefill was split."""

import pytest
import torch

from tests.helpers.pools import pool_of_keys
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.observe import AttentionParams, elite_queries, observe
from vl_cache_vllm.ops.page_pool import PagedKeys
from vl_cache_vllm.policy.diversity import key_similarity
from vl_cache_vllm.policy.experimental import ExperimentalOptions
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.attention_stats import AttentionStats

TOKENS, FIRST, LAYERS, KV_HEADS = 40, 28, 2, 2
PLAIN = KVCompressConfig()
ELITE = KVCompressConfig(
    policy=VLCachePolicy(max_observation_tokens=64),
    experimental=ExperimentalOptions(elite_window=0.5),
)
PLUS = KVCompressConfig.from_dict({"policy": "vlcache-plus"})
DIVERSE = KVCompressConfig(experimental=ExperimentalOptions(diversity=0.5))


def collect(config: KVCompressConfig, chunks: list[int]) -> AttentionStats:
    """Layers take turns, chunk by chunk, through one buffer of queries as a runner has it."""
    torch.manual_seed(0)
    queries = torch.randn(LAYERS, TOKENS - FIRST, 4, 8)
    keys = torch.randn(LAYERS, KV_HEADS, TOKENS + 5, 8)  # pages hold more than the prompt
    pool, row = pool_of_keys(keys, block_size=5)
    observed = AttentionStats(config, LAYERS, KV_HEADS, TOKENS, torch.device("cpu"))
    buffer = torch.zeros(TOKENS, 4, 8)
    begin = 0
    for size in chunks:
        for layer in range(LAYERS):
            buffer[:size] = queries[layer, begin : begin + size]
            first = FIRST + begin
            observed.add(
                layer, buffer[:size], PagedKeys.of_blocks(pool, layer, row), first, 0.3, 0.0
            )
        begin += size
    return observed


@pytest.mark.parametrize(
    "config", [PLAIN, PLUS, ELITE, DIVERSE], ids=["plain", "plus", "elite", "diverse"]
)
@pytest.mark.parametrize("chunks", [[4, 8], [1] * 12, [11, 1]])
def test_chunks_do_not_matter(config: KVCompressConfig, chunks: list[int]) -> None:
    whole, parts = collect(config, [12]), collect(config, chunks)
    torch.testing.assert_close(parts.attention.sums, whole.attention.sums)
    assert (parts.attention.maxima is not None) is (config is PLUS)
    if whole.attention.maxima is not None:
        torch.testing.assert_close(parts.attention.maxima, whole.attention.maxima)
    assert torch.equal(parts.dense_entries, whole.dense_entries)
    if config.experimental.diversity:
        assert parts.similarity is not None and whole.similarity is not None
        assert torch.equal(parts.similarity, whole.similarity)
    else:
        assert parts.similarity is whole.similarity is None


@pytest.mark.parametrize("chunks", [[12], [4, 8], [11, 1]])
def test_sums_of_the_last_query_and_maxima_of_all(chunks: list[int]) -> None:
    observed = collect(PLUS, chunks)
    torch.manual_seed(0)
    queries, keys = torch.randn(LAYERS, 12, 4, 8), torch.randn(LAYERS, KV_HEADS, TOKENS + 5, 8)
    for layer in range(LAYERS):
        position = torch.arange(FIRST, TOKENS)[:, None]
        future = torch.arange(TOKENS) > position
        key = keys[layer, :, :TOKENS].repeat_interleave(4 // KV_HEADS, 0)
        logits = 0.3 * queries[layer].transpose(0, 1) @ key.transpose(1, 2)
        attention = logits.masked_fill(future, -torch.inf).softmax(-1)  # [heads, queries, keys]
        grouped = attention.view(KV_HEADS, -1, 12, TOKENS)
        torch.testing.assert_close(observed.attention.sums[layer], grouped[:, :, -1].sum(1))
        assert observed.attention.maxima is not None
        torch.testing.assert_close(observed.attention.maxima[layer], grouped.amax((1, 2)))


@pytest.mark.parametrize("config", [PLAIN, PLUS], ids=["plain", "plus"])
def test_a_later_query_counts_as_well(config: KVCompressConfig) -> None:
    """Of a request that is evicted after some tokens of its answer, here seven."""
    prompt, observed = collect(config, [12]), collect(config, [12])
    keys = torch.randn(LAYERS, KV_HEADS, TOKENS + 7, 8)
    query, only = torch.randn(LAYERS, 1, 4, 8), torch.zeros(KV_HEADS, TOKENS + 7)
    observed.extend(TOKENS + 7)
    for layer in range(LAYERS):
        dense = torch.zeros((), dtype=torch.int64)
        params = AttentionParams(scale=0.3, softcap=0.0, threshold=0.01)
        most = torch.zeros_like(only) if config is PLUS else None
        observe(query[layer], keys[layer], TOKENS + 6, params, only.zero_(), dense, None, most)
        observed.add(layer, query[layer], keys[layer], TOKENS + 6, 0.3, 0.0)
        before = torch.nn.functional.pad(prompt.attention.sums[layer], (0, 7))
        expected = only if config is PLUS else before + only  # the sums are the last query's
        torch.testing.assert_close(observed.attention.sums[layer], expected)
        assert observed.dense_entries[layer] == prompt.dense_entries[layer] + dense
        if most is not None:
            assert observed.attention.maxima is not None and prompt.attention.maxima is not None
            before = torch.nn.functional.pad(prompt.attention.maxima[layer], (0, 7))
            torch.testing.assert_close(observed.attention.maxima[layer], before.maximum(most))


def test_elite_queries_score_alone() -> None:
    elite, plain = collect(ELITE, [12]), collect(PLAIN, [12])
    assert torch.equal(elite.dense_entries, plain.dense_entries)
    assert not torch.equal(elite.attention.sums, plain.attention.sums)
    torch.manual_seed(0)
    queries, keys = torch.randn(LAYERS, 12, 4, 8), torch.randn(LAYERS, KV_HEADS, TOKENS + 5, 8)
    params = AttentionParams(scale=0.3, softcap=0.0, threshold=0.01)
    for layer in range(LAYERS):
        weights = elite_queries(queries[layer], keys[layer], FIRST, params, 0.5)
        assert 0 < int(weights.sum()) < weights.numel()
        expected, dense = torch.zeros(KV_HEADS, TOKENS), torch.zeros((), dtype=torch.int64)
        observe(queries[layer], keys[layer], FIRST, params, expected, dense, weights)
        torch.testing.assert_close(elite.attention.sums[layer], expected)


def test_similarity_is_of_the_prompt_alone() -> None:
    observed = collect(DIVERSE, [12])
    torch.manual_seed(0)
    torch.randn(LAYERS, 12, 4, 8)
    keys = torch.randn(LAYERS, KV_HEADS, TOKENS + 5, 8)
    for layer in range(LAYERS):
        assert observed.similarity is not None
        expected = key_similarity(keys[layer, :, :TOKENS])
        torch.testing.assert_close(observed.similarity[layer], expected)
