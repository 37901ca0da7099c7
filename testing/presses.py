# SPDX-License-Identifier: Apache-2.0
"""Runs the presses of NVIDIA's kvpress on transformers, for parity tests.

The classes and hooks of kvpress are used unchanged. The kept positions are read from the resulting
cache.
"""

# ruff: noqa: E402
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, DynamicCache

from testing.oracle import Oracle

# kvpress/__init__.py imports all presses, with packages that these do not need, and wraps the
# attention functions of every model in the process. The modules themselves do neither.
_spec = importlib.util.find_spec("kvpress")
assert _spec is not None, (
    "kvpress is not installed: `make env` installs it without its dependencies"
)
sys.modules["kvpress"] = importlib.util.module_from_spec(_spec)

from kvpress.presses.base_press import BasePress
from kvpress.presses.observed_attention_press import ObservedAttentionPress
from kvpress.presses.per_layer_compression_press import PerLayerCompressionPress
from kvpress.presses.pyramidkv_press import PyramidKVPress
from kvpress.presses.snapkv_press import SnapKVPress
from kvpress.presses.streaming_llm_press import StreamingLLMPress
from kvpress.presses.tova_press import TOVAPress

__all__ = [
    "BasePress",
    "Kept",
    "ObservedAttentionPress",
    "PerLayerCompressionPress",
    "Presser",
    "PyramidKVPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "ratio",
]


def ratio(kept_tokens: int, prompt_tokens: int) -> float:
    """The compression ratio with which a press keeps ``kept_tokens``.

    Presses truncate or round ``tokens * (1 - ratio)``. A quarter of a token more gives the same
    number in both cases.
    """
    return 1 - (kept_tokens + 0.25) / prompt_tokens


@dataclass(frozen=True)
class Kept:
    """The positions that a press keeps of a prompt, and its scores."""

    positions: list[list[list[int]]]
    """Sorted positions by layer and KV head."""
    scores: list[torch.Tensor]
    """``[KV heads, tokens]`` for each layer."""


class Presser:
    """A checkpoint in transformers, float32."""

    def __init__(self, path: Path, attention: str = "eager") -> None:
        """Load a checkpoint.

        Args:
            path: of the checkpoint.
            attention: with "eager", presses use the attention of the model; with "sdpa" they
                compute it themselves.
        """
        oracle = Oracle(path)
        self.model, self.processor = oracle.model, oracle.processor
        self.model.set_attn_implementation(attention)

    def inputs(self, prompt: str, images: Sequence[Image.Image] = ()) -> BatchFeature:
        return self.processor(text=prompt, images=list(images) or None, return_tensors="pt")

    def press(self, press: BasePress, inputs: BatchFeature) -> Kept:
        """Prefill a prompt with a press."""
        full, pressed = DynamicCache(), DynamicCache()
        self._read(inputs, full)
        scores: list[torch.Tensor] = []
        scorer = press.press if isinstance(press, PerLayerCompressionPress) else press
        score = scorer.score

        def recording_score(*arguments: Any) -> torch.Tensor:
            result = score(*arguments)
            scores.append(result[0])
            return result

        scorer.score = recording_score
        try:
            with press(self.model):
                self._read(inputs, pressed)
        finally:
            del scorer.score
        positions = [
            _found(kept.keys[0], every.keys[0])
            for kept, every in zip(pressed.layers, full.layers, strict=True)
        ]
        return Kept(positions, scores)

    @torch.inference_mode()
    def _read(self, inputs: BatchFeature, cache: DynamicCache) -> None:
        # The hook of kvpress needs the cache position. transformers passes it to attention layers
        # only if the caller provides it.
        position = torch.arange(inputs["input_ids"].shape[1])
        self.model(**inputs, past_key_values=cache, cache_position=position, logits_to_keep=1)


def _found(kept: torch.Tensor, every: torch.Tensor) -> list[list[int]]:
    """Positions, for each head, of kept keys ``[KV heads, kept, size]`` among all of the prompt."""
    same = (kept[:, :, None] == every[:, None]).all(-1)  # [KV heads, kept, tokens]
    assert (same.sum(-1) == 1).all(), "keys of different positions must differ"
    return [sorted(head.nonzero()[:, 1].tolist()) for head in same]
