# SPDX-License-Identifier: Apache-2.0
"""The method as a readable program: what eviction must do, on top of transformers' eager attention.

Written from docs/method.md alone ("Density of a layer", "Layer budgets", "Token scores"); it shares
no code with the product. It materialises attention and loops; it is slow and plain on purpose.
Letters: E prompt tokens, P post-vision tokens, L layers, H query heads.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, BatchFeature, DynamicCache, PreTrainedModel, ProcessorMixin

from testing import tiny_models

Floats = NDArray[np.float64]

ROW_FILTER = 0.01  # p: an attention entry counts from this share of its row's maximum on
RECENT_SHARE = 0.1  # of a layer's kept tokens: the prompt's last ones, kept whatever their score
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1.0  # the clip of Algorithm 1


@dataclass(frozen=True)
class Settings:
    """What the user chooses."""

    budget: float
    block_size: int
    pooling: int = 1
    uniform_mix: float = 0.0
    max_observation_tokens: int | None = None
    """Only this many of the post-vision tokens, the last ones, make up P. None: all."""


@dataclass(frozen=True)
class Decision:
    """What is kept of one prompt."""

    density: list[float]  # [L]
    weights: list[float]  # [L]
    pages: list[int]  # [L]
    kept_tokens: list[int]  # [L]
    kept_positions: list[list[list[int]]]  # [L][KV heads], sorted
    score_gap: float
    """Smallest relative distance between the scores of the last token kept and the first one not
    kept, over layers and KV heads. Below float32 rounding either choice is right."""


@dataclass(frozen=True)
class Eviction(Decision):
    """One prompt read, and what is kept of it."""

    prompt_token_ids: list[int]
    logits: torch.Tensor  # [vocabulary], of the first generated token
    cache: DynamicCache  # of the whole prompt


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens with their logprobs, and how far ahead of the second best each was."""

    token_ids: list[int]
    logprobs: list[float]
    gaps: list[float]


# --------------------------------------------------------------------------------------------------
# Decisions, from attention probabilities


def layer_density(attention: torch.Tensor, first: int) -> float:
    """Fraction of causal entries that pass the row filter ("Density of a layer").

    Args:
        attention: probabilities [H, P, E] of the queries at positions first, first + 1, ...
        first: position of the first post-vision token.
    """
    kept = causal = 0
    for head in attention:
        for offset, row in enumerate(head):
            visible = row[: first + offset + 1]
            kept += int((visible >= ROW_FILTER * visible.max()).sum())
            causal += len(visible)
    return kept / causal


def layer_weights(density: Sequence[float], budget: float, uniform_mix: float) -> list[float]:
    """beta of each layer ("Layer budgets"); ``uniform_mix`` 0 is the paper."""
    num_layers = len(density)
    weights = []
    for d in density:
        share = d / sum(density)
        share = (1 - uniform_mix) * share + uniform_mix / num_layers
        weights.append(min(max(share * budget * num_layers, MIN_WEIGHT), MAX_WEIGHT))
    return weights


def kept_blocks(prompt_tokens: int, settings: Settings) -> int:
    """M, exactly: 0.1 of 30 blocks is 3, whatever 0.1 is in binary."""
    num_blocks = math.ceil(Fraction(prompt_tokens, settings.block_size))
    return math.ceil(Fraction(str(settings.budget)) * num_blocks)


def deal_pages(weights: Sequence[float], total: int, most: int) -> list[int]:
    """Whole pages proportional to the weights, 1 to ``most`` a layer, ``total`` exactly."""
    assert len(weights) <= total <= most * len(weights)

    def quotas(scale: float) -> list[float]:
        return [min(max(scale * weight, 1.0), float(most)) for weight in weights]

    # The scale at which the quotas add up: they grow with it, so halve the interval until it is a
    # single number. Floors and caps that bind are paid for by the other layers this way.
    low, high = 0.0, most / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(quotas(middle)) < total:
            low = middle
        else:
            high = middle
    quota = quotas(high)
    # Quotas that are whole numbers but for rounding are whole numbers.
    quota = [float(round(q)) if abs(q - round(q)) < 1e-9 else q for q in quota]

    pages = [math.floor(q) for q in quota]
    by_remainder = sorted(range(len(quota)), key=lambda layer: (pages[layer] - quota[layer], layer))
    for layer in by_remainder[: total - sum(pages)]:
        pages[layer] += 1
    assert sum(pages) == total
    return pages


