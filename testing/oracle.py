# SPDX-License-Identifier: Apache-2.0
"""A reference implementation of VL-Cache on the eager attention of transformers.

It follows the description of the method (docs/method.md) and shares no code with the product. For
clarity it materialises attention and uses plain loops, so it is slow. Letters: E prompt tokens, P
post-vision tokens, L layers, H query heads.

An eviction concerns whole blocks. The tokens behind the last whole block, the tail, stay. Within a
layer, tokens are counted by their place in its cache, which starts at the oldest kept token.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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

ROW_FILTER = 0.01  # p: density threshold, as a fraction of the row's maximum
RECENT_RATIO = 0.1  # fraction of a layer's kept tokens reserved for the last prompt tokens
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1.0  # clipping bounds of Algorithm 1


@dataclass(frozen=True)
class Settings:
    """Settings of eviction."""

    budget: float
    block_size: int
    pooling: int = 1
    uniform_mix: float = 0.0
    max_observation_tokens: int | None = None
    """Use only this many of the last post-vision tokens as P; None: all."""
    every: int | None = None
    """Evict again when so many tokens have been generated, in whole blocks; None: never."""
    evict_after: int = 0
    """Generated tokens before the first eviction; the last of them is observed with the prompt."""


def _whole(tokens: int, block_size: int) -> int:
    """Tokens in whole blocks."""
    return tokens // block_size * block_size


@dataclass(frozen=True)
class Decision:
    """The layer budgets and the kept tokens, without the tail."""

    density: list[float]  # [L]
    weights: list[float]  # [L]
    pages: list[int]  # [L]
    kept_tokens: list[int]  # [L]
    kept_positions: list[list[list[int]]]  # [L][KV heads], sorted places in the layer's cache
    score_gap: float
    """Smallest relative distance between the lowest kept and the highest evicted score, over layers
    and KV heads. If it is below float32 rounding, either choice is correct."""


@dataclass(frozen=True)
class Eviction(Decision):
    """A decision with the results of the prefill."""

    prompt_token_ids: list[int]
    block_size: int
    attention: list[torch.Tensor]  # for each layer, probabilities [H, P, E]
    logits: torch.Tensor  # [vocabulary], of the first generated token
    cache: DynamicCache  # of the whole prompt


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens with their logprobs, and the gaps to the logprobs of the second best tokens."""

    token_ids: list[int]
    logprobs: list[float]
    gaps: list[float]
    evictions: list[Decision] = field(default_factory=list)  # while it decoded


# --------------------------------------------------------------------------------------------------
# Decisions, from attention probabilities


def layer_density(attention: torch.Tensor, positions: Sequence[int]) -> float:
    """Fraction of causal entries that pass the row filter.

    Args:
        attention: probabilities [H, queries, tokens].
        positions: of the queries.
    """
    kept = causal = 0
    for head in attention:
        for position, row in zip(positions, head, strict=True):
            visible = row[: position + 1]
            kept += int((visible >= ROW_FILTER * visible.max()).sum())
            causal += len(visible)
    return kept / causal


def layer_weights(density: Sequence[float], budget: float, uniform_mix: float) -> list[float]:
    """The weight beta of each layer. ``uniform_mix`` 0 is the method of the paper."""
    num_layers = len(density)
    weights = []
    for d in density:
        fraction = d / sum(density)
        fraction = (1 - uniform_mix) * fraction + uniform_mix / num_layers
        weights.append(min(max(fraction * budget * num_layers, MIN_WEIGHT), MAX_WEIGHT))
    return weights


def kept_blocks(prompt_tokens: int, settings: Settings) -> int:
    """M, in exact arithmetic: 0.1 of 30 blocks is 3, although 0.1 is not exact in binary."""
    num_blocks = math.ceil(Fraction(prompt_tokens, settings.block_size))
    return math.ceil(Fraction(str(settings.budget)) * num_blocks)


