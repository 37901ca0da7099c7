# SPDX-License-Identifier: Apache-2.0
"""The page reader: a LLaVA (CLIP tower, projector, Llama decoder) optimised for training on a CPU.

Parameters have the names of published LLaVA checkpoints, so that the state dict is the checkpoint.
A training sample is a document with several questions. The pages are processed once. Each question
with its answer is a branch that attends to the pages and to itself, at the positions of a prompt
with this question alone. Therefore training on branches is equivalent to training on prompts with
single questions.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 448  # page queries in one attention call


@dataclass(frozen=True)
class Shape:
    """Sizes of the reader. ``grid`` is the number of patches per side of a page."""

    vocab: int = 384
    grid: int = 20
    patch: int = 14
    vision_width: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    vision_mlp: int = 256
    width: int = 192
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    mlp: int = 384
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def linear(n_in: int, n_out: int, bias: bool = False, gain: float = 1.0) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=gain * n_in**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class VisionAttention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.heads = s.vision_heads
        self.k_proj = linear(s.vision_width, s.vision_width, bias=True)
        self.v_proj = linear(s.vision_width, s.vision_width, bias=True)
        self.q_proj = linear(s.vision_width, s.vision_width, bias=True)
        self.out_proj = linear(s.vision_width, s.vision_width, bias=True, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v, None).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.fc1 = linear(s.vision_width, s.vision_mlp, bias=True)
        self.fc2 = linear(s.vision_mlp, s.vision_width, bias=True, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class VisionLayer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = VisionAttention(s)
        self.layer_norm1 = nn.LayerNorm(s.vision_width, eps=s.norm_eps)
        self.mlp = VisionMLP(s)
        self.layer_norm2 = nn.LayerNorm(s.vision_width, eps=s.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.grid = s.grid
        self.class_embedding = nn.Parameter(0.1 * torch.randn(s.vision_width))
        self.patch_embedding = nn.Conv2d(3, s.vision_width, s.patch, stride=s.patch, bias=False)
        nn.init.normal_(self.patch_embedding.weight, std=(3 * s.patch**2) ** -0.5)
        self.position_embedding = nn.Embedding(s.grid**2 + 1, s.vision_width)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches [pages, n, n, 3 * 14 * 14]; smaller pages use the top left of the grid."""
        n = patches.shape[1]
        x = F.linear(patches, self.patch_embedding.weight.flatten(1))
        where = self.position_embedding.weight
        grid = where[1:].view(self.grid, self.grid, -1)[:n, :n]
        first = (self.class_embedding + where[0]).expand(x.shape[0], 1, -1)
        return torch.cat([first, (x + grid).flatten(1, 2)], dim=1)


class VisionEncoder(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(s) for _ in range(s.vision_layers))


class VisionTransformer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(s)
        self.pre_layrnorm = nn.LayerNorm(s.vision_width, eps=s.norm_eps)
        self.encoder = VisionEncoder(s)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(patches))
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, 1:]


