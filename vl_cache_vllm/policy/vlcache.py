# SPDX-License-Identifier: Apache-2.0
"""VL-Cache: Tu et al., arXiv 2410.23317 (ICLR 2025)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from vl_cache_vllm.ops.look_ahead import look_ahead
from vl_cache_vllm.policy.attention import Attention
from vl_cache_vllm.policy.base import DENSITY_THRESHOLD, EvictionPolicy, setting
from vl_cache_vllm.policy.prompt import Prompt
from vl_cache_vllm.policy.scoring import (
    POOLING,
    POOLING_2D,
    check_pooling,
    interleave,
    smooth,
)


@dataclass(frozen=True)
class VLCachePolicy(EvictionPolicy):
    """Scores from post-vision attention; layer budgets from the density of that attention.

    The defaults are the paper's. This project added ``pooling`` (1: off) and ``pooling_2d``,
    ``uniform_mix``, ``shared_scores``, ``lookahead`` and ``short_lookahead`` (false or 0: off).
    """

    name: ClassVar[str] = "vlcache"

    threshold: float = setting(
        DENSITY_THRESHOLD,
        "An attention entry is dense if it is at least this fraction of the largest entry of its "
        "row, greater than 0 and at most 1. Denser layers get larger budgets.",
    )
    pooling: int = setting(1, POOLING)
    pooling_2d: bool = setting(False, POOLING_2D)
    uniform_mix: float = setting(
        0.0,
        "Fraction of the budget, from 0 to 1, that is divided equally among the layers; the rest "
        "follows density. 0: density alone, as in the paper. 1: uniform layer budgets.",
    )
    shared_scores: float = setting(
        0.0,
        "Fraction of a token's score, from 0 to 1, that all layers and KV heads share: the root "
        "mean square of its attention over them. 0: none, as in the paper.",
    )
    lookahead: float = setting(
        0.0,
        "Decay length of a second ranking, the look-ahead, in tokens. In it, each token inherits "
        "the largest score of the tokens before it, decayed by exp(-distance / lookahead). 0: off, "
        "as in the paper.",
    )
    lookahead_share: float = setting(
        0.5,
        "Fraction of the kept tokens, from 0 to 1, that the look-ahead ranking chooses; the rest "
        "use the plain ranking. No effect if lookahead is 0.",
    )
    short_lookahead: float = setting(
        0.0,
        "Decay length of the same inheritance in the plain ranking, in tokens. 0: off, as in the "
        "paper.",
    )
    min_layer_budget: float = setting(
        0.01,
        "Minimum budget of a layer as a fraction of the prompt's tokens, before rounding to whole "
        "pages. 0.01: the lower clip of the paper's Algorithm 1.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")
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
    def density_threshold(self) -> float:
        """The setting ``threshold``."""
        return self.threshold

    @property
    def wants_grids(self) -> bool:
        """Whether the policy reads `Prompt.grids`."""
        return self.pooling_2d

    @property
    def wants_common(self) -> bool:
        """Whether the policy reads `Attention.common_sums`."""
        return self.shared_scores > 0

    def token_scores(self, attention: Attention, prompt: Prompt) -> torch.Tensor:
        """Accumulated post-vision attention, as in the paper; then the optional steps."""
        rankings = self.rankings(attention.sums, attention.common_sums, self.shared_scores, prompt)
        return interleave(rankings) if self.lookahead else next(rankings)[0]

    def rankings(
        self,
        attention: torch.Tensor,
        common: torch.Tensor | None,
        shared: float,
        prompt: Prompt,
    ) -> Iterator[tuple[torch.Tensor, float]]:
        """The optional steps: sharing, pooling and look-ahead.

        The prompt's attention finds where an output begins in the image; decoding then reads on
        from there. So in a look-ahead, tokens inherit the scores of those before them, with decay.

        Args:
            attention: not negative, ``[num_layers, num_kv_heads, tokens]``.
            common: its root mean square over all layers and KV heads, ``[tokens]``.
            shared: fraction of a score that they share, if all hold the same tokens.
            prompt: kinds and positions of the tokens.

        Yields:
            The plain ranking and, if it is on, the look-ahead: scores of the same shape, and the
            fraction of the kept tokens that they choose. One at a time, to save memory.
        """
        scores = attention
        if shared and prompt.lengths is None:
            # The root mean square, not the mean: a few heads with much attention are better
            # evidence than many heads with a little.
            assert common is not None
            scores = torch.lerp(attention, common, shared)
        scores = smooth(scores, self.pooling, prompt.grids if self.pooling_2d else ())
        share = self.lookahead_share if self.lookahead else 0.0
        short = self.short_lookahead
        yield prompt.within(look_ahead(scores, short) if short else scores), 1.0 - share
        if self.lookahead:
            yield prompt.within(look_ahead(scores, self.lookahead)), share

    def layer_weights(self, density: torch.Tensor, budget: float, prompt: Prompt) -> torch.Tensor:
        """``clip(d_l / sum(d) * budget * num_layers, min_layer_budget, 1)`` (Algorithm 1)."""
        if self.uniform_mix == 1.0:
            return torch.full_like(density, min(1.0, max(self.min_layer_budget, budget)))
        num_layers = density.shape[0]
        total = density.sum()
        uniform = torch.full_like(density, 1.0 / num_layers)
        # No entry is dense only if nothing was observed.
        fraction = torch.where(total > 0, density / total.clamp(min=1e-300), uniform)
        fraction = (1.0 - self.uniform_mix) * fraction + self.uniform_mix * uniform
        return (fraction * budget * num_layers).clamp(self.min_layer_budget, 1.0)
