# SPDX-License-Identifier: Apache-2.0
"""The models of the benches in float32 without vLLM, with access to queries, keys and values."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from evaluation.cases import Case
from evaluation.pretrained.scores import score
from evaluation.pretrained.tasks import PretrainedCase
from training.data import Encoder, normalised, patches
from training.drafts.train import load_reader
from training.model import CHUNK, LanguageModel, Shape, causal_mask, rotary
from training.tokenizer import build_tokenizer
from vl_cache_vllm.policy import PatchGrid

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [KV heads, tokens, head size]


@dataclass
class PrefilledPrompt:
    """Pages and question after prefill: the input of eviction."""

    cache: Cache
    queries: list[Tensor]  # of the question, for each layer [tokens, heads, head size]
    pages: int  # tokens up to and including the last visual one
    visual: tuple[tuple[int, int], ...]  # (first, end) positions of each page
    grids: tuple[PatchGrid, ...]  # patch grid of each page, if it has one
    first: int  # the next output token
    expected: list[int]  # output tokens from it on that score; empty if the case does not count
    generated: int = 0  # output tokens before it, which are in the cache

    @property
    def tokens(self) -> int:
        return self.cache[0][0].shape[1]

    @property
    def asked(self) -> int:
        """Tokens of the prompt itself."""
        return self.tokens - self.generated


class OfflineModel:
    """A Llama language model in float32 with access to its KV cache."""

    def __init__(self, shape: Shape, language: LanguageModel, lm_head: nn.Linear) -> None:
        self.shape, self.language, self.lm_head = shape, language, lm_head

    def prefix(self, case: Any) -> Hashable:
        """Equal for cases for which `read` returns the same."""
        raise NotImplementedError

    def read(self, case: Any) -> Cache:
        """The KV cache of a case's prompt, up to the last visual token."""
        raise NotImplementedError

    def ask(self, pages: Cache, case: Any) -> PrefilledPrompt:
        """Prefill the rest of a case's prompt."""
        raise NotImplementedError

    def embed(self, tokens: list[int]) -> Tensor:
        """[tokens, width]"""
        return self.language.embed_tokens(torch.tensor(tokens, dtype=torch.long))

    @torch.no_grad()
    def begin(self, prompt: PrefilledPrompt, tokens: int) -> PrefilledPrompt:
        """Decode the first expected tokens from the full cache, at least one less than there are.

        The result is a prompt that goes on after these tokens, which are observed, too.
        """
        assert 0 < tokens < len(prompt.expected)
        begun = prompt.expected[:tokens]
        hidden, cache, queries = self.run(self.embed(begun), prompt.cache)
        return replace(
            prompt,
            cache=cache,
            queries=[torch.cat(pair) for pair in zip(prompt.queries, queries, strict=True)],
            first=int(self.next_tokens(hidden[-1])),
            expected=prompt.expected[tokens:],
            generated=tokens,
        )

    @torch.no_grad()
    def correct(self, prompt: PrefilledPrompt, cache: Cache) -> Tensor:
        """Which expected tokens are decoded from ``cache``, the kept part of the prompt's.

        Decoding is teacher-forced.

        Returns:
            bool ``[expected tokens]``.
        """
        hidden = self.run(self.embed(prompt.expected[:-1]), cache, prompt.tokens)[0]
        output = torch.cat([torch.tensor([prompt.first]), self.next_tokens(hidden)])
        return output == torch.tensor(prompt.expected)

    def next_tokens(self, hidden: Tensor) -> Tensor:
        """The most likely token after each position, int64 [tokens]."""
        return self.lm_head(hidden).argmax(-1)

    def prefill(self, x: Tensor) -> Cache:
        """The KV cache of a prompt's embeddings, [tokens, width]."""
        cache: Cache = []
        for chunk in x.split(CHUNK):
            cache = self.run(chunk, cache)[1]
        return cache

    def run(
        self, x: Tensor, cache: Cache, position: int | None = None
    ) -> tuple[Tensor, Cache, list[Tensor]]:
        """Final hidden states, extended cache, and queries of tokens that follow ``cache``.

        Args:
            x: embeddings, [tokens, width].
            cache: of the preceding tokens; empty for none.
            position: of the first token; by default the length of the cache.
        """
        n = x.shape[0]
        start = position if position is not None else (cache[0][0].shape[1] if cache else 0)
        cos, sin = rotary(
            torch.arange(start, start + n), self.shape.head_size, self.shape.rope_theta
        )
        x, mask, extended, queries = x[None], causal_mask(n), [], []
        group = self.shape.heads // self.shape.kv_heads
        for i, layer in enumerate(self.language.layers):
            q, k, v = layer.project(x, cos, sin, 0)
            queries.append(q[0].transpose(0, 1))
            keys, values = k[0, ::group], v[0, ::group]
            if cache:
                keys, values = (
                    torch.cat([cache[i][0], keys], 1),
                    torch.cat([cache[i][1], values], 1),
                )
            extended.append((keys, values))
            grouped = q[0].unflatten(0, (-1, group)).flatten(1, 2)  # [KV heads, group * n, size]
            logits = grouped @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
            logits.unflatten(1, (group, n))[..., keys.shape[1] - n :] += mask
            attended = torch.softmax(logits, -1) @ values
            x = layer.finish(x, attended.unflatten(1, (group, n)).flatten(0, 1)[None])
        return self.language.norm(x[0]), extended, queries