def apportion_pages(weights: Sequence[float], total: int, max_pages: Sequence[int]) -> list[int]:
    """Distribute exactly ``total`` pages in proportion to the weights.

    Layer l gets 1 to ``max_pages[l]`` pages.
    """
    assert len(weights) <= total <= sum(max_pages)

    def quotas(scale: float) -> list[float]:
        return [
            min(max(scale * weight, 1.0), float(most))
            for weight, most in zip(weights, max_pages, strict=True)
        ]

    # Find the scale at which the quotas add up to the total, by bisection, because they grow with
    # it. If a bound applies to a layer, the other layers get the difference.
    low, high = 0.0, max(max_pages) / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(quotas(middle)) < total:
            low = middle
        else:
            high = middle
    quota = quotas(high)
    # Quotas that differ from whole numbers only by rounding are whole numbers.
    quota = [float(round(q)) if abs(q - round(q)) < 1e-9 else q for q in quota]

    pages = [math.floor(q) for q in quota]
    by_remainder = sorted(range(len(quota)), key=lambda layer: (pages[layer] - quota[layer], layer))
    for layer in by_remainder[: total - sum(pages)]:
        pages[layer] += 1
    assert sum(pages) == total
    return pages


def token_scores(attention: torch.Tensor, num_kv_heads: int, pooling: int) -> Floats:
    """The scores psi [KV heads, E]: attention of each token from the post-vision queries.

    Args:
        attention: probabilities [H, P, E]; query heads of a KV head are adjacent.
        num_kv_heads: H / num_kv_heads query heads share a KV head.
        pooling: odd kernel size of a moving average over positions; 1 is the method of the paper.
    """
    received = attention.double().sum(dim=1)  # [H, E]
    num_heads, prompt_tokens = received.shape
    group = num_heads // num_kv_heads
    scores = torch.zeros(num_kv_heads, prompt_tokens, dtype=torch.float64)
    for head in range(num_heads):
        scores[head // group] += received[head]
    return F.avg_pool1d(scores, pooling, stride=1, padding=pooling // 2).numpy()


def kept_of_head(scores: Floats, count: int) -> tuple[list[int], float]:
    """The ``count`` positions that a KV head keeps, sorted, and the score gap of `Decision`.

    These are the last ceil(count / 10) tokens and those with the highest scores among the others.
    With equal scores, the lower position is kept.
    """
    end = len(scores)
    num_recent = math.ceil(Fraction(str(RECENT_RATIO)) * count)
    old = end - num_recent
    best_first = sorted(range(old), key=lambda position: (-scores[position], position))
    chosen = count - num_recent
    kept = sorted(best_first[:chosen]) + list(range(old, end))
    if chosen in (0, old):
        return kept, math.inf
    last_in, first_out = scores[best_first[chosen - 1]], scores[best_first[chosen]]
    return kept, float((last_in - first_out) / last_in)


def decide(
    attention: Sequence[torch.Tensor],
    num_kv_heads: int,
    settings: Settings,
    blocks: int,
    tail: int,
    unobserved: int = 0,
) -> Decision:
    """Decide what to keep.

    Args:
        attention: for each layer, probabilities [H, queries, tokens]. The queries are the layer's
            last tokens, without those that are not observed.
        num_kv_heads: see `token_scores`.
        settings: of the method.
        blocks: to keep.
        tail: last tokens, which stay.
        unobserved: tokens between the last query and the one before it.
    """
    density = []
    for a in attention:
        _, queries, tokens = a.shape
        first = tokens - queries - unobserved
        positions = [*range(first, first + queries - 1), tokens - 1]
        density.append(layer_density(a, positions))
    weights = layer_weights(density, settings.budget, settings.uniform_mix)
    full_pages = [(a.shape[2] - tail) // settings.block_size for a in attention]
    assert blocks * len(attention) < sum(full_pages), "nothing would be evicted"
    pages = apportion_pages(weights, blocks * len(attention), full_pages)
    kept_tokens = [n * settings.block_size for n in pages]

    gaps: list[float] = []
    kept: list[list[list[int]]] = []
    for a, count in zip(attention, kept_tokens, strict=True):
        scores = token_scores(a, num_kv_heads, settings.pooling)
        chosen = [kept_of_head(of_head[: a.shape[2] - tail], count) for of_head in scores]
        kept.append([positions for positions, _ in chosen])
        gaps += [gap for _, gap in chosen]
    return Decision(density, weights, pages, kept_tokens, kept, min(gaps))


def decide_prompt(
    attention: Sequence[torch.Tensor], num_kv_heads: int, settings: Settings
) -> Decision:
    """Decide what to keep of a prompt; arguments as for `decide`."""
    tokens = attention[0].shape[2]
    blocks, tail = kept_blocks(tokens, settings), tokens % settings.block_size
    return decide(attention, num_kv_heads, settings, blocks, tail)


def with_tail(kept: list[list[list[int]]], tokens: int, block_size: int) -> list[list[list[int]]]:
    """The kept positions of each layer and KV head, and those of the tail behind them."""
    tail = range(_whole(tokens, block_size), tokens)
    return [[[*head, *tail] for head in layer] for layer in kept]


# --------------------------------------------------------------------------------------------------
# The model


class Oracle:
    """A checkpoint in transformers, float32, with eager attention."""

    def __init__(self, path: Path) -> None:
        self.model: PreTrainedModel = tiny_models.load_transformers(path)
        self.processor: ProcessorMixin = AutoProcessor.from_pretrained(path)
        config = self.model.config
        self.image_token: int = self.processor.image_token_id
        self.num_kv_heads: int = config.get_text_config().num_key_value_heads
        language_model: Any = self.model.get_submodule("model.language_model")
        # The layers with full attention. Other layers of hybrid models are not evicted.
        self.attentions = [
            layer.self_attn
            for layer in language_model.layers
            if getattr(layer.self_attn, "sliding_window", None) is None
        ]

    def inputs(self, prompt: str, images: Sequence[Image.Image]) -> BatchFeature:
        return self.processor(text=prompt, images=list(images), return_tensors="pt")

    @torch.inference_mode()
    def evict(self, prompt: str, images: Sequence[Image.Image], settings: Settings) -> Eviction:
        """Prefill the prompt and decide what to keep."""
        inputs = self.inputs(prompt, images)
        ids: list[int] = inputs["input_ids"][0].tolist()
        prompt_tokens = len(ids)
        first = 1 + max(i for i, token in enumerate(ids) if token == self.image_token)
        if settings.max_observation_tokens is not None:
            first = max(first, prompt_tokens - settings.max_observation_tokens)

        cache = DynamicCache(config=self.model.config.get_text_config())
        with self._recorded_attention(first) as attention:  # per layer [H, P, E]
            logits = self.model(**inputs, past_key_values=cache, logits_to_keep=1).logits[0, -1]

        decision = decide_prompt(attention, self.num_kv_heads, settings)
        return Eviction(
            **vars(decision),
            prompt_token_ids=ids,
            block_size=settings.block_size,
            attention=attention,
            logits=logits,
            cache=cache,
        )

    def decode(
        self, eviction: Eviction, num_tokens: int, settings: Settings | None = None
    ) -> Continuation:
        """Generate greedily with the evicted cache.

        Args:
            eviction: of the prompt.
            num_tokens: to generate.
            settings: with ``every``, to evict again; None: never. With ``evict_after``, the first
                eviction is made here.
        """
        if settings is not None and settings.evict_after:
            return self.decode_full(eviction, num_tokens, settings)
        prompt_tokens = len(eviction.prompt_token_ids)
        visible = with_tail(eviction.kept_positions, prompt_tokens, eviction.block_size)
        return self._generate(eviction, num_tokens, visible, settings)

    def decode_full(
        self, eviction: Eviction, num_tokens: int, settings: Settings | None = None
    ) -> Continuation:
        """Generate greedily with the full cache, which ``settings`` may evict later."""
        everything = [*range(len(eviction.prompt_token_ids))]
        visible = [[everything[:] for _ in range(self.num_kv_heads)] for _ in self.attentions]
        return self._generate(eviction, num_tokens, visible, settings)

    @torch.inference_mode()
    def _generate(
        self,
        eviction: Eviction,
        num_tokens: int,
        visible: list[list[list[int]]],
        settings: Settings | None,
    ) -> Continuation:
        """Generate greedily.

        Args:
            eviction: of the prompt.
            num_tokens: to generate.
            visible: positions that each KV head of each layer still has; updated.
            settings: see `decode`.
        """
        cache = copy.deepcopy(eviction.cache)
        logits = eviction.logits
        result = Continuation([], [], [])
        prompt_tokens = computed = len(eviction.prompt_token_ids)
        # Where counting starts: at the end of what was evicted, or at that of the whole prompt.
        size = eviction.block_size
        start = _whole(prompt_tokens, size)
        if len(visible[0][0]) == prompt_tokens:
            start = math.ceil(prompt_tokens / size) * size
        while True:
            best, second = logits.log_softmax(dim=-1).topk(2).values.tolist()
            result.token_ids.append(int(logits.argmax()))
            result.logprobs.append(best)
            result.gaps.append(best - second)
            if len(result.token_ids) == num_tokens:
                return result
            whole = _whole(computed, size)
            for layer in visible:
                for head in layer:
                    head.append(computed)
            computed += 1
            last = torch.tensor([result.token_ids[-1:]])
            with (
                self._hidden_evicted(visible, computed),
                self._recorded_attention(0) as attention,  # [H, 1, positions]
            ):
                logits = self.model(input_ids=last, past_key_values=cache).logits[0, -1]
            if settings is None:
                continue
            if settings.evict_after and not result.evictions:
                if computed == prompt_tokens + settings.evict_after:
                    result.evictions.append(
                        self._evict_with_prompt(eviction, attention, visible, settings)
                    )
                    start = whole
                continue
            if settings.every is None:
                continue
            growth = math.ceil(settings.every / size)
            if whole - start < growth * size:
                continue
            of_prompt = math.ceil(prompt_tokens / size)
            decision = self._evict_again(
                attention,
                visible,
                settings,
                math.ceil(Fraction(str(settings.budget)) * (of_prompt + growth)),
                computed - whole,
            )
            result.evictions.append(decision)
            start = whole

    def _evict_with_prompt(
        self,
        eviction: Eviction,
        attention: Sequence[torch.Tensor],
        visible: list[list[list[int]]],
        settings: Settings,
    ) -> Decision:
        """Evict for the first time, by the prompt's queries and one more, [H, 1, positions]."""
        prompt_tokens, tokens = len(eviction.prompt_token_ids), attention[0].shape[2]
        observed = [
            torch.cat((F.pad(of_prompt, (0, tokens - prompt_tokens)), last), dim=1)
            for of_prompt, last in zip(eviction.attention, attention, strict=True)
        ]
        whole = _whole(tokens - 1, settings.block_size)  # before this step
        decision = decide(
            observed,
            self.num_kv_heads,
            settings,
            kept_blocks(prompt_tokens, settings),
            tokens - whole,
            tokens - 1 - prompt_tokens,
        )
        for layer, kept in zip(visible, decision.kept_positions, strict=True):
            layer[:] = [[*positions, *range(whole, tokens)] for positions in kept]
        return decision

    def _evict_again(
        self,
        attention: Sequence[torch.Tensor],
        visible: list[list[list[int]]],
        settings: Settings,
        blocks: int,
        tail: int,
    ) -> Decision:
        """Evict by the attention of one query, [H, 1, positions]; ``visible`` is updated."""
        cached = [
            torch.stack(
                [
                    of_query[head][:, layer[head // (len(of_query) // self.num_kv_heads)]]
                    for head in range(len(of_query))
                ]
            )
            for of_query, layer in zip(attention, visible, strict=True)
        ]
        decision = decide(cached, self.num_kv_heads, settings, blocks, tail)
        for layer, kept in zip(visible, decision.kept_positions, strict=True):
            for head, (positions, chosen) in enumerate(zip(layer, kept, strict=True)):
                layer[head] = [positions[i] for i in chosen] + positions[len(positions) - tail :]
        return decision

    @contextmanager
    def _recorded_attention(self, first: int) -> Iterator[list[torch.Tensor]]:
        """Collect the attention probabilities of the queries from ``first`` on, for each layer."""
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
    def _hidden_evicted(self, visible: list[list[list[int]]], tokens: int) -> Iterator[None]:
        """Mask evicted tokens in a decode step, for each layer and head.

        The cache still contains all tokens, so that lengths and positions are the same as without
        eviction.
        """
        handles = []
        for attention, of_layer in zip(self.attentions, visible, strict=True):
            hidden = torch.full((self.num_kv_heads, tokens), -math.inf)
            for kv_head, positions in enumerate(of_layer):
                hidden[kv_head, positions] = 0.0
            hidden = hidden.repeat_interleave(attention.num_key_value_groups, dim=0)  # [H, tokens]

            def mask(
                module: Any,
                arguments: Any,
                keywords: dict[str, Any],
                hidden: torch.Tensor = hidden,
            ) -> tuple[Any, dict[str, Any]]:
                return arguments, keywords | {"attention_mask": hidden[None, :, None]}

            handles.append(attention.register_forward_pre_hook(mask, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
