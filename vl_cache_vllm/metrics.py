# SPDX-License-Identifier: Apache-2.0
"""Eviction metrics in ``/metrics`` and in the server's log, alongside vLLM's (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import prometheus_client
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from vl_cache_vllm import deprecated
from vl_cache_vllm.core.later_evictions import Trigger
from vl_cache_vllm.core.stats import EvictionStats
from vl_cache_vllm.messages import take_stats

logger = init_logger("vllm.vl_cache.metrics")

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class KVCompressStatLogger(AggregateStatLoggerBase):
    """Exports and logs the counts in a step's statistics; the first of an engine's stat loggers.

    It removes the counts from the statistics, because vLLM's own loggers would mistake them for
    those of a KV connector.

    Args:
        vllm_config: of an engine with eviction.
        engine_indexes: of the engines behind this front end.
        log_lines: whether this front end sees all requests, so that its log lines are complete.
    """

    def __init__(
        self, vllm_config: VllmConfig, engine_indexes: Sequence[int], log_lines: bool = True
    ) -> None:
        self._log_lines = log_lines
        self._intervals = {i: EvictionStats() for i in engine_indexes}
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

        # As vLLM does with its own: old names only with --show-hidden-metrics-for-version.
        show_hidden = vllm_config.observability_config.show_hidden_metrics
        old_names = {new: old for old, new in deprecated.METRICS.items() if show_hidden}

        def with_old_name(make: Callable[..., Any], name: str, text: str, *others: Any) -> list:
            """A renamed metric, and again under its old name if that is to be shown."""
            metrics = [make(name, text, *others)]
            if name in old_names:
                metrics.append(make(old_names[name], f"Deprecated: use {name}. {text}", *others))
            return metrics

        def histogram(
            name: str, text: str, buckets: Sequence[float]
        ) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(
                f"vllm:kv_compress_{name}", text, names, buckets=buckets
            )

        self._evicted = counter(
            "evicted_requests",
            "Requests that the scheduler decided to evict; again after a preemption.",
        )
        self._evictions = counter(
            "evictions",
            "Evictions by trigger: the end of a prefill, blocks that are scarce while a request "
            "runs (pressure), or the tokens that it has generated (every).",
            "trigger",
        )
        self._skipped = counter(
            "skipped_requests",
            "Prompts that the scheduler decided not to evict, by reason.",
            "reason",
        )
        self._freed_blocks = counter(
            "freed_blocks", "Blocks that evictions returned to the block pool."
        )
        self._freed_tokens = counter(
            "freed_tokens", "Evicted tokens, mean over layers and KV heads."
        )
        self._retained = with_old_name(
            histogram,
            "retained_ratio",
            "Kept blocks / blocks that a request held before its eviction.",
            RATIOS,
        )
        self._observation = histogram(
            "observation_seconds",
            "Device time to accumulate the attention of a prompt's observed queries, all layers.",
            SECONDS,
        )
        self._compaction = histogram(
            "compaction_seconds",
            "Device time to select and move the kept tokens of a prompt, all layers.",
            SECONDS,
        )
        self._blocks_held = gauge("blocks_held", "KV cache blocks that evicted requests hold.")
        self._pressure = gauge(
            "pressure", "1 while blocks are scarce and prompts are evicted (--kv-compress-when)."
        )
        self._layer = with_old_name(
            gauge,
            "layer_retained_ratio",
            "Tokens of a layer after / before an eviction, mean over the latest evictions.",
            "layer",
        )
        for labels in self._labels.values():  # visible from the start, at zero
            for metric in (self._evicted, self._freed_blocks, self._freed_tokens):
                metric.labels(*labels)
            for metric in (*self._retained, self._observation, self._compaction):
                metric.labels(*labels)
            self._blocks_held.labels(*labels).set(0)
            for trigger in Trigger:
                self._evictions.labels(*labels, trigger.value)

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
        for trigger, count in stats.evictions.items():
            self._evictions.labels(*labels, trigger).inc(count)
        for reason, count in stats.skipped.items():
            self._skipped.labels(*labels, reason).inc(count)
        self._freed_blocks.labels(*labels).inc(stats.freed_blocks)
        self._freed_tokens.labels(*labels).inc(stats.freed_tokens)
        for metric, samples in (
            *((metric, stats.retained) for metric in self._retained),
            (self._observation, stats.observation_seconds),
            (self._compaction, stats.compaction_seconds),
        ):
            for value in samples.values:
                metric.labels(*labels).observe(value)
        self._blocks_held.labels(*labels).set(stats.blocks_held)
        if stats.pressure is not None:
            self._pressure.labels(*labels).set(stats.pressure)
        for layer, total in stats.layers_retained.items():
            for metric in self._layer:
                metric.labels(*labels, layer).set(total / stats.compaction_seconds.count)
        self._intervals[engine_idx] += stats

    def log(self) -> None:
        """Write one line for each engine that decided about a request since the last call."""
        for index, interval in self._intervals.items():
            if self._log_lines and (interval.evictions or interval.skipped):
                logger.info("Engine %03d: %s", index, log_line(interval))
            self._intervals[index] = EvictionStats()

    def log_engine_initialized(self) -> None:
        pass


def log_line(stats: EvictionStats) -> str:
    """The counts of an interval as one line of text."""
    skipped = ", ".join(f"{count} {reason}" for reason, count in stats.skipped.most_common())
    later = {name: count for name, count in stats.evictions.items() if name != "prefill"}
    parts = [f"KV compression: evicted {stats.evicted} reqs"]
    if later:
        parts[0] += " (" + ", ".join(f"{n} evictions by {name}" for name, n in later.items()) + ")"
    parts.append(f"skipped {stats.skipped.total()}" + (f" ({skipped})" if skipped else ""))
    if stats.evictions:
        parts.append(f"retained {100 * stats.retained.mean:.1f}%")
        parts.append(f"freed {stats.freed_blocks} blocks and {stats.freed_tokens} tokens")
    if stats.layers_retained:
        ends = (min(stats.layers_retained.values()), max(stats.layers_retained.values()))
        low, high = (100 * total / stats.compaction_seconds.count for total in ends)
        parts.append(f"layers {low:.1f} to {high:.1f}%")
    if stats.observation_seconds.count:
        parts.append(f"observation {1000 * stats.observation_seconds.mean:.1f} ms")
    if stats.compaction_seconds.count:
        parts.append(f"compaction {1000 * stats.compaction_seconds.mean:.1f} ms")
    parts.append(f"blocks held {stats.blocks_held}")
    if stats.pressure is not None:
        parts.append(f"pressure {'on' if stats.pressure else 'off'}")
    return ", ".join(parts)
