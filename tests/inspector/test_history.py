# SPDX-License-Identifier: Apache-2.0
"""Evictions after the first one, in terms of the prompt."""

import numpy as np
import pytest

from tests.helpers.made_up import BLOCK, record
from vl_cache_vllm.inspector.history import Held, history, table


def again(before: dict, tokens: int, kept_pages: list[int], seed: int) -> dict:
    """The trace line of a later eviction."""
    rng = np.random.default_rng(seed)
    evicted = tokens // BLOCK * BLOCK
    since = evicted - before["evicted_tokens"]
    sizes = [kept + since for kept in before["kept_tokens"]]
    kept = [BLOCK * pages for pages in kept_pages]
    return before | {
        "eviction": before["eviction"] + 1,
        "tokens": tokens,
        "evicted_tokens": evicted,
        "kept_tokens": kept,
        "visual": [],
        "kept_positions": [
            [
                sorted(rng.permutation(size)[:count].tolist())
                for _ in before["kept_positions"][layer]
            ]
            for layer, (size, count) in enumerate(zip(sizes, kept, strict=True))
        ],
    }


def replayed(records: list[dict], prompt_tokens: int) -> list[tuple[float, float, float]]:
    """The same, with a list of positions for each head that shrinks and grows."""
    visual = {p for first, end in records[0]["visual"] for p in range(first, end)}
    caches = [[[] for _ in layer] for layer in records[0]["kept_positions"]]
    end, result = 0, []
    for line in records:
        counts = []
        for layer, heads in enumerate(line["kept_positions"]):
            for head, kept in enumerate(heads):
                cache = caches[layer][head] + list(range(end, line["evicted_tokens"]))
                caches[layer][head] = [cache[index] for index in kept]
                own = caches[layer][head] + list(range(line["evicted_tokens"], line["tokens"]))
                seen = sum(p in visual for p in own)
                made = sum(p >= prompt_tokens for p in own)
                counts.append((seen, len(own) - seen - made, made))
        end = line["evicted_tokens"]
        result.append(tuple(np.mean(counts, axis=0).tolist()))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_replay(seed: int) -> None:
    first = record(seed=seed)
    second = again(first, 26 + 21, [3, 1, 2], seed)
    third = again(second, 26 + 40, [1, 1, 4], seed + 1)
    found = history([first, second, third], 26)
    for held, expected in zip(found, replayed([first, second, third], 26), strict=True):
        assert (held.visual, held.text, held.generated) == pytest.approx(expected)
        mean = np.mean(first["kept_tokens"]) if held.number == 1 else 8
        assert held.all_tokens == pytest.approx(mean + held.tokens % BLOCK)
    assert [held.number for held in found] == [1, 2, 3]
    assert [held.tokens for held in found] == [26, 47, 66]
    # 2 kept blocks, and 23 tokens since 24; then 22 since 44.
    assert [held.blocks for held in found] == [7, 2 + 6, 2 + 6]


def test_workers_are_joined_and_a_new_start_ends_the_history() -> None:
    lines = [record(), again(record(), 47, [3, 1, 2], 0)]
    parts = [
        line | {"rank": rank, "kept_positions": [[layer[rank]] for layer in line["kept_positions"]]}
        for line in lines
        for rank in (1, 0)
    ]
    whole = history(lines, 26)
    assert history(parts, 26) == whole
    assert history([*parts, *parts], 26) == whole


def test_table() -> None:
    text = table([Held(1, 1104, 35, 4, 96.4, 20, 0), Held(2, 1360, 12, 5, 70, 18, 72)])
    assert text.splitlines() == [
        "eviction  tokens    blocks  kept per KV head  visual  text  generated",
        "       1    1104   35 -> 4               116      96    20          0",
        "       2    1360   12 -> 5               160      70    18         72",
    ]
