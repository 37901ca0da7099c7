# SPDX-License-Identifier: Apache-2.0
"""VL-Cache with scores that hold where prompts do not end right before the answer."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import setting, with_default
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.scoring import interleave
from vl_cache_vllm.policy.vlcache import VLCachePolicy

MAXIMA_SHARE = (0.1, 0.9)
"""Bounds of `VLCachePlusPolicy.share_of_maxima`, so that neither ranking loses all tokens."""


@dataclass(frozen=True)
class VLCachePlusPolicy(VLCachePolicy):
    """Two rankings: by the attention of the last query, and by the maximum over all queries.

    The last query knows where the answer goes on if the prompt ends right before it. After a chat
    template it knows nothing, but some query of the question does. How much attention the last
    query pays to the visual tokens decides how many tokens each ranking chooses.

    The first token draws attention from most queries and tells nothing about the question (an
    attention sink). It is kept, and its attention does not enter the rankings. Layer budgets are
    uniform. The eviction waits for the first tokens of the answer, because a reply to a chat
    message finds out as it begins what it needs. docs/accuracy.md has the measurements.
    """

    name: ClassVar[str] = "vlcache-plus"

    sink_tokens: int = setting(
        1,
        "Number of tokens at the start of the prompt that are kept, next in priority to the recent "
        "ones, and whose attention does not enter the rankings. With 0, a first token that is an "
        "attention sink fills the rankings with the tokens after it.",
    )
    evict_after: int = with_default(VLCachePolicy, "evict_after", 16)
    min_kept_tokens: int = with_default(VLCachePolicy, "min_kept_tokens", 64)
    recent_ratio: float = with_default(VLCachePolicy, "recent_ratio", 0.02)
    max_observation_tokens: int | None = with_default(VLCachePolicy, "max_observation_tokens", 64)
    uniform_mix: float = with_default(VLCachePolicy, "uniform_mix", 1.0)
    shared_scores: float = with_default(VLCachePolicy, "shared_scores", 0.55)
    lookahead: float = with_default(VLCachePolicy, "lookahead", 80.0)
    lookahead_share: float = with_default(VLCachePolicy, "lookahead_share", 0.75)
    short_lookahead: float = with_default(VLCachePolicy, "short_lookahead", 1.0)
    shared_maxima: float = setting(
        0.9,
        "As shared_scores, for the ranking by the maximum over all observed queries.",
    )
    maxima_share: float | None = setting(
        None,
        "Fraction of the kept tokens, above 0 and at most 1, that the ranking by the maximum "
        "over all observed queries chooses; the ranking by the last query chooses the rest. null: "
        "the less attention the last query pays to visual tokens, the more, from 0.1 to 0.9.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.shared_maxima <= 1.0:
            raise ValueError(f"shared_maxima must be in [0, 1], got {self.shared_maxima}")
        if self.maxima_share is not None and not 0.0 < self.maxima_share <= 1.0:
            raise ValueError(f"maxima_share must be in (0, 1] or null, got {self.maxima_share}")

    @property
    def wants_maxima(self) -> bool:
        """Whether the policy reads `Attention.maxima`."""
        return True

    @property
    def wants_common(self) -> bool:
        """Whether the policy reads what all layers have in common."""
        return True

    @property
    def summed_queries(self) -> int | None:
        """The sums are the attention of the last query alone."""
        return 1

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """The ranking by the last query, interleaved with the ranking by the maximum."""
        last, maxima = attention.common_sums, attention.common_maxima
        assert attention.maxima is not None and last is not None and maxima is not None
        share: float | torch.Tensor
        if self.maxima_share is None:
            share = self.share_of_maxima(last, maxima, prompt, self.sink_tokens)
        else:
            share = self.maxima_share

        def rankings(
            attention: torch.Tensor,
            common: torch.Tensor,
            shared: float,
            part: float | torch.Tensor,
        ) -> Iterator[tuple[torch.Tensor, float | torch.Tensor]]:
            """Their memory is taken when the first one is read, and freed after the last one."""
            attention, common = attention.clone(), common.clone()
            for received in (attention, common):
                received[..., : self.sink_tokens] = 0
            for scores, fraction in self.rankings(attention, common, shared, prompt):
                yield scores, fraction * part

        return interleave(
            itertools.chain(
                rankings(attention.sums, last, self.shared_scores, 1.0 - share),
                rankings(attention.maxima, maxima, self.shared_maxima, share),
            )
        )

    @staticmethod
    def share_of_maxima(
        last: torch.Tensor, maxima: torch.Tensor, prompt: Prompt, sink_tokens: int = 0
    ) -> torch.Tensor:
        """Fraction of the kept tokens that the ranking by the maximum chooses, ``[]``.

        ``1 - |last| / |maxima|``, with Euclidean norms over the visual tokens of all layers
        and KV heads, clipped to `MAXIMA_SHARE`.

        Args:
            last, maxima: root mean squares over all layers and KV heads, ``[tokens]``.
            prompt: kinds of the tokens; without visual ones all tokens count.
            sink_tokens: first tokens that do not count.
        """
        is_visual = torch.zeros(prompt.tokens, dtype=torch.bool, device=last.device)
        for first, end in prompt.visual or ((0, prompt.tokens),):
            is_visual[first:end] = True
        is_visual[:sink_tokens] = False
        of_last, of_maxima = torch.linalg.vector_norm(
            torch.stack((last, maxima)) * is_visual, dim=1
        )
        return (1.0 - of_last / of_maxima.clamp(min=1e-30)).clamp(*MAXIMA_SHARE)
