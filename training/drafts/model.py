# SPDX-License-Identifier: Apache-2.0
"""An EAGLE-3 head for the page reader: one decoder layer that drafts tokens.

The head's input at a position is the embedding of the *next* token beside the reader's hidden
states at the position, and its output is about the token after the next. To draft a second token
it takes its own output in place of the reader's hidden states, and so on. Training unrolls these
passes (arXiv 2503.01840, "training-time test"). Parameters have the names that vLLM's
``Eagle3LlamaForCausalLM`` reads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.model import (
    MLP,
    Attention,
    Branches,
    Projections,
    Reader,
    RMSNorm,
    Shape,
    linear,
    rotate,
)

AUX_LAYERS = 1, 3, 5
"""The reader's layers whose inputs the head gets."""
NUM_PASSES = 3


class WideAttention(Attention):
    """Attention over an embedding and a hidden state side by side."""

    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, linear(2 * s.width, getattr(self, name).out_features))


class DraftLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = WideAttention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.width, s.norm_eps)
        self.hidden_norm = RMSNorm(s.width, s.norm_eps)
        self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps)

    def inputs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        x = hidden + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftHead(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.shape = s
        self.fc = linear(len(AUX_LAYERS) * s.width, s.width)
        self.layers = nn.ModuleList([DraftLayer(s)])
        self.norm = RMSNorm(s.width, s.norm_eps)
        self.lm_head = linear(s.width, s.vocab)

    @torch.no_grad()
    def start_as_last_layer(self, reader: Reader) -> None:
        """Start as the reader's last layer, which finds the next token: nearly the right one."""
        assert AUX_LAYERS[-1] == reader.shape.layers - 1
        width, language = reader.shape.width, reader.model.language_model
        theirs, layer = language.layers[-1], self.layers[0]
        self.fc.weight.mul_(0.1)[:, -width:] += torch.eye(width)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight.mul_(0.1)
            weight[:, width:] += getattr(theirs.self_attn, name).weight
        layer.self_attn.o_proj.load_state_dict(theirs.self_attn.o_proj.state_dict())
        layer.mlp.load_state_dict(theirs.mlp.state_dict())
        layer.hidden_norm.load_state_dict(theirs.input_layernorm.state_dict())
        layer.post_attention_layernorm.load_state_dict(theirs.post_attention_layernorm.state_dict())
        self.norm.load_state_dict(language.norm.state_dict())
        self.lm_head.load_state_dict(reader.lm_head.state_dict())

    def forward(self, embedded: Tensor, aux: Sequence[Tensor], branches: Branches) -> list[Tensor]:
        """Logits of the branches' tokens in each pass.

        Args:
            embedded: embeddings of the next tokens, [batch, prefix + sum(slots), width].
            aux: inputs of the reader's `AUX_LAYERS`, each of the same shape.
            branches: where the tokens are.

        Returns:
            For each of `NUM_PASSES`, [batch, sum(slots), vocabulary]. In pass s the output at a
            position is drafted from the reader's hidden states up to s - 1 positions before.
        """
        prefix = branches.prefix
        layer = self.layers[0]
        hidden = self.fc(torch.cat([*aux], -1))
        x = layer.inputs(embedded, hidden)
        q, k, v = self._project(layer.self_attn, x, branches)
        first = k, v
        own: list[tuple[Tensor, Tensor]] = []
        queries, state, logits = q[:, :, prefix:], hidden[:, prefix:], []
        for number in range(NUM_PASSES):
            attended = _attend(queries, *first, branches, own)
            state = layer.finish(state, attended)
            logits.append(self.lm_head(self.norm(state)))
            if number == NUM_PASSES - 1:
                break
            state = state.roll(1, 1)
            x = layer.inputs(embedded[:, prefix:], state)
            after = Branches(0, branches.slots, branches.mask, *_last(branches, x.shape[1]))
            queries, k, v = self._project(layer.self_attn, x, after)
            own = [(a.roll(1, 2), b.roll(1, 2)) for a, b in own] + [(k, v)]
        return logits

    def _project(
        self, a: Projections, x: Tensor, branches: Branches
    ) -> tuple[Tensor, Tensor, Tensor]:
        cos, sin = branches.cos, branches.sin
        q = rotate(a.split(a.q_proj(x)), cos, sin)
        k = rotate(a.split(a.k_proj(x)), cos, sin)
        v = a.split(a.v_proj(x))
        return q, k.repeat_interleave(a.group, 1), v.repeat_interleave(a.group, 1)


def _last(branches: Branches, count: int) -> tuple[Tensor, Tensor]:
    return branches.cos[-count:], branches.sin[-count:]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, branches: Branches, own: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Attention to the first pass's tokens that are as far back as there are later passes.

    Args:
        q: of the branches' tokens, [batch, heads, sum(slots), head size].
        k, v: of the first pass, [batch, heads, prefix + sum(slots), head size].
        branches: where the tokens are.
        own: keys and values of each later pass at the position that the query's pass follows,
            shaped as ``q``.
    """
    q = q * q.shape[-1] ** -0.5
    seen = branches.mask.clone()
    blocked = torch.ones_like(seen, dtype=torch.bool).triu(1 - len(own))
    seen.masked_fill_(blocked, float("-inf"))
    logits = q @ k.transpose(-1, -2)
    logits = logits + F.pad(seen, (branches.prefix, 0)).to(logits.dtype)
    extra = [(q * key).sum(-1, keepdim=True) for key, _ in own]
    p = torch.softmax(torch.cat([logits, *extra], -1).float(), -1).to(v.dtype)
    attended = p[..., : k.shape[2]] @ v
    for index, (_, value) in enumerate(own):
        attended = attended + p[..., k.shape[2] + index, None] * value
    return attended
