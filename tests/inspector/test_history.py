# SPDX-License-Identifier: Apache-2.0
"""Evictions after the first one, in terms of the prompt."""

import numpy as np
import pytest

from tests.helpers.made_up import record, record_again
from vl_cache_vllm.inspector.history import Held, HeldByLayer, history, table


def replayed(records: list[dict], prompt_tokens: int) -> list[list[tuple[float, float, float]]]:
    """The same, with a list of positions for each head that shrinks and grows."""
    visual = {p for first, end in records[0]["visual"] for p in range(first, end)}
    caches = [[[] for _ in layer] for layer in records[0]["kept_positions"]]
    end, result = 0, []
    for line in records:
        by_layer = []
        for layer, heads in enumerate(line["kept_positions"]):
            counts = []
            for head, kept in enumerate(heads):
                cache = caches[layer][head] + list(range(end, line["evicted_tokens"]))
                caches[layer][head] = [cache[index] for index in kept]
                own = caches[layer][head] + list(range(line["evicted_tokens"], line["tokens"]))
                seen = sum(p in visual for p in own)
                made = sum(p >= prompt_tokens for p in own)
                counts.append((seen, len(own) - seen - made, made))
            by_layer.append(tuple(np.mean(counts, axis=0).tolist()))
        end = line["evicted_tokens"]
        result.append(by_layer)
    return result


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_replay(seed: int) -> None:
    first = record(seed=seed)
    second = record_again(first, 26 + 21, [3, 1, 2], seed)
    third = record_again(second, 26 + 40, [1, 1, 4], seed + 1)
    lines = [first, second, third]
    found = history(lines, 26)
    for line, held, expected in zip(lines, found, replayed(lines, 26), strict=True):
        shown = [(layer.visual, layer.text, layer.generated) for layer in held.layers]
        assert shown == [pytest.approx(of_layer) for of_layer in expected]
        for name in ("visual", "text", "generated"):
            one = np.mean([getattr(layer, name) for layer in held.layers])
            assert held.mean(name) == pytest.approx(one)
        tail = line["tokens"] - line["evicted_tokens"]
        kept = [tokens + tail for tokens in line["kept_tokens"]]
        assert [layer.kept for layer in held.layers] == pytest.approx(kept)
        assert [layer.before for layer in held.layers] == line["cached_tokens"]
        assert [layer.density for layer in held.layers] == line["density"]
    assert [held.number for held in found] == [1, 2, 3]
    assert [held.tokens for held in found] == [26, 47, 66]
    # 2 kept blocks, and 23 tokens since 24; then 22 since 44.
    assert [held.blocks for held in found] == [7, 2 + 6, 2 + 6]


def test_workers_are_joined_and_a_new_start_ends_the_history() -> None:
    """Of two tensor-parallel ranks and two stages; the second stage writes first."""
    lines = [record(), record_again(record(), 47, [3, 1, 2], 0)]
    by_layer = ("layers", "cached_tokens", "density", "kept_tokens")
    parts = [
        line
        | {name: line[name][stage] for name in by_layer}
        | {"rank": rank, "kept_positions": [[own[rank]] for own in line["kept_positions"][stage]]}
        for line in lines
        for stage in (slice(2, None), slice(2))
        for rank in (1, 0)
    ]
    whole = history(lines, 26)
    assert history(parts, 26) == whole
    assert history([*parts, *parts], 26) == whole


def test_table() -> None:
    layers = [
        (HeldByLayer(0, 1104, 95, 21, 0, 0.1), HeldByLayer(1, 1104, 97.8, 19, 0, 0.1)),
        (HeldByLayer(0, 372, 70, 18, 72, 0.1),),
    ]
    text = table([Held(1, 1104, 35, 4, layers[0]), Held(2, 1360, 12, 5, layers[1])])
    assert text.splitlines() == [
        "eviction  tokens    blocks  kept per KV head  visual  text  generated",
        "       1    1104   35 -> 4               116      96    20          0",
        "       2    1360   12 -> 5               160      70    18         72",
    ]
