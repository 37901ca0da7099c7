# SPDX-License-Identifier: Apache-2.0
"""All evictions of a request in their order, from the trace file. Needs neither vLLM nor plots.

After the first eviction a trace counts tokens by their place in a layer's cache. Here they become
positions again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class HeldByLayer:
    """What one layer held before and after an eviction, in tokens of one KV head.

    The counts of a kind are means over the layer's KV heads, and their sum is what it kept.
    """

    layer: int  # its index in the model
    before: int  # tokens
    visual: float
    text: float  # of the prompt
    generated: float
    density: float

    @property
    def kept(self) -> float:
        """Tokens, with the tail."""
        return self.visual + self.text + self.generated


@dataclass(frozen=True)
class Held:
    """What the cache of a request held after one of its evictions."""

    number: int  # of the eviction, from 1
    tokens: int  # prompt and generated tokens when it happened
    blocks: int  # held before
    kept_blocks: int  # that replace them, without the block of the tail
    layers: tuple[HeldByLayer, ...]

    def mean(self, name: str) -> float:
        """Mean of an attribute of `HeldByLayer` over the layers."""
        return sum(getattr(layer, name) for layer in self.layers) / len(self.layers)


def history(records: Sequence[Mapping[str, Any]], prompt_tokens: int) -> tuple[Held, ...]:
    """The evictions of a request from its first to the last one before a preemption.

    Args:
        records: what all workers of an engine wrote for the request, with kept positions.
        prompt_tokens: of its prompt.
    """
    ranks: dict[int, dict[int, list[Mapping[str, Any]]]] = {}  # by stage
    for record in records:
        own = ranks.setdefault(record["layers"][0], {}).setdefault(record["rank"], [])
        if record["eviction"] == len(own) + 1:  # otherwise it was preempted and started over
            own.append(record)
    stages = [list(ranks[first_layer].values()) for first_layer in sorted(ranks)]
    steps = stages[0][0]
    kinds = np.full(steps[0]["tokens"], 1)
    for begin, end in steps[0]["visual"]:
        kinds[begin:end] = 0
    kinds[prompt_tokens:] = 2
    counts = [np.mean([_counts(own, kinds) for own in workers], axis=0) for workers in stages]
    result = []
    for number, record in enumerate(steps):
        blocks = record["blocks"]
        if number:
            before = steps[number - 1]
            since = record["tokens"] - before["evicted_tokens"]
            blocks = before["kept_blocks"] - (-since // record["block_size"])
        layers: list[HeldByLayer] = []
        for workers, own in zip(stages, counts, strict=True):
            one = workers[0][number]
            values = one["layers"], one["cached_tokens"], *own[number].T.tolist(), one["density"]
            layers += map(HeldByLayer, *values)
        result.append(
            Held(number + 1, record["tokens"], blocks, record["kept_blocks"], tuple(layers))
        )
    return tuple(result)


def _counts(records: Sequence[Mapping[str, Any]], kinds: np.ndarray) -> np.ndarray:
    """Tokens of each kind that the layers of a worker hold, ``[evictions, layers, 3]``.

    They are means over the worker's KV heads.

    Args:
        records: of one worker, in their order.
        kinds: 0, 1 or 2 for each position of the first eviction; later ones are generated, 2.
    """
    num_layers = len(records[0]["layers"])
    held: list[np.ndarray] = []  # positions of each head, without what came after the eviction
    end = 0  # the first of those
    result = []
    for record in records:
        heads = [head for layer in record["kept_positions"] for head in layer]
        evicted = record["evicted_tokens"]
        held = held or [np.arange(0)] * len(heads)
        caches = [np.concatenate((own, np.arange(end, evicted))) for own in held]
        held = [cache[kept] for cache, kept in zip(caches, heads, strict=True)]
        end = evicted
        positions = [np.concatenate((own, np.arange(end, record["tokens"]))) for own in held]
        result.append(np.reshape([_by_kind(own, kinds) for own in positions], (num_layers, -1, 3)))
    return np.stack(result).mean(2)


def _by_kind(positions: np.ndarray, kinds: np.ndarray) -> list[int]:
    known = positions[positions < len(kinds)]
    counts = np.bincount(kinds[known], minlength=3)
    counts[2] += len(positions) - len(known)
    return counts.tolist()


def table(evictions: Sequence[Held]) -> str:
    """The evictions as lines of text."""
    lines = ["eviction  tokens    blocks  kept per KV head  visual  text  generated"]
    for held in evictions:
        blocks = f"{held.blocks} -> {held.kept_blocks}"
        lines.append(
            f"{held.number:8d}  {held.tokens:6d}  {blocks:>8}  {held.mean('kept'):16.0f}"
            f"  {held.mean('visual'):6.0f}  {held.mean('text'):4.0f}"
            f"  {held.mean('generated'):9.0f}"
        )
    return "\n".join(lines)
