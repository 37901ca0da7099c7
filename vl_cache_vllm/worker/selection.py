# SPDX-License-Identifier: Apache-2.0
"""What evictions keep, from what was observed: policies' decisions made whole pages.

All evictions of a step are decided together, because launches cost time on a GPU. Scores and
positions take as much memory as the observed attention, so long prompts are scored, selected and
moved a few layers at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.ops.select import Candidates, select_all
from vl_cache_vllm.policy import Attention, Prompt
from vl_cache_vllm.policy.diversity import mix_diversity
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.source import EvictionSource

MAX_GROUP_SCORES = 4 << 20
"""Scores that are in memory at once, if one layer has no more."""
MAX_POLICY_SCORES = MAX_GROUP_SCORES // 2
"""Scores that a policy computes at once, if one layer has no more; rankings take more memory."""


@dataclass(frozen=True)
class EvictionInput:
    """What the eviction of one request is decided on.

    Args:
        config: the request's settings.
        observed: attention of the observed queries.
        dense_entries: the observed ones of a layer, of all ranks; a mean where several attention
            layers read its cache.
        prompt: what the tokens are.
        num_heads: query heads of a layer, of all ranks.
        num_queries: number of observed queries, the last of `EvictionSource.cached_tokens`.
        kept_blocks: of the request.
        source: what is chosen from.
        unobserved: tokens between the last observed query and the one before it.
    """

    config: KVCompressConfig
    observed: AttentionStats
    dense_entries: torch.Tensor
    prompt: Prompt
    num_heads: int
    num_queries: int
    kept_blocks: int
    source: EvictionSource
    unobserved: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of this worker."""
        return len(self.dense_entries)

    @property
    def total_pages(self) -> int:
        """Pages that the layers keep."""
        return self.kept_blocks * self.num_layers

    @property
    def max_kept(self) -> int:
        """Bound of the tokens that a layer keeps; every other layer keeps a page."""
        most = min(self.source.max_pages, self.total_pages - self.num_layers + 1)
        return most * self.source.block_size


@dataclass(frozen=True)
class Division:
    """How budgets are divided among the layers of R requests.

    ``density``: float64 ``[R, num_layers]``; ``kept_pages``, ``num_tokens`` (that can be kept or
    lost) and ``cached_tokens`` (up to the last observed query): int64 ``[R, num_layers]``.
    """

    density: torch.Tensor
    kept_pages: torch.Tensor
    num_tokens: torch.Tensor
    cached_tokens: torch.Tensor

    def of(self, request: int) -> "Division":
        """The part of one request, without the first dimension."""
        return Division(
            self.density[request],
            self.kept_pages[request],
            self.num_tokens[request],
            self.cached_tokens[request],
        )


@dataclass(frozen=True)
class Selection:
    """The tokens that some layers of a request keep.

    ``scores``: what the tokens of each KV head rank by, ``[num_layers, num_kv_heads, tokens]``.

    ``positions``: cache indices as `select` gives them, the first ``kept_pages[l] * block_size`` of
    layer l.
    """

    request: int  # index of the input
    first_layer: int
    scores: torch.Tensor
    positions: torch.Tensor


def divide(inputs: Sequence[EvictionInput]) -> Division:
    """The density of each layer and its pages."""
    device = inputs[0].dense_entries.device
    # The last query has as many causal entries as tokens are cached, the one before it one less:
    # q * (2 * cached - q + 1) / 2, less what lies between the last two of them.
    numbers = to_device(
        [
            number
            for one in inputs
            for number in (
                one.source.tail,
                one.num_queries * one.num_heads,
                (one.num_queries - 1) * (one.num_queries + 2 * one.unobserved) * one.num_heads // 2,
            )
        ],
        device,
    ).view(-1, 3)
    block_size = inputs[0].source.block_size
    pages = torch.stack([one.source.pages for one in inputs])
    num_tokens = pages * block_size
    cached_tokens = num_tokens + numbers[:, :1]
    entries = cached_tokens * numbers[:, 1:2] - numbers[:, 2:]
    density = torch.stack([one.dense_entries for one in inputs]).double() / entries
    weights = []
    for one, own in zip(inputs, density, strict=True):
        policy, budget = one.config.policy, one.config.budget
        if policy.min_kept_tokens:  # which may keep more than the budget
            budget = max(budget, min(1.0, one.kept_blocks * block_size / one.prompt.tokens))
        weights.append(policy.layer_weights(own, budget, one.prompt))
    kept_pages = apportion(
        torch.stack(weights),
        [one.total_pages for one in inputs],
        pages,
        [one.source.total_pages for one in inputs],
    )
    return Division(density, kept_pages, num_tokens, cached_tokens)


def selections(
    inputs: Sequence[EvictionInput],
    division: Division,
    mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
) -> Iterator[list[Selection]]:
    """The tokens that each request keeps, in groups of layers that fit the memory.

    Args:
        inputs: of the requests.
        division: of their budgets.
        mean_over_ranks: as for `Attention.with_common`.
    """
    kept_tokens = division.kept_pages * inputs[0].source.block_size
    group: list[tuple[int, int, Candidates]] = []
    number = 0  # of scores in the group
    for request, one in enumerate(inputs):
        policy, attention = one.config.policy, one.observed.attention
        if policy.wants_common:
            attention = attention.with_common(mean_over_ranks)
        precedence = policy.precedence(one.prompt, attention.sums.device)
        of_layer = attention.sums[0].numel()
        count = max(1, MAX_POLICY_SCORES // of_layer)
        for first in range(0, one.num_layers, count):
            layers = slice(first, min(first + count, one.num_layers))
            scored = (layers.stop - first) * of_layer
            if group and number + scored > MAX_GROUP_SCORES:
                yield _select(group)
                group, number = [], 0
            candidates = Candidates(
                _scores(one, attention, layers),
                division.num_tokens[request, layers],
                kept_tokens[request, layers],
                policy.recent_ratio,
                one.max_kept,
                precedence,
            )
            group.append((request, first, candidates))
            del candidates  # the group alone holds the scores
            number += scored
    yield _select(group)


def _select(group: Sequence[tuple[int, int, Candidates]]) -> list[Selection]:
    """The tokens that layers keep, from the index of the request and of the first layer."""
    positions = select_all([candidates for *_, candidates in group])
    return [
        Selection(request, first, candidates.scores, kept)
        for (request, first, candidates), kept in zip(group, positions, strict=True)
    ]


def _scores(one: EvictionInput, attention: Attention, layers: slice) -> torch.Tensor:
    """Scores of the tokens of some layers."""
    prompt = one.prompt.of_layers(layers, one.num_layers)
    scores = one.config.policy.token_scores(attention.of_layers(layers), prompt)
    if one.observed.similarity is not None:
        strength = one.config.experimental.diversity
        scores = mix_diversity(scores, one.observed.similarity[layers], strength)
    return scores


def whole(parts: Sequence[Selection]) -> Selection:
    """The tokens of all layers of a request, from those of groups of its layers, in their order."""
    scores, positions = zip(*((part.scores, part.positions) for part in parts), strict=True)
    return Selection(parts[0].request, 0, torch.cat(scores), torch.cat(positions))


def select_kept(one: EvictionInput) -> tuple[Division, Selection]:
    """What the eviction of one request keeps."""
    division = divide([one])
    parts = [part for group in selections([one], division) for part in group]
    return division.of(0), whole(parts)
