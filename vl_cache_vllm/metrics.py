# SPDX-License-Identifier: Apache-2.0
"""Eviction in ``/metrics`` and in the server's log, beside vLLM's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vl_cache_vllm.core.stats import EvictionStats
from vl_cache_vllm.messages import take_stats

logger = init_logger("vllm.vl_cache.metrics")

SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class KVCompressStatLogger(AggregateStatLoggerBase):
    """Takes our counts out of a step's statistics; the first of an engine's stat loggers.

    Args:
        vllm_config: of an engine with eviction.
        engine_indexes: of the engines behind this front end.
        log_lines: whether this front end sees everything, so that its log lines are true.
    """

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: Sequence[int], log_lines: bool = True
    ) -> None:
        self._log_lines = log_lines
        self._intervals = {i: Interval() for i in engine_indexes}
        names = ["model_name", "engine"]
        model_name = vllm_config.model_config.served_model_name
        self._labels = {i: (model_name, str(i)) for i in engine_indexes}

        def counter(name: str, text: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(f"vllm:kv_compress_{name}", text, [*names, *labels])

        def gauge(name: str, text: str, *labels: str) -> prometheus_client.Gauge:
            return prometheus_client.Gauge(
                f"vllm:kv_compress_{name}",
                text,
                [*names, *labels],
                multiprocess_mode="mostrecent",
            )

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return prometheus_client.Histogram(
                f"vllm:kv_compress_{name}", text, names, buckets=buckets
            )

        self._evicted = counter("evicted_requests", "Prefills decided to end with an eviction.")
        self._skipped = counter(
            "skipped_requests",
            "Prefills decided to end with their whole cache, by reason.",
            "reason",
        )
        self._freed_blocks = counter(
            "freed_blocks", "Prompt blocks that evictions returned to the pool."
        )
        self._freed_tokens = counter(
            "freed_tokens", "Prompt tokens evicted: mean over layers and KV heads."
        )
        self._retained = histogram(
            "retained_share", "Kept share of an evicted prompt's KV cache blocks.", SHARES
        )
        self._observation = histogram(
            "observation_seconds",
            "Time to observe a prompt's attention, all layers.",
            SECONDS,
        )
        self._compaction = histogram(
            "compaction_seconds", "Time to choose and move a prompt's kept tokens.", SECONDS
        )
        self._blocks_held = gauge("blocks_held", "KV cache blocks that evicted requests hold.")
        self._pressure = gauge(
            "pressure", "1 while blocks are scarce and prompts are evicted (--kv-compress-when)."
        )
        self._layer = gauge(
            "layer_retained_share",
            "Kept tokens / prompt tokens of a layer, mean over the latest evictions.",
            "layer",
        )
        for labels in self._labels.values():  # visible from the start, at zero
            for metric in (self._evicted, self._freed_blocks, self._freed_tokens):
                metric.labels(*labels)
            for metric in (self._retained, self._observation, self._compaction):
                metric.labels(*labels)
            self._blocks_held.labels(*labels).set(0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        values = take_stats(scheduler_stats) if scheduler_stats is not None else None
        if values is None:
            return
        stats = EvictionStats.from_dict(values)
        labels = self._labels[engine_idx]
        self._evicted.labels(*labels).inc(stats.evicted)
        for reason, count in stats.skipped.items():
            self._skipped.labels(*labels, reason).inc(count)
        self._freed_blocks.labels(*labels).inc(stats.freed_blocks)
        self._freed_tokens.labels(*labels).inc(stats.freed_tokens)
        for metric, observed in (
            (self._retained, stats.retained),
            (self._observation, stats.observation_seconds),
            (self._compaction, stats.compaction_seconds),
        ):
            for value in observed:
                metric.labels(*labels).observe(value)
        self._blocks_held.labels(*labels).set(stats.blocks_held)
        if stats.pressure is not None:
            self._pressure.labels(*labels).set(stats.pressure)
        for layer in stats.layers_retained[0] if stats.layers_retained else ():
            shares = [retained[layer] for retained in stats.layers_retained]
            self._layer.labels(*labels, layer).set(sum(shares) / len(shares))
        self._intervals[engine_idx].add(stats)

    def log(self) -> None:
        """One line for each engine that decided anything since the last."""
        for index, interval in self._intervals.items():
            if self._log_lines and (interval.evicted or interval.skipped):
                logger.info("Engine %03d: %s", index, interval)
            self._intervals[index] = Interval()

    def log_engine_initialized(self) -> None:
        pass


@dataclass
class Interval:
    """Between two log lines: sums only, since not every front end logs."""

    evicted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    retained: float = 0.0
    freed_blocks: int = 0
    freed_tokens: int = 0
    layers: Counter[int] = field(default_factory=Counter)  # sums of their retained shares
    observations: int = 0
    compactions: int = 0
    observation_seconds: float = 0.0
    compaction_seconds: float = 0.0
    blocks_held: int = 0
    pressure: bool | None = None

    def add(self, stats: EvictionStats) -> None:
        self.evicted += stats.evicted
        self.skipped += stats.skipped
        self.retained += sum(stats.retained)
        self.freed_blocks += stats.freed_blocks
        self.freed_tokens += stats.freed_tokens
        for layers in stats.layers_retained:
            self.layers.update(layers)  # adds
        self.observations += len(stats.observation_seconds)
        self.compactions += len(stats.compaction_seconds)
        self.observation_seconds += sum(stats.observation_seconds)
        self.compaction_seconds += sum(stats.compaction_seconds)
        self.blocks_held = stats.blocks_held
        self.pressure = stats.pressure

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common())
        parts = [f"KV compression: evicted {self.evicted} reqs"]
        parts.append(f"left alone {self.skipped.total()}" + (f" ({skipped})" if skipped else ""))
        if self.evicted:
            parts.append(f"retained {100 * self.retained / self.evicted:.1f}%")
            parts.append(f"freed {self.freed_blocks} blocks and {self.freed_tokens} tokens")
        if self.layers:
            least, most = min(self.layers.values()), max(self.layers.values())
            shares = (f"{100 * share / self.compactions:.1f}" for share in (least, most))
            parts.append(f"layers {' to '.join(shares)}%")
        if self.observations:
            parts.append(
                f"observation {1000 * self.observation_seconds / self.observations:.1f} ms"
            )
        if self.compactions:
            parts.append(f"compaction {1000 * self.compaction_seconds / self.compactions:.1f} ms")
        parts.append(f"blocks held {self.blocks_held}")
        if self.pressure is not None:
            parts.append(f"pressure {'on' if self.pressure else 'off'}")
        return ", ".join(parts)
