# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens the workers observe at once: their memory for it is bounded.

The scheduler admits a request in the step that schedules its first observed query and tells the
workers so with that step's output. Without room, a request that waits for its first step waits
on; one that runs already is not evicted.
"""

from collections.abc import Sequence

from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import AttentionSpec

_ATTRIBUTE = "kv_compress_admitted"


class ObservationBudget:
    """Requests under observation.

    Args:
        tokens: most tokens of their prompts together; None: no bound, and nobody need be told.
    """

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self._admitted: dict[str, int] = {}
        self._new: list[str] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._admitted

    def has_room(self, tokens: int) -> bool:
        return self.tokens is None or sum(self._admitted.values()) + tokens <= self.tokens

    @property
    def is_empty(self) -> bool:
        return not self._admitted

    def admit(self, request_id: str, tokens: int) -> None:
        self._admitted[request_id] = tokens
        self._new.append(request_id)

    def release(self, request_id: str) -> None:
        """Of requests that are not admitted, too."""
        self._admitted.pop(request_id, None)

    def take_new(self) -> list[str]:
        """Those admitted since the last call that still are."""
        new, self._new = self._new, []
        return [request_id for request_id in new if request_id in self._admitted]


def announce(output: SchedulerOutput, request_ids: list[str]) -> None:
    """Tell the workers who is admitted with a step."""
    setattr(output, _ATTRIBUTE, request_ids)


def announced(output: SchedulerOutput) -> list[str] | None:
    """Who is; None where observation is not bounded."""
    return getattr(output, _ATTRIBUTE, None)


def observation_budget_tokens(
    vllm_config: VllmConfig, layers: Sequence[AttentionSpec]
) -> int | None:
    """Tokens that workers observe at once: as many as 256 MiB of scores are for.

    At least those of a step beside the longest prompt's. None for workers on a CPU, whose memory
    nobody profiles.

    Args:
        vllm_config: the engine's.
        layers: the evicted ones.
    """
    if vllm_config.device_config.device_type == "cpu":
        return None
    token_bytes = sum(4 * layer.num_kv_heads for layer in layers)
    max_model_len = vllm_config.model_config.max_model_len
    least = max_model_len + vllm_config.scheduler_config.max_num_batched_tokens
    return max(least, (256 << 20) // token_bytes)