def token_scores(attention: torch.Tensor, num_kv_heads: int, pooling: int) -> Floats:
    """psi [KV heads, E] ("Token scores"): attention of the post-vision queries to each token.

    Args:
        attention: probabilities [H, P, E]; query heads of one KV head are neighbours.
        num_kv_heads: H / num_kv_heads query heads read one KV head.
        pooling: odd kernel of a moving average over positions; 1 is the paper.
    """
    received = attention.double().sum(dim=1)  # [H, E]
    num_heads, prompt_tokens = received.shape
    group = num_heads // num_kv_heads
    scores = torch.zeros(num_kv_heads, prompt_tokens, dtype=torch.float64)
    for head in range(num_heads):
        scores[head // group] += received[head]
    return F.avg_pool1d(scores, pooling, stride=1, padding=pooling // 2).numpy()


def kept_of_head(scores: Floats, count: int) -> tuple[list[int], float]:
    """The ``count`` positions that one KV head keeps, sorted, and the gap at the threshold.

    The last ceil(count / 10) tokens always, then by score, ties to the lower position.
    """
    end = len(scores)
    num_recent = math.ceil(Fraction(str(RECENT_SHARE)) * count)
    old = end - num_recent
    best_first = sorted(range(old), key=lambda position: (-scores[position], position))
    chosen = count - num_recent
    kept = sorted(best_first[:chosen]) + list(range(old, end))
    if chosen in (0, old):
        return kept, math.inf
    last_in, first_out = scores[best_first[chosen - 1]], scores[best_first[chosen]]
    return kept, float((last_in - first_out) / last_in)


def decide(
    attention: Sequence[torch.Tensor], first: int, num_kv_heads: int, settings: Settings
) -> Decision:
    """What is kept of a prompt.

    Args:
        attention: of each layer, probabilities [H, P, E] of the queries from ``first`` on.
        first: position of the first query that is observed.
        num_kv_heads: see `token_scores`.
        settings: what the user chose.
    """
    prompt_tokens = attention[0].shape[2]
    density = [layer_density(a, first) for a in attention]
    weights = layer_weights(density, settings.budget, settings.uniform_mix)
    blocks = kept_blocks(prompt_tokens, settings)
    full_blocks = prompt_tokens // settings.block_size
    assert blocks < full_blocks, "this prompt is not evicted"
    pages = deal_pages(weights, blocks * len(attention), full_blocks)
    kept_tokens = [n * settings.block_size for n in pages]

    gaps: list[float] = []
    kept: list[list[list[int]]] = []
    for a, count in zip(attention, kept_tokens, strict=True):
        scores = token_scores(a, num_kv_heads, settings.pooling)
        chosen = [kept_of_head(of_head, count) for of_head in scores]
        kept.append([positions for positions, _ in chosen])
        gaps += [gap for _, gap in chosen]
    return Decision(density, weights, pages, kept_tokens, kept, min(gaps))


# --------------------------------------------------------------------------------------------------
# The model


class Oracle:
    """One checkpoint in transformers, float32, eager attention."""

    def __init__(self, path: Path) -> None:
        self.model: PreTrainedModel = tiny_models.load_transformers(path)
        self.processor: ProcessorMixin = AutoProcessor.from_pretrained(path)
        config = self.model.config
        self.image_token: int = self.processor.image_token_id
        self.num_kv_heads: int = config.get_text_config().num_key_value_heads
        language_model: Any = self.model.get_submodule("model.language_model")
        # Of a hybrid model, the layers of full attention; the others are left alone.
        self.attentions = [
            layer.self_attn
            for layer in language_model.layers
            if getattr(layer.self_attn, "sliding_window", None) is None
        ]

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> BatchFeature:
        return self.processor(text=prompt, images=list(images), return_tensors="pt")

    @torch.inference_mode()
    def evict(self, prompt: str, images: Sequence[Image.Image], settings: Settings) -> Eviction:
        """Read the prompt and decide what to keep."""
        inputs = self.inputs(prompt, images)
        ids: list[int] = inputs["input_ids"][0].tolist()
        prompt_tokens = len(ids)
        first = 1 + max(i for i, token in enumerate(ids) if token == self.image_token)
        if settings.max_observation_tokens is not None:
            first = max(first, prompt_tokens - settings.max_observation_tokens)

        cache = DynamicCache(config=self.model.config.get_text_config())
        with self._recorded_attention(first) as attention:  # per layer [H, P, E]
            logits = self.model(**inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1]

        decision = decide(attention, first, self.num_kv_heads, settings)
        return Eviction(**vars(decision), prompt_token_ids=ids, logits=logits, cache=cache)

    def decode(self, eviction: Eviction, num_tokens: int) -> Continuation:
        """Generate greedily from what was kept of the prompt."""
        with self._hidden_evicted(eviction.kept_positions, len(eviction.prompt_token_ids)):
            return self.decode_full(eviction, num_tokens)

    @torch.inference_mode()
    def decode_full(self, eviction: Eviction, num_tokens: int) -> Continuation:
        """Generate greedily from the whole prompt, as if nothing had been evicted."""
        cache = copy.deepcopy(eviction.cache)
        logits = eviction.logits
        token_ids: list[int] = []
        logprobs: list[float] = []
        gaps: list[float] = []
        while True:
            best, second = logits.log_softmax(dim=-1).topk(2).values.tolist()
            token_ids.append(int(logits.argmax()))
            logprobs.append(best)
            gaps.append(best - second)
            if len(token_ids) == num_tokens:
                return Continuation(token_ids, logprobs, gaps)
            last = torch.tensor([token_ids[-1:]])
            logits = self.model(input_ids=last, past_key_values=cache).logits[0, -1]

    @contextmanager
    def _recorded_attention(self, first: int) -> Iterator[list[torch.Tensor]]:
        """Collect, layer by layer, the attention probabilities of the queries from ``first`` on."""
        recorded: list[torch.Tensor] = []

        def record(module: Any, arguments: Any, output: Any) -> None:
            probabilities = output[1]  # [1, H, E, E]
            recorded.append(probabilities[0, :, first:].clone())

        handles = [attention.register_forward_hook(record) for attention in self.attentions]
        try:
            yield recorded
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _hidden_evicted(self, kept: list[list[list[int]]], prompt_tokens: int) -> Iterator[None]:
        """Hide evicted prompt tokens from decoding, by a mask for each layer and head.

        The cache keeps everything, so its length, and with it every position, stays what it is
        without eviction.
        """
        handles = []
        for attention, of_layer in zip(self.attentions, kept, strict=True):
            hidden = torch.full((self.num_kv_heads, prompt_tokens), -math.inf)
            for kv_head, positions in enumerate(of_layer):
                hidden[kv_head, positions] = 0.0
            hidden = hidden.repeat_interleave(attention.num_key_value_groups, dim=0)  # [H, E]

            def mask(
                module: Any,
                arguments: Any,
                keywords: dict[str, Any],
                hidden: torch.Tensor = hidden,
            ) -> tuple[Any, dict[str, Any]]:
                cache: DynamicCache = keywords["past_key_values"]
                # Generated tokens: those in the cache and the one that asks.
                generated = cache.get_seq_length(module.layer_idx) - prompt_tokens + 1
                visible = F.pad(hidden, (0, generated))[None, :, None]  # [1, H, 1, keys]
                return arguments, keywords | {"attention_mask": visible}

            handles.append(attention.register_forward_pre_hook(mask, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
