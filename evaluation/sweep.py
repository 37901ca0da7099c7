# SPDX-License-Identifier: Apache-2.0
"""Search for policy settings on the tuning split of the page reader, without vLLM.

    python -m evaluation.sweep vlcache:max_observation_tokens=1,recent_ratio=0.02 \\
        --grid shared_scores=0.4,0.55,0.7 lookahead=60,80,100 lookahead_share=0.7,0.8

The pages of a document are prefilled once. Every setting then evicts from the same cache, with the
operations of the product. The output is decoded with teacher forcing. An output that is exact this
way is exact in greedy decoding, too. For dumps the score is the fraction of correct characters,
which overestimates it, because an error does not affect later characters. Use this module to choose
settings and `evaluation.accuracy` to report them.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from evaluation.accuracy import MODEL, parse_policy
from evaluation.cases import SPLITS, Case, page_reader_cases
from testing.cli import make_parser
from testing.results import write_report
from training.data import Encoder, normalised, patches
from training.model import Reader, Shape, causal_mask, rotary
from training.pages import TASKS
from training.tokenizer import build_tokenizer
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.policy import PatchGrid, Prompt
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.selection import select_kept

Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [KV heads, tokens, head size]


@dataclass
class PrefilledPrompt:
    """Pages and question after prefill: the input of eviction."""

    cache: Cache
    queries: list[Tensor]  # of the question, for each layer [tokens, heads, head size]
    pages: int  # tokens up to and including the last visual one
    visual: tuple[tuple[int, int], ...]  # (first, end) positions of each page
    grids: tuple[PatchGrid, ...]  # patch grid of each page
    first: int  # the first output token

    @property
    def tokens(self) -> int:
        return self.cache[0][0].shape[1]


class OfflineReader:
    """The page reader in float32, with access to its KV cache."""

    def __init__(self, folder: Path) -> None:
        tokenizer = build_tokenizer()
        self.encoder = Encoder(tokenizer)
        self.model = Reader(Shape(vocab=len(tokenizer)))
        weights = load_file(folder / "model.safetensors")
        wanted = self.model.state_dict()  # without the norm of the unused class token
        self.model.load_state_dict({name: weights[name].float() for name in wanted})

    @torch.no_grad()
    def read(self, case: Case) -> Cache:
        """The KV cache of a case's pages, up to the last visual token."""
        images = case.load_images()
        pixels = np.stack([patches(np.asarray(image)) for image in images])
        features = self.model.features(normalised(torch.from_numpy(pixels)))
        ids, positions = self.encoder.prefix(len(images), pixels.shape[1])
        x = self.model.model.language_model.embed_tokens(ids)
        x = x.index_copy(0, positions, features.flatten(0, 1))
        return self._run(x[: positions[-1] + 1], [])[1]

    @torch.no_grad()
    def ask(self, pages: Cache, case: Case) -> PrefilledPrompt:
        """Prefill the question of a case after its pages."""
        asked = [self.encoder.newline, *self._tokens(case)[0]]
        x = self.model.model.language_model.embed_tokens(torch.tensor(asked))
        hidden, own, queries = self._run(x, pages)
        first = int(self.model.lm_head(hidden[-1]).argmax())
        cache = [
            (torch.cat([k, own_k], 1), torch.cat([v, own_v], 1))
            for (k, v), (own_k, own_v) in zip(pages, own, strict=True)
        ]
        num_read, num_pages = pages[0][0].shape[1], len(case.load_images())
        each = num_read // num_pages  # a page and the token before it
        visual = tuple((end - each + 1, end) for end in range(each, num_read + 1, each))
        side = isqrt(each - 1)
        grids = tuple(PatchGrid(begin, side, side, side) for begin, _ in visual)
        return PrefilledPrompt(cache, queries, num_read, visual, grids, first)

    @torch.no_grad()
    def score(self, prompt: PrefilledPrompt, cache: Cache, case: Case) -> float:
        """The score of the output that is decoded from ``cache``, the kept part of the prompt's."""
        expected = self._tokens(case)[1]
        x = self.model.model.language_model.embed_tokens(torch.tensor(expected[:-1]))
        hidden = self._run(x, cache, prompt.tokens)[0]
        output = torch.cat([torch.tensor([prompt.first]), self.model.lm_head(hidden).argmax(-1)])
        correct = (output == torch.tensor(expected)).float()
        return float(correct.mean() if case.task == "dump" else correct.min())

    def _tokens(self, case: Case) -> tuple[list[int], list[int]]:
        question = SimpleNamespace(text=case.question, answer=case.answers[0])
        return self.encoder.question(question)

    def _run(
        self, x: Tensor, cache: Cache, position: int | None = None
    ) -> tuple[Tensor, Cache, list[Tensor]]:
        """Final hidden states, keys and values, and queries of tokens that follow ``cache``.

        Args:
            x: embeddings, [tokens, width].
            cache: of the preceding tokens; empty for none.
            position: of the first token; by default the length of the cache.
        """
        language = self.model.model.language_model
        n = x.shape[0]
        start = position if position is not None else (cache[0][0].shape[1] if cache else 0)
        shape = self.model.shape
        cos, sin = rotary(torch.arange(start, start + n), shape.head_size, shape.rope_theta)
        x, mask, own, queries = x[None], causal_mask(n), [], []
        for i, layer in enumerate(language.layers):
            q, k, v = layer.project(x, cos, sin, 0)
            group = layer.self_attn.group
            own.append((k[0, ::group], v[0, ::group]))
            queries.append(q[0].transpose(0, 1))
            if cache:
                past = (t.repeat_interleave(group, 0)[None] for t in cache[i])
                k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            logits[..., -n:] += mask
            x = layer.finish(x, torch.softmax(logits, -1) @ v)
        return language.norm(x[0]), own, queries