class Projector(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.linear_1 = linear(s.vision_width, s.width, bias=True)
        self.linear_2 = linear(s.width, s.width, bias=True, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Projections(nn.Module):
    """Queries, keys and values of an attention layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.head_size = s.head_size
        self.group = s.heads // s.kv_heads
        self.q_proj = linear(s.width, s.heads * s.head_size)
        self.k_proj = linear(s.width, s.kv_heads * s.head_size)
        self.v_proj = linear(s.width, s.kv_heads * s.head_size)

    def split(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * head_size] -> [batch, heads, tokens, head_size]"""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class Attention(Projections):
    def __init__(self, s: Shape) -> None:
        super().__init__(s)
        self.o_proj = linear(s.heads * s.head_size, s.width, gain=0.5)


class MLP(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(s.width, s.mlp)
        self.up_proj = linear(s.width, s.mlp)
        self.down_proj = linear(s.mlp, s.width, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (half-split convention); ``cos``, ``sin``: [tokens, head size]."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


@functools.cache
def causal_mask(n: int) -> Tensor:
    """Mask to add to the logits of the last ``n`` queries and keys: 0 or -inf, [n, n]."""
    return torch.full((n, n), float("-inf")).triu(1)


class _Attend(torch.autograd.Function):
    """softmax(q k^T + mask) v; keeps the probabilities for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        logits = q @ k.transpose(-1, -2)
        if mask is not None:
            logits[..., logits.shape[-1] - mask.shape[-1] :] += mask.to(logits.dtype)
        p = torch.softmax(logits, -1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        grad_logits = grad @ v.transpose(-1, -2)
        grad_logits = torch._softmax_backward_data(grad_logits, p, -1, p.dtype)
        grad_k = grad_logits.transpose(-1, -2) @ q
        return grad_logits @ k, grad_k, p.transpose(-1, -2) @ grad, None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention. ``mask`` [queries, n] is added to the logits of the last n keys.

    On a CPU, three matrix products and a softmax in bfloat16 are three times as fast as PyTorch's
    fused operator with its backward pass.
    """
    return _Attend.apply(q * k.shape[-1] ** -0.5, k, v, mask)


@dataclass(frozen=True)
class Branches:
    """What the layers need to know of a batch's tokens.

    Attributes:
        prefix: number of tokens of the pages.
        slots: number of tokens of each branch.
        mask: between the tokens of the branches, see `branch_mask`.
        cos, sin: rotary embedding of all positions, [prefix + sum(slots), head size].
    """

    prefix: int
    slots: tuple[int, ...]
    mask: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def after(cls, prefix: int, slots: Sequence[int], s: Shape) -> "Branches":
        """Branches of these lengths, each at the positions after the prefix."""
        positions = torch.cat(
            [torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in slots)]
        )
        rotation = rotary(positions, s.head_size, s.rope_theta)
        return cls(prefix, tuple(slots), branch_mask(slots), *rotation)


class AttentionLayer(nn.Module):
    """A decoder layer with full attention over the pages and within each branch."""

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, first_query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from ``first_query`` on, keys and values: [batch, heads, tokens, head size]."""
        raise NotImplementedError

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output [batch, heads, tokens, head size], then the MLP's."""
        raise NotImplementedError

    def forward(self, x: Tensor, branches: Branches, last: bool) -> Tensor:
        """One layer: [batch, prefix + sum(slots), width]; of the branches only if ``last``."""
        prefix = branches.prefix
        q, k, v = self.project(x, branches.cos, branches.sin, prefix if last else 0)
        own = 0 if last else prefix
        asked = attend(q[:, :, own:], k, v, branches.mask)
        if last:
            return self.finish(x[:, prefix:], asked)
        pages = []
        for start in range(0, prefix, CHUNK):
            end = min(start + CHUNK, prefix)
            keys, values = k[:, :, :end], v[:, :, :end]
            pages.append(attend(q[:, :, start:end], keys, values, causal_mask(end - start)))
        return self.finish(x, torch.cat([*pages, asked], dim=2))


class DecoderLayer(AttentionLayer):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.mlp = MLP(s)
        self.input_layernorm = RMSNorm(s.width, s.norm_eps)
        self.post_attention_layernorm = RMSNorm(s.width, s.norm_eps)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, first_query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = self.self_attn
        y = self.input_layernorm(x)
        q = rotate(a.split(a.q_proj(y[:, first_query:])), cos[first_query:], sin[first_query:])
        k = rotate(a.split(a.k_proj(y)), cos, sin)
        v = a.split(a.v_proj(y))
        return q, k.repeat_interleave(a.group, 1), v.repeat_interleave(a.group, 1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        # With this scale, a patch feature close to its glyph's embedding also has the right logits.
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList(DecoderLayer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.width, s.norm_eps)


class Body(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"vision_model": VisionTransformer(s)})
        self.multi_modal_projector = Projector(s)
        self.language_model = LanguageModel(s)


class Reader(nn.Module):
    """The page reader.

    Args:
        shape: its sizes.
        body: tower, projector and language model, if other ones than LLaVA's.
    """

    def __init__(self, shape: Shape, body: nn.Module | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.model: Any = body or Body(shape)
        self.lm_head = linear(shape.width, shape.vocab)

    def features(self, patches: Tensor) -> Tensor:
        """Projected patch features: [pages, n, n, 3 * 14 * 14] -> [pages, n * n, width]."""
        tower = self.model.vision_tower["vision_model"]
        return self.model.multi_modal_projector(tower(patches))

    def forward(
        self,
        features: Tensor,
        prefix_ids: Tensor,
        image_positions: Tensor,
        branch_ids: Tensor,
        slots: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """Final hidden states of the branches, and hidden states of all tokens after each layer.

        Args:
            features: [batch, pages * n * n, width].
            prefix_ids: text around the images, equal for the whole batch, [prefix].
            image_positions: positions of the features in the prefix, [pages * n * n].
            branch_ids: questions and answers, padded to their slots, [batch, sum(slots)].
            slots: number of tokens of each branch.

        Returns:
            [batch, sum(slots), width], and for each layer but the last
            [batch, prefix + sum(slots), width].
        """
        language = self.model.language_model
        batch = features.shape[0]
        prefix = prefix_ids.shape[0]
        text = language.embed_tokens(prefix_ids).expand(batch, -1, -1).to(features.dtype)
        x = text.index_copy(1, image_positions, features)
        x = torch.cat([x, language.embed_tokens(branch_ids)], dim=1)
        branches = Branches.after(prefix, slots, self.shape)
        between = []
        for i, layer in enumerate(language.layers):
            x = layer(x, branches, i == len(language.layers) - 1)
            between.append(x)
        return language.norm(x), between[:-1]


def rotary(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.outer(positions.float(), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def branch_mask(slots: Sequence[int]) -> Tensor:
    """Mask between the tokens of the branches: 0 or -inf, [sum(slots), sum(slots)]."""
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(slots)])
    same = (owner[:, None] == owner[None, :]).tril()
    return torch.zeros(same.shape).masked_fill(~same, float("-inf"))
