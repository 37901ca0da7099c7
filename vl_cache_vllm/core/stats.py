# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts between two reports to the front end.

Counts travel in ``SchedulerStats.kv_connector_stats``, the one field of vLLM's statistics that
carries free-form data; KV connectors themselves are refused at start-up.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.stats import SchedulerStats

from vl_cache_vllm.core.admission import EvictionPlan

KEY = "kv_compress"
SEND = "_VL_CACHE_VLLM_SEND_STATS"  # environment variable of a front end, inherited by its engines


@dataclass
class EvictionStats:
    """Since the last report."""

    evicted: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by the name of the reason
    freed_blocks: int = 0  # prompt blocks that returned to the pool
    freed_tokens: int = 0  # per layer and KV head, on average
    retained: list[float] = field(default_factory=list)  # kept blocks / prompt blocks
    observation_seconds: list[float] = field(default_factory=list)  # of one prompt, all layers
    compaction_seconds: list[float] = field(default_factory=list)
    # By layer, kept tokens / prompt tokens; of the last stage's layers under pipeline parallelism.
    layers_retained: list[dict[int, float]] = field(default_factory=list)
    blocks_held: int = 0  # now, by evicted requests
    pressure: bool | None = None  # now; None: evicts always

    def decided(self, plan: EvictionPlan, block_size: int) -> None:
        """Count a decision."""
        if plan.skip is not None:
            self.skipped[plan.skip.value] += 1
            return
        self.evicted += 1
        self.retained.append(plan.kept_blocks / plan.prompt_blocks)
        self.freed_tokens += max(0, plan.prompt_tokens - plan.kept_blocks * block_size)

    def add_reports(self, reports: Sequence[dict[str, Any]]) -> None:
        """Count evictions that a worker has done (`vl_cache_vllm.core.messages`)."""
        for report in reports:
            self.observation_seconds.append(report["observation_seconds"])
            if report["compaction_seconds"] is not None:
                self.compaction_seconds.append(report["compaction_seconds"])
                self.layers_retained.append(report["layers_retained"])


def put(stats: SchedulerStats, eviction: EvictionStats) -> None:
    """Send counts along with vLLM's statistics of a step."""
    assert stats.kv_connector_stats is None
    values = dict(vars(eviction))
    values["skipped"] = dict(eviction.skipped)
    stats.kv_connector_stats = {KEY: values}


def take(stats: SchedulerStats) -> EvictionStats | None:
    """Take them out again, before vLLM's own loggers look for a KV connector's."""
    carried = stats.kv_connector_stats
    if not carried or KEY not in carried:
        return None
    stats.kv_connector_stats = None
    values = dict(carried[KEY])
    values["skipped"] = Counter(values["skipped"])
    return EvictionStats(**values)
