# SPDX-License-Identifier: Apache-2.0
"""One eviction read from the trace file, and statistics of it. Needs neither vLLM nor plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_cache_vllm.policy import PatchGrid

LEVELS = 255  # levels of a quantised positive value; level 0 is for values that are not positive
DECADES = 8  # range below the largest value; smaller values get the lowest level


@dataclass(frozen=True)
class Eviction:
    """The trace of one request, recorded with positions and scores.

    Arrays have the shape ``[num_layers, num_kv_heads, prompt_tokens]``. ``kept`` is bool.
    ``attention`` (received by a token from the observed queries) and ``scores`` (used for ranking)
    are float32.
    """

    budget: float
    prompt_tokens: int
    block_size: int
    prompt_blocks: int
    kept_blocks: int
    layers: tuple[int, ...]  # indices, in the model, of the layers with eviction
    density: tuple[float, ...]  # of each layer
    kept_tokens: tuple[int, ...]  # of each layer, with the tail; the same for all its KV heads
    visual: tuple[tuple[int, int], ...]  # (first, end) of each image
    grids: tuple[PatchGrid, ...]
    kept: np.ndarray
    attention: np.ndarray
    scores: np.ndarray

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> Eviction:
        """Join the records that all workers of an engine wrote for one request.

        A tensor-parallel rank holds some of the KV heads, a pipeline stage some of the layers. If
        a request was evicted several times, the first eviction is used.
        """
        stages: dict[int, dict[int, Mapping[str, Any]]] = {}
        for record in records:
            stages.setdefault(record["layers"][0], {}).setdefault(record["rank"], record)
        parts = [[ranks[rank] for rank in sorted(ranks)] for _, ranks in sorted(stages.items())]

        def joined(values: Callable[[Mapping[str, Any]], np.ndarray]) -> np.ndarray:
            layers = [np.concatenate([values(r) for r in ranks], axis=1) for ranks in parts]
            return np.concatenate(layers, axis=0)

        def of_layers(name: str) -> tuple[Any, ...]:
            return tuple(value for ranks in parts for value in ranks[0][name])

        one = records[0]
        tail = one["tokens"] - one["evicted_tokens"]
        return cls(
            budget=one["budget"],
            prompt_tokens=one["tokens"],
            block_size=one["block_size"],
            prompt_blocks=one["blocks"],
            kept_blocks=one["kept_blocks"],
            layers=of_layers("layers"),
            density=of_layers("density"),
            kept_tokens=tuple(kept + tail for kept in of_layers("kept_tokens")),
            visual=tuple((first, end) for first, end in one["visual"]),
            grids=tuple(PatchGrid(*grid) for grid in one["grids"]),
            kept=joined(_kept),
            attention=joined(lambda record: np.asarray(record["attention"], np.float32)),
            scores=joined(lambda record: np.asarray(record["scores"], np.float32)),
        )

    @property
    def num_layers(self) -> int:
        return self.kept.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kept.shape[1]

    @property
    def retained(self) -> float:
        """Fraction of the prompt's blocks that was kept: the budget rounded up to whole blocks."""
        return self.kept_blocks / self.prompt_blocks

    def is_visual(self) -> np.ndarray:
        """Whether each token is visual, bool ``[prompt_tokens]``."""
        visual = np.zeros(self.prompt_tokens, bool)
        for first, end in self.visual:
            visual[first:end] = True
        return visual

    def kept_share(self, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Fraction of the KV heads that keep each token; of all layers or heads where None."""
        return self.kept[_these(layer), _these(head)].mean(axis=(0, 1))

    def kept_by_kind(self) -> tuple[np.ndarray, np.ndarray]:
        """Visual and text tokens kept in each layer, averaged over its KV heads."""
        visual = self.is_visual()
        per_head = self.kept.sum(axis=2).mean(axis=1)
        seen = self.kept[:, :, visual].sum(axis=2).mean(axis=1)
        return seen, per_head - seen

    def grids_of(self, image: int) -> tuple[PatchGrid, ...]:
        """The patch grids of one image; empty if its layout is unknown."""
        first, end = self.visual[image]
        return tuple(grid for grid in self.grids if first <= grid.first < end)


def _kept(record: Mapping[str, Any]) -> np.ndarray:
    positions = record["kept_positions"]
    kept = np.zeros((len(positions), len(positions[0]), record["tokens"]), bool)
    kept[:, :, record["evicted_tokens"] :] = True  # the tail stays
    for layer, heads in enumerate(positions):
        for head, own in enumerate(heads):
            kept[layer, head, own] = True
    return kept


def _these(index: int | None) -> slice:
    return slice(None) if index is None else slice(index, index + 1)


def levels(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Quantise values for the page.

    Returns:
        uint8 levels of the same shape, the lowest and the highest quantised value. Level 0 stands
        for values that are not positive. Levels 1 to `LEVELS` are spaced at equal ratios between
        the lowest and the highest value.
    """
    positive = values > 0
    if not positive.any():
        return np.zeros(values.shape, np.uint8), 1.0, 1.0
    high = float(values.max())
    low = max(float(values[positive].min()), high / 10**DECADES)
    result = np.zeros(values.shape, np.uint8)
    if high == low:
        result[positive] = LEVELS
        return result, low, high
    position = np.log(np.maximum(values[positive], low).astype(np.float64) / low)
    result[positive] = 1 + np.rint((LEVELS - 1) * position / np.log(high / low))
    return result, low, high


@dataclass(frozen=True)
class Histogram:
    """Fractions of the kept and of the evicted tokens by value; each of the two adds up to 1.

    ``edges`` has one entry more than there are bins, spaced at equal ratios. ``zero`` holds the
    fractions of (kept, evicted) tokens whose value is 0.
    """

    edges: np.ndarray
    kept: np.ndarray
    evicted: np.ndarray
    zero: tuple[float, float]


def histogram(values: np.ndarray, kept: np.ndarray, bins: int = 32) -> Histogram:
    """Distribution of ``values`` over logarithmic bins, for kept and for evicted tokens."""
    positive = values > 0
    high = float(values.max()) if positive.any() else 1.0
    low = float(values[positive].min()) if positive.any() else 1.0
    low = min(max(low, high / 10**DECADES), high / 1.01)
    edges = np.geomspace(low, high * 1.0001, bins + 1)
    edges[0] = low * 0.9999

    def shares(chosen: np.ndarray) -> tuple[np.ndarray, float]:
        own = values[chosen & positive].astype(np.float64)
        count = max(1, int(chosen.sum()))
        counts, _ = np.histogram(np.maximum(own, low), edges)
        return counts / count, int((chosen & ~positive).sum()) / count

    (ours, zero_kept), (others, zero_evicted) = shares(kept), shares(~kept)
    return Histogram(edges, ours, others, (zero_kept, zero_evicted))
