# SPDX-License-Identifier: Apache-2.0
"""The other side of the parity tests: NVIDIA's kvpress on transformers, its own classes and hooks.

Nothing of kvpress is copied or replaced. What a press keeps is read from the cache it leaves.
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

# kvpress's __init__ imports all presses, with packages that none of these needs, and wraps the
# attention functions of every model in the process. Its modules by themselves do neither.
_spec = importlib.util.find_spec("kvpress")
assert _spec is not None, "kvpress is not installed: `make env` does it, without its dependencies"
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
    """The compression ratio with which a press keeps so many tokens.

    Presses truncate or round ``tokens * (1 - ratio)``: a quarter of a token above is safe in both.
    """
    return 1 - (kept_tokens + 0.25) / prompt_tokens


@dataclass(frozen=True)
class Kept:
    """What a press made of one prompt."""

    positions: list[list[list[int]]]
    """[layers][KV heads], sorted."""
    scores: list[torch.Tensor]
    """Of each layer, ``[KV heads, tokens]``."""


class Presser:
    """One checkpoint in transformers, float32."""

    def __init__(self, path: Path, attention: str = "eager") -> None:
        """``attention``: "eager" shows presses the model's own, with "sdpa" they compute theirs."""
        oracle = Oracle(path)
        self.model, self.processor = oracle.model, oracle.processor
        self.model.set_attn_implementation(attention)

    def inputs(self, prompt: str, images: Sequence[Image.Image] = ()) -> BatchFeature:
        return self.processor(text=prompt, images=list(images) or None, return_tensors="pt")

    def press(self, press: BasePress, inputs: BatchFeature) -> Kept:
        """Read a prompt under a press."""
        whole, pressed = DynamicCache(), DynamicCache()
        self._read(inputs, whole)
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
            for kept, every in zip(pressed.layers, whole.layers, strict=True)
        ]
        return Kept(positions, scores)

    @torch.inference_mode()
    def _read(self, inputs: BatchFeature, cache: DynamicCache) -> None:
        # kvpress's hook asks for the cache position, which transformers no longer hands to
        # attention layers unless its caller gives it.
        position = torch.arange(inputs["input_ids"].shape[1])
        self.model(**inputs, past_key_values=cache, cache_position=position, logits_to_keep=1)


def _found(kept: torch.Tensor, every: torch.Tensor) -> list[list[int]]:
    """Where each head's kept keys, ``[KV heads, kept, size]``, are among all of the prompt's."""
    same = (kept[:, :, None] == every[:, None]).all(-1)  # [KV heads, kept, tokens]
    assert (same.sum(-1) == 1).all(), "keys of different positions are different"
    return [sorted(head.nonzero()[:, 1].tolist()) for head in same]
