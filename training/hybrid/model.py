# SPDX-License-Identifier: Apache-2.0
"""The page reader as a hybrid: an LFM2-VL with short convolutions and few layers of full attention.

Parameters have the names of published LFM2-VL checkpoints. One visual token is one patch, as in the
page reader, and everything else is built and trained like the page reader too (`training.model`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data import Encoder
from training.model import (
    AttentionLayer,
    Branches,
    Projections,
    Projector,
    Reader,
    RMSNorm,
    Shape,
    VisionEncoder,
    linear,
    rotate,
)
from training.tokenizer import build_tokenizer

IMAGE_START, IMAGE_END = "<|image_start|>", "<|image_end|>"
HEAD_GAIN = 0.25  # of the last norm, because the tied embeddings are larger than a head's weights


@dataclass(frozen=True)
class HybridShape(Shape):
    """Sizes of the hybrid reader. ``full_attention`` are the layers with it."""

    layers: int = 8
    heads: int = 3
    kv_heads: int = 3
    full_attention: tuple[int, ...] = (2, 5, 7)
    kernel: int = 3


class MLP(nn.Module):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.w1 = linear(s.width, s.mlp)
        self.w3 = linear(s.width, s.mlp)
        self.w2 = linear(s.mlp, s.width, gain=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(Projections):
    def __init__(self, s: HybridShape) -> None:
        super().__init__(s)
        self.out_proj = linear(s.heads * s.head_size, s.width, gain=0.5)
        self.q_layernorm = RMSNorm(s.head_size, s.norm_eps)
        self.k_layernorm = RMSNorm(s.head_size, s.norm_eps)


class FullAttention(AttentionLayer):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.self_attn = Attention(s)
        self.feed_forward = MLP(s)
        self.operator_norm = RMSNorm(s.width, s.norm_eps)
        self.ffn_norm = RMSNorm(s.width, s.norm_eps)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, first_query: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        a = self.self_attn
        y = self.operator_norm(x)
        q = a.q_layernorm(a.split(a.q_proj(y[:, first_query:])))
        k = rotate(a.k_layernorm(a.split(a.k_proj(y))), cos, sin)
        v = a.split(a.v_proj(y))
        q = rotate(q, cos[first_query:], sin[first_query:])
        return q, k.repeat_interleave(a.group, 1), v.repeat_interleave(a.group, 1)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.out_proj(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.ffn_norm(x))


class ShortConvolution(nn.Module):
    """A gated causal convolution of each channel."""

    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.conv = nn.Conv1d(s.width, s.width, s.kernel, groups=s.width, bias=False)
        nn.init.normal_(self.conv.weight, std=s.kernel**-0.5)
        self.in_proj = linear(s.width, 3 * s.width)
        self.out_proj = linear(s.width, s.width, gain=0.5)

    def forward(self, x: Tensor, branches: Branches) -> Tensor:
        """[batch, prefix + sum(slots), width] -> the same; each branch follows the prefix."""
        before, after, x = self.in_proj(x).chunk(3, dim=-1)
        x = before * x
        past = self.conv.kernel_size[0] - 1
        pages, *asked = x.split((branches.prefix, *branches.slots), dim=1)
        first, last = torch.zeros_like(pages[:, :past]), pages[:, -past:]
        parts = [first, pages]
        for branch in asked:
            parts += [last, branch]
        y = torch.cat(parts, dim=1)
        # The output at a token is that of the window that ends there.
        weight = self.conv.weight.squeeze(1).to(y.dtype)
        y = sum(y[:, i : y.shape[1] - past + i] * weight[:, i] for i in range(past + 1))
        lengths = [branches.prefix]
        for n in branches.slots:
            lengths += [past, n]
        y = torch.cat(y.split(lengths, dim=1)[::2], dim=1)
        return self.out_proj(after * y)


class ConvolutionLayer(nn.Module):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.conv = ShortConvolution(s)
        self.feed_forward = MLP(s)
        self.operator_norm = RMSNorm(s.width, s.norm_eps)
        self.ffn_norm = RMSNorm(s.width, s.norm_eps)

    def forward(self, x: Tensor, branches: Branches, last: bool) -> Tensor:
        """One layer: [batch, prefix + sum(slots), width]; of the branches only if ``last``."""
        x = x + self.conv(self.operator_norm(x), branches)
        if last:
            x = x[:, branches.prefix :]
        return x + self.feed_forward(self.ffn_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocab, s.width)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers = nn.ModuleList(
            FullAttention(s) if i in s.full_attention else ConvolutionLayer(s)
            for i in range(s.layers)
        )
        self.embedding_norm = RMSNorm(s.width, s.norm_eps)
        nn.init.constant_(self.embedding_norm.weight, HEAD_GAIN)

    @property
    def norm(self) -> RMSNorm:
        """The last norm, by LLaVA's name."""
        return self.embedding_norm


class Embeddings(nn.Module):
    """SigLIP 2's embeddings of patches: [pages, n, n, 3 * 14 * 14] -> [pages, n * n, width]."""

    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.grid = s.grid
        self.patch_embedding = linear(3 * s.patch**2, s.vision_width, bias=True)
        self.position_embedding = nn.Embedding(s.grid**2, s.vision_width)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def forward(self, patches: Tensor) -> Tensor:
        n = patches.shape[1]
        grid = self.position_embedding.weight.view(self.grid, self.grid, -1)[:n, :n]
        return (self.patch_embedding(patches) + grid).flatten(1, 2)


class Tower(nn.Module):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.embeddings = Embeddings(s)
        self.encoder = VisionEncoder(s)
        self.post_layernorm = nn.LayerNorm(s.vision_width, eps=s.norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embeddings(patches)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Body(nn.Module):
    def __init__(self, s: HybridShape) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleDict({"vision_model": Tower(s)})
        self.multi_modal_projector = Projector(s)
        self.language_model = LanguageModel(s)


class HybridReader(Reader):
    """The hybrid reader. Its head is the embedding table, as in every LFM2."""

    def __init__(self, shape: HybridShape) -> None:
        super().__init__(shape, Body(shape))
        self.lm_head.weight = self.model.language_model.embed_tokens.weight


class HybridEncoder(Encoder):
    """Encodes prompts as LFM2-VL's processor does: with a token before and after each image."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer((IMAGE_START, IMAGE_END))
        super().__init__(tokenizer)
        self.vocab = len(tokenizer)
        self._around = tokenizer.convert_tokens_to_ids([IMAGE_START, IMAGE_END])

    def _page(self, grid: int) -> list[int]:
        start, end = self._around
        *image, newline = super()._page(grid)
        return [start, *image, end, newline]
