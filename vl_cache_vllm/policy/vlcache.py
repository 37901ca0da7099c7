# SPDX-License-Identifier: Apache-2.0
"""VL-Cache: Tu et al., arXiv 2410.23317 (ICLR 2025)."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.policy.base import EvictionPolicy, setting, with_default
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.scoring import POOLING_2D, check_pooling, interleave, look_ahead, smooth


@dataclass(frozen=True)
class VLCachePolicy(EvictionPolicy):
    """Post-vision attention scores, layer budgets from post-vision attention density.

    The defaults are the paper's. ``pooling``, ``pooling_2d``, ``uniform_mix``, ``shared_scores``,
    ``lookahead`` and ``short_lookahead`` are this project's additions; 1 turns the first off, 0 the
    others.
    """

    name: ClassVar[str] = "vlcache"

    pooling: int = setting(
        1,
        "odd width of an average over neighbouring positions, applied to the scores; 1: the paper",
    )
    pooling_2d: bool = setting(False, POOLING_2D)
    uniform_mix: float = setting(
        0.0, "share of the budget divided equally among layers; 0: the paper, 1: uniform budgets"
    )
    shared_scores: float = setting(
        0.0,
        "share of a token's score that is its root mean square over all layers and KV heads; "
        "0: the paper",
    )
    lookahead: float = setting(
        0.0,
        "rank tokens also by what they inherit from attended ones before them, fading by e every "
        "so many tokens; 0: the paper",
    )
    lookahead_share: float = setting(
        0.5, "share of the kept tokens that is ranked so, where lookahead is not 0"
    )
    short_lookahead: float = setting(
        0.0, "the same for the rest of the kept tokens, with a length of its own; 0: the paper"
    )
    min_layer_budget: float = setting(
        0.01, "least share of the prompt's tokens that a layer aims at (Algorithm 1's lower clip)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pooling(self.pooling, self.pooling_2d)
        for name in ("uniform_mix", "shared_scores", "lookahead_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("lookahead", "short_lookahead"):
            if not 0.0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be from 0 to 1e6 tokens, got {getattr(self, name)}")
        if not 0.0 < self.min_layer_budget <= 1.0:
            raise ValueError(f"min_layer_budget must be in (0, 1], got {self.min_layer_budget}")

    @property
    def wants_grids(self) -> bool:
        """Whether `Prompt.grids` should be filled."""
        return self.pooling_2d

    def token_scores(self, attention: torch.Tensor, prompt: Prompt) -> torch.Tensor:
        """Accumulated post-vision attention (paper section 3), smoothed when asked."""
        scores = attention
        if self.shared_scores:
            # A few heads that are sure tell more than many that attend a little.
            shared = prompt.mean_over_ranks(attention.square().mean((0, 1), keepdim=True)).sqrt()
            scores = torch.lerp(attention, shared, self.shared_scores)
        own = scores = smooth(scores, self.pooling, prompt.grids if self.pooling_2d else ())
        if self.short_lookahead:
            scores = look_ahead(own, self.short_lookahead)
        if self.lookahead:
            scores = interleave(scores, look_ahead(own, self.lookahead), self.lookahead_share)
        return scores

    def layer_weights(self, density: torch.Tensor, budget: float, prompt: Prompt) -> torch.Tensor:
        """beta_l = clip(d_l / sum(d) * alpha * L, 0.01, 1) (paper, Algorithm 1)."""
        num_layers = density.shape[0]
        total = density.sum()
        uniform = torch.full_like(density, 1.0 / num_layers)
        # No attention entry passes the filter only if nothing was observed.
        share = torch.where(total > 0, density / total.clamp(min=1e-300), uniform)
        share = (1.0 - self.uniform_mix) * share + self.uniform_mix * uniform
        return (share * budget * num_layers).clamp(self.min_layer_budget, 1.0)


@dataclass(frozen=True)
class VLCachePlusPolicy(VLCachePolicy):
    """VL-Cache with the settings that were best on the page reader's tuning split.

    The last query alone observes, half of a score is shared by all layers and KV heads, most of
    the tokens are ranked by a long lookahead and the rest by a short one, and layers get equal
    budgets: docs/accuracy.md.
    """

    name: ClassVar[str] = "vlcache-plus"

    recent_ratio: float = with_default(VLCachePolicy, "recent_ratio", 0.02)
    max_observation_tokens: int | None = with_default(VLCachePolicy, "max_observation_tokens", 1)
    uniform_mix: float = with_default(VLCachePolicy, "uniform_mix", 1.0)
    shared_scores: float = with_default(VLCachePolicy, "shared_scores", 0.55)
    lookahead: float = with_default(VLCachePolicy, "lookahead", 80.0)
    lookahead_share: float = with_default(VLCachePolicy, "lookahead_share", 0.7)
    short_lookahead: float = with_default(VLCachePolicy, "short_lookahead", 1.0)
