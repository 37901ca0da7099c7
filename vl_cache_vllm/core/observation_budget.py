# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens the workers observe at once, so that their memory for it is bounded.

The scheduler admits a request in the step that schedules its first observed query, and names it to
the workers with that step's output. Without room, a request that waits for its first step keeps
waiting, and a request that already runs is not evicted.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.config import VllmConfig

if TYPE_CHECKING:  # the spec imports the block manager, which imports this
    from vl_cache_vllm.core.spec import EvictionAttentionSpec


class ObservationBudget:
    """Requests under observation.

    Args:
        tokens: bound of the sum of their prompts' tokens; None: not bounded.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self._tokens = tokens
        self._admitted: dict[str, int] = {}
        self._new: list[str] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._admitted

    def has_room(self, tokens: int) -> bool:
        """Whether a prompt of so many tokens fits."""
        return self._tokens is None or sum(self._admitted.values()) + tokens <= self._tokens

    @property
    def is_unbounded(self) -> bool:
        """Whether every request may be observed, so that none need be named to the workers."""
        return self._tokens is None

    @property
    def is_empty(self) -> bool:
        """Whether no request is under observation."""
        return not self._admitted

    def admit(self, request_id: str, tokens: int) -> None:
        """Count a prompt of ``tokens`` until `release`."""
        self._admitted[request_id] = tokens
        self._new.append(request_id)

    def release(self, request_id: str) -> None:
        """The request is observed no longer; ids that are not admitted are fine."""
        self._admitted.pop(request_id, None)

    def take_new(self) -> list[str]:
        """The requests admitted since the last call that still are."""
        new, self._new = self._new, []
        return [request_id for request_id in new if request_id in self._admitted]


def observation_budget_tokens(
    vllm_config: VllmConfig, layers: "Sequence[EvictionAttentionSpec]"
) -> int | None:
    """The budget of an engine: as many tokens as 256 MiB of sums and maxima are enough for.

    It is at least the longest prompt plus one step. None for CPU workers, whose memory vLLM does
    not profile.

    Args:
        vllm_config: the engine's.
        layers: specs of the evicted layers.
    """
    if vllm_config.device_config.device_type == "cpu":
        return None
    policies = [layer.kv_compress.policy for layer in layers if layer.kv_compress is not None]
    assert len(policies) == len(layers)
    token_bytes = sum(
        4 * (2 if policy.wants_maxima else 1) * layer.num_kv_heads
        for policy, layer in zip(policies, layers, strict=True)
    )
    max_model_len = vllm_config.model_config.max_model_len
    least = max_model_len + vllm_config.scheduler_config.max_num_batched_tokens
    return max(least, (256 << 20) // token_bytes)