class OfflineReader(OfflineModel):
    """The page reader."""

    def __init__(self, folder: Path) -> None:
        tokenizer = build_tokenizer()
        self.encoder = Encoder(tokenizer)
        self.model = load_reader(folder)
        super().__init__(self.model.shape, self.model.model.language_model, self.model.lm_head)

    def prefix(self, case: Case) -> Hashable:
        """The document."""
        return case.group

    @torch.no_grad()
    def read(self, case: Case) -> Cache:
        """The KV cache of a case's pages, up to the last visual token."""
        images = case.load_images()
        pixels = np.stack([patches(np.asarray(image)) for image in images])
        features = self.model.features(normalised(torch.from_numpy(pixels)))
        ids, positions = self.encoder.prefix(len(images), pixels.shape[1])
        x = self.language.embed_tokens(ids).index_copy(0, positions, features.flatten(0, 1))
        return self.prefill(x[: positions[-1] + 1])

    @torch.no_grad()
    def ask(self, pages: Cache, case: Case) -> PrefilledPrompt:
        """Prefill the question of a case after its pages."""
        question = SimpleNamespace(text=case.question, answer=case.answers[0])
        asked, expected = self.encoder.question(question)
        hidden, cache, queries = self.run(self.embed([self.encoder.newline, *asked]), pages)
        num_read, num_pages = pages[0][0].shape[1], len(case.load_images())
        each = num_read // num_pages  # a page and the token before it
        visual = tuple((end - each + 1, end) for end in range(each, num_read + 1, each))
        side = isqrt(each - 1)
        grids = tuple(PatchGrid(begin, side, side, side) for begin, _ in visual)
        first = int(self.next_tokens(hidden[-1]))
        return PrefilledPrompt(cache, queries, num_read, visual, grids, first, expected)


class OfflinePretrained(OfflineModel):
    """The pretrained language model.

    The expected output is that of the case, if it has one. Otherwise it is the full cache's own, if
    that is right: its shortest beginning with the full score. A case that the full cache fails does
    not count.

    Args:
        folder: checkpoint that `evaluation.pretrained.build_model` wrote.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer  # slow to import

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = AutoConfig.from_pretrained(folder).text_config
        shape = Shape(
            vocab=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            mlp=config.intermediate_size,
            rope_theta=config.rope_parameters["rope_theta"],
            norm_eps=config.rms_norm_eps,
        )
        with torch.device("meta"):  # no time for random weights
            language = LanguageModel(shape)
            lm_head = nn.Linear(shape.width, shape.vocab, bias=False)
        with safe_open(folder / "model.safetensors", "pt") as weights:
            for module, prefix in (
                (language, "language_model.model."),
                (lm_head, "language_model.lm_head."),
            ):
                own = {k: weights.get_tensor(prefix + k).float() for k in module.state_dict()}
                module.load_state_dict(own, assign=True)
        super().__init__(shape, language, lm_head)

    def prefix(self, case: PretrainedCase) -> Hashable:
        """The document, and the tokens before it."""
        return case.group, case.before

    @torch.no_grad()
    def read(self, case: PretrainedCase) -> Cache:
        """The KV cache of the tokens before the pages and of the pages."""
        pages = [token for page in case.pages for token in page]
        return self.prefill(self.embed([*case.before, *pages]))

    @torch.no_grad()
    def ask(self, pages: Cache, case: PretrainedCase) -> PrefilledPrompt:
        """Prefill the tokens after the pages."""
        hidden, cache, queries = self.run(self.embed([*case.after]), pages)
        first, each, num_read = len(case.before), len(case.pages[0]), pages[0][0].shape[1]
        visual = tuple((begin, begin + each) for begin in range(first, num_read, each))
        output = int(self.next_tokens(hidden[-1]))
        expected = [*case.output] or self._right_output(cache, output, case)
        return PrefilledPrompt(cache, queries, num_read, visual, (), output, expected)

    def _right_output(self, cache: Cache, first: int, case: PretrainedCase) -> list[int]:
        """The shortest beginning of the greedy output with the full score; empty if there is none.

        Args:
            cache: of the whole prompt.
            first: the first output token.
            case: the question.
        """
        output: list[int] = []
        was_right = False
        for token in self._greedy(cache, first, case.max_tokens):
            output.append(token)
            text = self.tokenizer.decode(output, skip_special_tokens=True)
            is_right = score(case.task, case.form, text, case.answers) == 1.0
            if was_right and is_right:  # one token more does not change the answer
                return output[:-1]
            was_right = is_right
        return output if was_right else []

    def _greedy(self, cache: Cache, token: int, max_tokens: int) -> Iterator[int]:
        """Greedy output tokens, beginning with ``token``, without the end of the sequence."""
        for _ in range(max_tokens):
            if token == self.tokenizer.eos_token_id:
                return
            yield token
            hidden, cache, _ = self.run(self.embed([token]), cache)
            token = int(self.next_tokens(hidden[-1]))