def evict(
    prompt: PrefilledPrompt, config: KVCompressConfig, block_size: int
) -> list[Tensor] | None:
    """Kept positions of each layer, [KV heads, kept]; None if no block would be freed.

    Raises:
        ValueError: for a policy whose observation window includes the pages, because their queries
            are not recorded.
    """
    policy, tokens, num_layers = config.policy, prompt.tokens, len(prompt.cache)
    plan = plan_eviction(config, block_size, tokens, prompt.pages)
    if not plan.kept_blocks:
        return None
    start = policy.observation_start(prompt.pages, tokens)
    if start < prompt.pages:
        raise ValueError(f"{policy.name}: the observation window must not include the pages")
    num_kv_heads = prompt.cache[0][0].shape[0]
    observed = AttentionStats(config, num_layers, num_kv_heads, tokens, torch.device("cpu"))
    for i, ((keys, _), queries) in enumerate(zip(prompt.cache, prompt.queries, strict=True)):
        scale = keys.shape[-1] ** -0.5
        observed.add(i, queries[start - prompt.pages :], keys, start, scale, 0.0)
    num_heads = prompt.queries[0].shape[1]
    selection = select_kept(
        config,
        observed,
        observed.dense_entries,
        Prompt(tokens, prompt.visual, prompt.grids),
        num_heads,
        start,
        plan.kept_blocks,
        block_size,
    )
    sizes = (selection.kept_pages * block_size).tolist()
    return [row[:, :size] for row, size in zip(selection.positions, sizes, strict=True)]


def kept(cache: Cache, positions: list[Tensor]) -> Cache:
    """The cache of these positions only."""
    return [
        tuple(t.gather(1, p[..., None].expand(-1, -1, t.shape[-1])) for t in layer)
        for layer, p in zip(cache, positions, strict=True)
    ]


def sweep(
    reader: OfflineReader,
    cases: Iterable[Case],
    configs: dict[str, KVCompressConfig],
    block_size: int,
) -> dict[str, dict[str, float]]:
    """Mean scores by setting and task, the full cache first."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    document, pages = "", []
    for case in cases:
        if case.group != document:
            document, pages = case.group, reader.read(case)
        prompt = reader.ask(pages, case)
        full = reader.score(prompt, prompt.cache, case)
        scores["full cache"][case.task].append(full)
        for name, config in configs.items():
            positions = evict(prompt, config, block_size)
            score = full
            if positions is not None:
                score = reader.score(prompt, kept(prompt.cache, positions), case)
            scores[name][case.task].append(score)
    return {
        name: {task: sum(values) / len(values) for task, values in by_task.items()}
        for name, by_task in scores.items()
    }


def settings(policies: Sequence[str], grid: Sequence[str]) -> list[str]:
    """Each policy with every combination of the grid's values.

    Raises:
        ValueError: for an entry of the grid without ``=`` and values.
    """
    axes = []
    for axis in grid:
        name, sign, values = axis.partition("=")
        if not (sign and values):
            raise ValueError(f"{axis!r}: expected setting=value,value,...")
        axes.append([f"{name}={value}" for value in values.split(",")])
    result = []
    for policy in policies:
        for combination in itertools.product(*axes):
            extra = ",".join(combination)
            result.append(policy + ("," if ":" in policy else ":") + extra if extra else policy)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("policies", nargs="+", metavar="NAME[:KEY=VALUE,...]")
    add(
        "--grid",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,...",
        help="use every combination of these values",
    )
    add("--budget", type=float, default=0.1)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--samples", type=int, default=500, help="cases per task")
    add("--split", choices=SPLITS, default="tune")
    add("--block-size", type=int, default=32)
    options = parser.parse_args(arguments)
    try:
        configs = {}
        for text in settings(options.policies, options.grid):
            config = KVCompressConfig.from_dict(parse_policy(text) | {"budget": options.budget})
            assert config is not None
            configs[text] = config
    except ValueError as error:
        parser.error(str(error))
    cases = page_reader_cases(options.split, options.tasks, options.samples)
    results = sweep(OfflineReader(MODEL), tqdm(cases, disable=None), configs, options.block_size)
    full = results["full cache"]

    def gap(name: str) -> float:
        return min(results[name][task] - full[task] for task in full)

    print("worst difference to the full cache, then percent of " + ", ".join(full))
    ranked = sorted(results, key=gap, reverse=True)
    for name in ranked:
        scores = " ".join(f"{100 * score:6.1f}" for score in results[name].values())
        print(f"{100 * gap(name):6.1f}  {scores}  {name}")
    if options.json:
        in_order = {name: results[name] for name in ranked}
        write_report(options.json, "evaluation.sweep", arguments, results=in_order)


if __name__ == "__main__":
    main()
