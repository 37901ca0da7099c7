# SPDX-License-Identifier: Apache-2.0
"""Research options that work with every policy, off by default (docs/accuracy.md)."""

from dataclasses import dataclass

from vl_cache_vllm.policy.base import EvictionPolicy, setting

MAX_HELD_QUERIES = 512
"""Bounds the queries of each layer that a request with elite_window holds during its prefill."""


@dataclass(frozen=True)
class ExperimentalOptions:
    """Options that change the scores of any policy.

    Raises:
        ValueError: when an option is out of range.
    """

    elite_window: float = setting(
        0.0,
        "Score tokens only with elite queries: those whose own token gets at least this fraction "
        "of the largest attention that the last query pays to any observed token, per KV head "
        "(AirCache: 0.9). 0: all observed queries score. Requires max_observation_tokens from 2 to "
        f"{MAX_HELD_QUERIES}.",
    )
    diversity: float = setting(
        0.0,
        "Weight of a key-diversity bonus (MixKV), from 0 (off) to 1, scaled by how similar the "
        "keys of the head are.",
    )

    def __post_init__(self) -> None:
        for name in ("elite_window", "diversity"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"experimental.{name} must be in [0, 1], got {getattr(self, name)}"
                )

    def check(self, policy: EvictionPolicy) -> None:
        """Raise ValueError if an option does not work with ``policy``."""
        if self.elite_window and (policy.wants_maxima or policy.summed_queries is not None):
            raise ValueError(
                f"experimental.elite_window does not work with {policy.name}, which does not rank "
                "by the sum over all observed queries"
            )
        if self.elite_window and policy.evict_after:
            raise ValueError(
                f"experimental.elite_window needs evict_after 0, got {policy.evict_after}: the "
                "prompt's last query shows which queries are elite"
            )
        limit = policy.max_observation_tokens
        if self.elite_window and not 1 < (limit or 0) <= MAX_HELD_QUERIES:
            raise ValueError(
                "experimental.elite_window needs max_observation_tokens from 2 to "
                f"{MAX_HELD_QUERIES}, got {limit}: the queries are held until the "
                "last one shows which of them are elite"
            )
