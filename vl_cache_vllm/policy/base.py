# SPDX-License-Identifier: Apache-2.0
"""What a policy decides: which queries look, how tokens rank, how layers share the budget.

A policy is a frozen dataclass whose fields are its parameters (the keys that
``--kv-compress-config`` accepts) and whose methods are pure functions of tensors. Reading
attention, rounding to whole pages, choosing the best tokens and moving them is the
mechanism's work (`vl_cache_vllm.ops`), the same for every policy.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vl_cache_vllm.policy.prompt import Prompt

MAX_HELD_QUERIES = 512
"""Bounds what a request with elite_window holds of each layer while its prefill is chunked."""


def setting(default: Any, text: str) -> Any:
    """A dataclass field that is a setting of the user's, with its line of help."""
    return field(default=default, metadata={"help": text})


def with_default(cls: Any, name: str, default: Any) -> Any:
    """An inherited parameter with another default."""
    return setting(default, cls.__dataclass_fields__[name].metadata["help"])


@dataclass(frozen=True)
class EvictionPolicy(ABC):
    """Token scores x layer budgets.

    Raises:
        ValueError: from ``__post_init__`` of a subclass, when a parameter is out of range.
    """

    name: ClassVar[str]
    """The value of ``--kv-compress``."""
    for_text: ClassVar[bool] = False
    """Whether it is defined for prompts without images (``--kv-compress-text``)."""

    threshold: float = setting(
        0.01, "p: an attention entry counts as dense iff it reaches p times its row's maximum"
    )
    recent_ratio: float = setting(
        0.1, "share of a layer's budget that always keeps the prompt's last tokens"
    )
    max_observation_tokens: int | None = setting(
        None, "observe at most so many of the prompt's last queries; null: all post-vision ones"
    )
    post_vision_only: bool = setting(
        True,
        "observe only queries after the last visual token; false: the prompt's last "
        "max_observation_tokens queries whatever they are (SnapKV's window), or all (H2O)",
    )
    sink_tokens: int = setting(
        0, "so many first tokens of the prompt are kept before all but the recent ones"
    )
    keep_text: bool = setting(False, "text tokens are kept before all visual ones")
    elite_window: float = setting(
        0.0,
        "of the observed queries only those score the tokens to which the last one pays at least "
        "this share of the most attention that it pays to any of them, by KV head (AirCache: 0.9); "
        "0: all; needs max_observation_tokens",
    )
    diversity: float = setting(
        0.0,
        "favour tokens whose keys are unlike the others', in heads whose keys are alike: weight of "
        "this against the policy's score, times the mean similarity of a head's keys (MixKV: 1); "
        "0: none",
    )

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be at least 0, got {self.sink_tokens}")
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
        if not 0.0 <= self.recent_ratio <= 1.0:
            raise ValueError(f"recent_ratio must be in [0, 1], got {self.recent_ratio}")
        if self.max_observation_tokens is not None and self.max_observation_tokens < 1:
            raise ValueError(
                "max_observation_tokens must be at least 1 or null, "
                f"got {self.max_observation_tokens}"
            )
        for name in ("elite_window", "diversity"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.elite_window and not 1 < (self.max_observation_tokens or 0) <= MAX_HELD_QUERIES:
            raise ValueError(
                f"elite_window needs max_observation_tokens from 2 to {MAX_HELD_QUERIES}, got "
                f"{self.max_observation_tokens}: so many queries are held until the last one shows "
                "which are elite"
            )

    def observation_start(self, post_vision_start: int, prefill_tokens: int) -> int:
        """Position of the first observed query; the last is ``prefill_tokens - 1``."""
        start = post_vision_start if self.post_vision_only else 0
        if self.max_observation_tokens is None:
            return start
        return max(start, prefill_tokens - self.max_observation_tokens)

    @property
    def wants_grids(self) -> bool:
        """Whether `Prompt.grids` should be filled."""
        return False

    @abstractmethod
    def token_scores(self, attention: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Rank tokens by accumulated attention.

        Args:
            attention: attention that each key received from the observed queries, summed over
                the queries and the KV head's group, float32 ``[num_layers, num_kv_heads, tokens]``.
            prompt: what the tokens are.

        Returns:
            Scores of the same shape, finite and not negative; higher is kept first, ties go to
            the lower position.
        """

    def precedence(self, prompt: Prompt, device: torch.device) -> torch.Tensor | None:
        """Groups of tokens, kept whole before any of a lower group: sinks, text, the rest.

        Args:
            prompt: what the tokens are.
            device: of the result.

        Returns:
            int64 ``[tokens]``, 0 or more; None where all tokens are alike.
        """
        if not (self.sink_tokens or self.keep_text):
            return None
        groups = torch.full((prompt.tokens,), int(self.keep_text), device=device)
        for first, end in prompt.visual:
            groups[first:end] = 0
        groups[: self.sink_tokens] = 2
        return groups

    def layer_weights(self, density: torch.Tensor, budget: float, prompt: Prompt) -> torch.Tensor:
        """Divide the budget among layers; equally, unless a policy knows better.

        Args:
            density: share of observed causal attention entries that pass the row filter,
                float64 ``[num_layers]``.
            budget: retained share of the prompt's KV cache, 0 < budget <= 1.
            prompt: what the tokens are.

        Returns:
            Positive weights, float64 ``[num_layers]``; layers get pages in proportion.
        """
        return torch.ones_like(density)
