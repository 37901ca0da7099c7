# SPDX-License-Identifier: Apache-2.0
"""What the scheduler counts between two reports to the front end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from vl_cache_vllm.core.admission import EvictionPlan


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
        """Count evictions that a worker has done (`vl_cache_vllm.messages.EvictionReport`)."""
        for report in reports:
            self.observation_seconds.append(report["observation_seconds"])
            if report["compaction_seconds"] is not None:
                self.compaction_seconds.append(report["compaction_seconds"])
                self.layers_retained.append(report["layers_retained"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as messages carry them."""
        return {**vars(self), "skipped": dict(self.skipped)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The counts of `to_dict`."""
        return cls(**{**values, "skipped": Counter(values["skipped"])})
