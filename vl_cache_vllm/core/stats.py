# SPDX-License-Identifier: Apache-2.0
"""Eviction counts of the scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vl_cache_vllm.core.later_evictions import Trigger


@dataclass
class Samples:
    """Measurements of one quantity, with their count and sum.

    A sum of two has no ``values``, so totals do not grow with the number of measurements.
    """

    count: int = 0
    total: float = 0.0
    values: list[float] = field(default_factory=list)

    def record(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.values.append(value)

    @property
    def mean(self) -> float:
        """Of at least one measurement."""
        return self.total / self.count

    def __add__(self, other: Samples) -> Samples:
        return Samples(self.count + other.count, self.total + other.total)


@dataclass(frozen=True)
class OrderedEviction:
    """An eviction of one request, as it is counted."""

    trigger: Trigger
    is_first: bool  # of the request
    kept_blocks: int
    blocks: int  # that the request held before
    freed_tokens: int


@dataclass
class EvictionStats:
    """Counts of decisions and evictions: of one step, of a log interval, or since start-up."""

    evicted: int = 0  # requests
    evictions: Counter[str] = field(default_factory=Counter)  # by trigger
    skipped: Counter[str] = field(default_factory=Counter)  # requests by reason
    freed_blocks: int = 0  # blocks that returned to the pool
    freed_tokens: int = 0  # mean over layers and KV heads
    retained: Samples = field(default_factory=Samples)  # kept blocks / blocks before
    observation_seconds: Samples = field(default_factory=Samples)  # of one prompt, all layers
    compaction_seconds: Samples = field(default_factory=Samples)
    layers_retained: dict[int, float] = field(default_factory=dict)
    """Sum over the compactions of tokens after / tokens before the eviction, by layer.

    With pipeline parallelism the layers of the last stage.
    """
    blocks_held: int = 0  # by evicted requests at the end of the period
    pressure: bool | None = None  # at the end of the period; None without --kv-compress-when

    def add_eviction(self, eviction: OrderedEviction) -> None:
        """Count an eviction that the workers were told to carry out."""
        self.evicted += eviction.is_first
        self.evictions[eviction.trigger.value] += 1
        self.retained.record(eviction.kept_blocks / eviction.blocks)
        self.freed_tokens += eviction.freed_tokens

    def add_reports(self, reports: Sequence[dict[str, Any]]) -> None:
        """Count evictions that a worker has done (`vl_cache_vllm.messages.EvictionReport`)."""
        for report in reports:
            self.observation_seconds.record(report["observation_seconds"])
            if report["compaction_seconds"] is not None:
                self.compaction_seconds.record(report["compaction_seconds"])
                self.layers_retained = _sums(self.layers_retained, report["layers_retained"])

    def __add__(self, later: EvictionStats) -> EvictionStats:
        """The counts of both periods; ``blocks_held`` and ``pressure`` are those of ``later``."""
        return EvictionStats(
            self.evicted + later.evicted,
            self.evictions + later.evictions,
            self.skipped + later.skipped,
            self.freed_blocks + later.freed_blocks,
            self.freed_tokens + later.freed_tokens,
            self.retained + later.retained,
            self.observation_seconds + later.observation_seconds,
            self.compaction_seconds + later.compaction_seconds,
            _sums(self.layers_retained, later.layers_retained),
            later.blocks_held,
            later.pressure,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as messages carry them."""
        samples = {name: vars(getattr(self, name)) for name in _SAMPLES}
        counters = {name: dict(getattr(self, name)) for name in _COUNTERS}
        return {**vars(self), **counters, **samples}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvictionStats:
        """The counts of `to_dict`."""
        samples = {name: Samples(**values[name]) for name in _SAMPLES}
        counters = {name: Counter(values[name]) for name in _COUNTERS}
        return cls(**{**values, **counters, **samples})


_COUNTERS = ("evictions", "skipped")
_SAMPLES = ("retained", "observation_seconds", "compaction_seconds")


def _sums(values: Mapping[int, float], others: Mapping[int, float]) -> dict[int, float]:
    """Sums by key."""
    return {key: values.get(key, 0.0) + others.get(key, 0.0) for key in {**values, **others}}
