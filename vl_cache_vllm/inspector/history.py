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
class Held:
    """What the cache of a request held after one of its evictions.

    Counts are tokens of one KV head, means over all layers and KV heads.
    """

    number: int  # of the eviction, from 1
    tokens: int  # prompt and generated tokens when it happened
    blocks: int  # held before
    kept_blocks: int  # that replace them, without the block of the tail
    visual: float
    text: float  # of the prompt
    generated: float

    @property
    def all_tokens(self) -> float:
        """Tokens of one KV head."""
        return self.visual + self.text + self.generated


def history(records: Sequence[Mapping[str, Any]], prompt_tokens: int) -> tuple[Held, ...]:
    """The evictions of a request from its first to the last one before a preemption.

    Args:
        records: what all workers of an engine wrote for the request, with kept positions.
        prompt_tokens: of its prompt.
    """
    workers: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for record in records:
        own = workers.setdefault((record["layers"][0], record["rank"]), [])
        if record["eviction"] == len(own) + 1:  # otherwise it was preempted and started over
            own.append(record)
    first = next(iter(workers.values()))[0]
    kinds = np.full(first["tokens"], 1)
    for begin, end in first["visual"]:
        kinds[begin:end] = 0
    kinds[prompt_tokens:] = 2
    counts = [_counts(own, kinds) for own in workers.values()]
    result = []
    blocks = first["blocks"]
    for number, steps in enumerate(zip(*counts, strict=True)):
        record = next(iter(workers.values()))[number]
        visual, text, generated = np.concatenate(steps).mean(0).tolist()
        if number:
            before = next(iter(workers.values()))[number - 1]
            since = record["tokens"] - before["evicted_tokens"]
            blocks = before["kept_blocks"] - (-since // record["block_size"])
        result.append(
            Held(
                record["eviction"],
                record["tokens"],
                blocks,
                record["kept_blocks"],
                visual,
                text,
                generated,
            )
        )
    return tuple(result)


def _counts(records: Sequence[Mapping[str, Any]], kinds: np.ndarray) -> list[np.ndarray]:
    """For each eviction, tokens of each kind that each KV head of a worker holds, ``[heads, 3]``.

    Args:
        records: of one worker, in their order.
        kinds: 0, 1 or 2 for each position of the first eviction; later ones are generated, 2.
    """
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
        result.append(np.array([_by_kind(own, kinds) for own in positions]))
    return result


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
            f"{held.number:8d}  {held.tokens:6d}  {blocks:>8}  {held.all_tokens:16.0f}"
            f"  {held.visual:6.0f}  {held.text:4.0f}  {held.generated:9.0f}"
        )
    return "\n".join(lines)
