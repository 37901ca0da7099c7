# SPDX-License-Identifier: Apache-2.0
"""The base class of policies: which queries are observed, token scores, and layer weights.

A policy is a frozen dataclass. Its fields are its settings, the keys that
``--kv-compress-config`` accepts, and its methods are pure functions of tensors. Everything else is
the same for every policy and lives in `vl_cache_vllm.ops`: reading attention, rounding to whole
pages, selecting the best tokens, and moving them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.prompt import Prompt

DENSITY_THRESHOLD = 0.01


def setting(default: Any, text: str) -> Any:
    """A dataclass field that users can set, with its help text."""
    return field(default=default, metadata={"help": text})


def with_default(cls: Any, name: str, default: Any) -> Any:
    """An inherited setting with another default."""
    return setting(default, cls.__dataclass_fields__[name].metadata["help"])


@dataclass(frozen=True)
class EvictionPolicy(ABC):
    """Token scores and layer weights; the settings here apply to every policy.

    Raises:
        ValueError: from ``__post_init__``, when a setting is out of range.
    """

    name: ClassVar[str]
    """The value of ``--kv-compress``."""
    for_text: ClassVar[bool] = False
    """Whether the policy is defined for prompts without images (``--kv-compress-text``)."""

    recent_ratio: float = setting(
        0.1,
        "Fraction of each layer's budget, from 0 to 1, that is reserved for the last tokens of the "
        "prompt.",
    )
    max_observation_tokens: int | None = setting(
        None,
        "Maximum number of queries that score the tokens, counted from the end of the prompt. "
        "null: all queries that post_vision_only admits.",
    )
    post_vision_only: bool = setting(
        True,
        "true: only queries after the last visual token score the tokens. false: all queries of "
        "the prompt do, or its last max_observation_tokens queries.",
    )
    sink_tokens: int = setting(
        0,
        "Number of tokens at the start of the prompt to keep, next in priority to the recent ones. "
        "0 reserves none. This setting does not remove attention sinks from the ranking: other "
        "tokens that attract attention still rank by their score.",
    )
    min_kept_tokens: int = setting(
        0,
        "Minimum number of tokens of a prompt to keep, whatever the budget is; rounded up to whole "
        "blocks, so that short prompts keep room for the answer. 0: the budget alone decides.",
    )
    evict_after: int = setting(
        0,
        "Number of generated tokens after which a request is evicted. Until then it has its full "
        "cache. A reply that has begun knows better what it needs: its last token is observed with "
        "the prompt. Shorter replies are never evicted. 0: evict when the prefill ends.",
    )
    keep_text: bool = setting(
        False,
        "Keep text tokens before visual tokens, next in priority to sink_tokens. Useful if clients "
        "send the question before the images.",
    )

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be at least 0, got {self.sink_tokens}")
        if self.min_kept_tokens < 0:
            raise ValueError(f"min_kept_tokens must be at least 0, got {self.min_kept_tokens}")
        if self.evict_after < 0:
            raise ValueError(f"evict_after must be at least 0, got {self.evict_after}")
        if not 0.0 <= self.recent_ratio <= 1.0:
            raise ValueError(f"recent_ratio must be in [0, 1], got {self.recent_ratio}")
        if self.max_observation_tokens is not None and self.max_observation_tokens < 1:
            raise ValueError(
                "max_observation_tokens must be at least 1 or null, "
                f"got {self.max_observation_tokens}"
            )

    def observation_start(self, post_vision_start: int, prefill_tokens: int) -> int:
        """Position of the first observed query; the last one is ``prefill_tokens - 1``.

        Args:
            post_vision_start: position after the last visual token; 0 for text-only prompts.
            prefill_tokens: tokens that are computed before decoding.
        """
        start = post_vision_start if self.post_vision_only else 0
        if self.max_observation_tokens is None:
            return start
        return max(start, prefill_tokens - self.max_observation_tokens)

    @property
    def density_threshold(self) -> float:
        """An attention entry is dense if it is at least this fraction of its row's maximum.

        `layer_weights` receives the densities. A policy that reads them makes this a setting.
        """
        return DENSITY_THRESHOLD

    @property
    def wants_grids(self) -> bool:
        """Whether the policy reads `Prompt.grids`."""
        return False

    @property
    def wants_maxima(self) -> bool:
        """Whether the policy reads `Attention.maxima`."""
        return False

    @property
    def wants_common(self) -> bool:
        """Whether the policy reads `Attention.common_sums` or `Attention.common_maxima`."""
        return False

    @property
    def summed_queries(self) -> int | None:
        """Number of last observed queries that `Attention.sums` adds up; None: all of them.

        With `evict_after`, the last one is a generated token's, and the prompt's do not count.
        """
        return None

    @abstractmethod
    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """Score tokens of some layers by the attention that they received.

        A long prompt is scored a few layers at a time. What a policy needs of all layers is in
        `Attention.common_sums` and `Attention.common_maxima`.

        Args:
            attention: of the observed queries.
            prompt: kinds and positions of the tokens.

        Returns:
            Scores ``[num_layers, num_kv_heads, tokens]``, finite and not negative. Higher scores
            are kept first; ties go to the lower position.
        """

    def precedence(self, prompt: Prompt, device: torch.device) -> torch.Tensor | None:
        """Priority groups of tokens: all of a higher group are kept before any of a lower one.

        Here sink tokens come before text tokens, and text tokens before the rest.

        Args:
            prompt: kinds and positions of the tokens.
            device: of the result.

        Returns:
            int64 ``[tokens]``, 0 or more; None if all tokens are in one group.
        """
        if not (self.sink_tokens or self.keep_text):
            return None
        groups = torch.full((prompt.tokens,), int(self.keep_text), device=device)
        for first, end in prompt.visual:
            groups[first:end] = 0
        groups[: self.sink_tokens] = 2
        return groups

    def layer_weights(self, density: torch.Tensor, budget: float, prompt: Prompt) -> torch.Tensor:
        """Divide the budget among the layers; equally, unless a policy overrides this.

        Args:
            density: fraction of the observed causal attention entries that are dense
                (`density_threshold`), float64 ``[num_layers]``.
            budget: fraction of the prompt's KV cache to keep, 0 < budget <= 1.
            prompt: kinds and positions of the tokens.

        Returns:
            Positive weights, float64 ``[num_layers]``; layers get pages in proportion to them.
        """
        return torch.ones_like(density)
