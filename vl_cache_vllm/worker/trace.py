# SPDX-License-Identifier: Apache-2.0
"""The trace file: one JSON line per eviction (docs/adr/0005)."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.worker.selection import Division, EvictionInput, Selection
from vl_cache_vllm.worker.step import PendingEviction


class Trace:
    """Appends evictions to the file that the settings name.

    Args:
        config: the engine's settings, with ``trace.path``.
        rank: tensor-parallel rank of this worker.
        layer_numbers: the model's numbers of the layers on this worker.
        block_size: tokens per block.

    Raises:
        ValueError: if the file cannot be written, so that a bad path fails at start-up.
    """

    def __init__(
        self, config: KVCompressConfig, rank: int, layer_numbers: Sequence[int], block_size: int
    ) -> None:
        trace = config.trace
        assert trace.path is not None
        self._positions, self._scores = trace.positions, trace.scores
        self._rank, self._layer_numbers, self._block_size = rank, layer_numbers, block_size
        try:
            self._file = os.open(trace.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"KV compression cannot write its trace.path: {error}") from error

    def recorded(self, part: Selection) -> Selection:
        """What the trace records of a part, on the host; empty tensors for the rest."""
        nothing = torch.empty(0)
        return dataclasses.replace(
            part,
            scores=part.scores.cpu() if self._scores else nothing,
            positions=part.positions.cpu() if self._positions else nothing,
        )

    def write(
        self,
        eviction: PendingEviction,
        decided_on: EvictionInput,
        division: Division,
        selection: Selection,
    ) -> None:
        """Append one eviction; reads the device back.

        Args:
            eviction: which request, and its blocks.
            decided_on: its prompt and the observed attention.
            division: of the layers' budgets.
            selection: what was kept, as `recorded`.
        """
        state, prompt = eviction.state, decided_on.prompt
        config = state.config
        kept_tokens = (division.kept_pages * self._block_size).tolist()
        cached_tokens = division.cached_tokens.tolist()
        record: dict[str, Any] = {
            "request_id": state.request_id,
            "eviction": state.num_evictions,
            "rank": self._rank,
            "layers": self._layer_numbers,
            "budget": config.budget,
            "policy": config.policy.name,
            "policy_options": dataclasses.asdict(config.policy),
            "experimental": dataclasses.asdict(config.experimental),
            "tokens": eviction.tokens,
            "evicted_tokens": eviction.order.evicted_tokens,
            "cached_tokens": cached_tokens,
            "blocks": cdiv(eviction.tokens, self._block_size),
            "vision_end": state.vision_end,
            "block_size": self._block_size,
            "kept_blocks": len(eviction.order.kept_blocks),
            "density": division.density.tolist(),
            "kept_tokens": kept_tokens,
            "visual": prompt.visual,
            "grids": [dataclasses.astuple(grid) for grid in prompt.grids],
        }
        if self._positions:
            record["kept_positions"] = _trimmed(selection.positions, kept_tokens)
        if self._scores:
            attention = decided_on.observed.attention
            record["attention"] = _rounded(attention.sums, cached_tokens)
            if attention.maxima is not None:
                record["maxima"] = _rounded(attention.maxima, cached_tokens)
            record["scores"] = _rounded(selection.scores, cached_tokens)
        # One write call per line: workers of several engines may share the file.
        os.write(self._file, (json.dumps(record) + "\n").encode())


def _trimmed(values: torch.Tensor, tokens: Sequence[int]) -> list[Any]:
    """The first ``tokens[l]`` entries of each KV head of layer l, as nested lists."""
    return [layer[:, :end].tolist() for layer, end in zip(values, tokens, strict=True)]


def _rounded(values: torch.Tensor, tokens: Sequence[int]) -> Any:
    """`_trimmed` with four significant digits."""

    def shorten(value: Any) -> Any:
        return [*map(shorten, value)] if isinstance(value, list) else float(f"{value:.3e}")

    return shorten(_trimmed(values, tokens))
