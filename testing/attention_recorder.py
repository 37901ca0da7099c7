# SPDX-License-Identifier: Apache-2.0
"""Records inputs and outputs of an engine's attention layers, and computes the expected outputs.

This is an oracle for any architecture, because it needs no second implementation of the model. The
queries, keys and values are those that vLLM's layers pass to attention. Those of the prompt
determine which positions must be kept (`testing.oracle`). Together with those of the generated
tokens they determine the expected output of every layer. Letters: T tokens of a request, E prompt
tokens, H query heads, D head size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from vllm import LLM
from vllm.model_executor.layers.attention import Attention, MLAAttention


@dataclass
class Record:
    """One attention layer during one request. Float32; lists have one tensor per step."""

    scale: float
    softcap: float
    window: int | None
    """Maximum number of tokens that a query attends to, including its own; None: no limit. Layers
    with a window are not evicted."""
    query: list[torch.Tensor] = field(default_factory=list)  # [tokens, H, D]
    key: list[torch.Tensor] = field(default_factory=list)  # [tokens, KV heads (MLA: H), D]
    value: list[torch.Tensor] = field(default_factory=list)  # as the keys
    output: list[torch.Tensor] = field(default_factory=list)  # [tokens, H, D]
    is_latent: bool = False
    """Whether all heads share one cached vector for each token (MLA), from which keys and values of
    every head are computed."""
    owner: int | None = None
    """Index of the earlier layer whose keys and values this one reads; None: it has its own."""

    @property
    def num_kv_heads(self) -> int:
        return 1 if self.is_latent else self.key[0].shape[1]

    def logits(self, first: int, end: int) -> torch.Tensor:
        """Causal attention logits of the tokens first to end - 1, float64 [H, end - first, end]."""
        query, key = (torch.cat(part).double() for part in (self.query, self.key))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = torch.einsum("qhd,khd->hqk", query[first:end], key[:end]) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        distance = torch.arange(first, end)[:, None] - torch.arange(end)
        hidden = (distance < 0) | (distance >= (self.window or end))
        return logits.masked_fill(hidden, -torch.inf)

    def expected(
        self, prompt_tokens: int, kept: Sequence[Sequence[int]] | None = None
    ) -> torch.Tensor:
        """The expected outputs of attention, float64 [T, H, D].

        Args:
            prompt_tokens: E.
            kept: by KV head, the prompt positions that later tokens attend to; None: all.
        """
        value = torch.cat(self.value).double()
        logits = self.logits(0, len(value))
        num_heads, num_kv_heads = logits.shape[0], value.shape[1]
        if kept is not None:
            evicted = torch.ones(len(kept), prompt_tokens, dtype=torch.bool)
            for head, positions in enumerate(kept):
                evicted[head, list(positions)] = False
            evicted = evicted.repeat_interleave(num_heads // len(kept), dim=0)
            logits[:, prompt_tokens:, :prompt_tokens].masked_fill_(evicted[:, None], -torch.inf)
        value = value.repeat_interleave(num_heads // num_kv_heads, dim=1)
        return torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), value)

    def distance(self, expected: torch.Tensor) -> float:
        """Largest difference to the recorded outputs, relative to the largest expected output."""
        output = torch.cat(self.output).double()
        return float((output - expected).abs().max() / expected.abs().max())


def owners(layers: Sequence[Record]) -> list[int]:
    """For each layer the index of the one whose keys and values it reads, mostly its own."""
    return [i if layer.owner is None else layer.owner for i, layer in enumerate(layers)]


def attention_of(layers: Sequence[Record], first: int, end: int) -> list[torch.Tensor]:
    """What the tokens first to end - 1 attend to, for each layer that is evicted.

    Heads that read the same KV head are adjacent, whichever layer they are of.

    Returns:
        Probabilities, float64 ``[H, end - first, end]`` for each cache of a layer.
    """
    readers: dict[int, list[torch.Tensor]] = {}
    for owner, layer in zip(owners(layers), layers, strict=True):
        if layer.window is None:
            attention = layer.logits(first, end).softmax(dim=-1)
            readers.setdefault(owner, []).append(attention.unflatten(0, (layer.num_kv_heads, -1)))
    return [torch.cat(parts, dim=1).flatten(0, 1) for parts in readers.values()]


def after_hit(layers: Sequence[Record], earlier: Sequence[Record], hit: int) -> list[Record]:
    """The records of a request whose first tokens were another request's."""
    names = ("query", "key", "value", "output")
    return [
        replace(
            layer,
            **{
                name: [torch.cat(getattr(old, name))[:hit], *getattr(layer, name)] for name in names
            },
        )
        for layer, old in zip(layers, earlier, strict=True)
    ]


@contextlib.contextmanager
def recording(llm: LLM) -> Iterator[list[Record]]:
    """Record all attention layers of the language model, in order. One request at a time."""
    engine = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    context = engine.vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if isinstance(layer, Attention | MLAAttention)]
    records: list[Record] = []
    for layer in layers:
        if isinstance(layer, MLAAttention):
            records.append(Record(layer.scale, 0.0, None, is_latent=True))
            continue
        record = Record(layer.impl.scale, layer.impl.logits_soft_cap or 0.0, layer.sliding_window)
        if (target := layer.kv_sharing_target_layer_name) is not None:
            record.owner = layers.index(context[target])
            owner = records[record.owner]
            record.key, record.value = owner.key, owner.value
        records.append(record)
    with contextlib.ExitStack() as stack:
        for layer, record in zip(layers, records, strict=True):
            # A PyTorch hook would not run: vLLM's Transformers backend calls ``forward`` directly.
            recorded = _recorded_latent if isinstance(layer, MLAAttention) else _recorded
            stack.enter_context(mock.patch.object(layer, "forward", recorded(layer, record)))
        yield records


def _recorded_latent(layer: MLAAttention, record: Record) -> Callable[..., torch.Tensor]:
    forward = layer.forward

    def recorded(
        q: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        heads = layer.num_heads
        both = layer.kv_b_proj(kv_c_normed)[0].view(
            -1, heads, layer.qk_nope_head_dim + layer.v_head_dim
        )
        key, value = both.split([layer.qk_nope_head_dim, layer.v_head_dim], dim=-1)
        rotary = k_pe.view(-1, 1, layer.qk_rope_head_dim).expand(-1, heads, -1)
        record.query.append(q.clone())
        record.key.append(torch.cat((key, rotary), dim=-1))
        record.value.append(value.clone())
        output = forward(q, kv_c_normed, k_pe, *args, **kwargs)
        record.output.append(output.clone().view(-1, heads, layer.v_head_dim))
        return output

    return recorded


def _recorded(layer: Attention, record: Record) -> Callable[..., torch.Tensor]:
    forward = layer.forward
    num_heads, num_kv_heads = layer.num_heads, layer.num_kv_heads

    def recorded(
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        record.query.append(query.clone().view(-1, num_heads, layer.head_size))
        if record.owner is None:
            assert key is not None and value is not None
            record.key.append(key.clone().view(-1, num_kv_heads, layer.head_size))
            record.value.append(value.clone().view(-1, num_kv_heads, layer.head_size))
        output = forward(query, key, value, *args, **kwargs)
        record.output.append(output.clone().view(-1, num_heads, layer.head_size))
        return output

    return recorded
