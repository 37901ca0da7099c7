# SPDX-License-Identifier: Apache-2.0
"""Search for policy settings on the tuning split of a bench, without vLLM.

    python -m evaluation.sweep vlcache:max_observation_tokens=1,recent_ratio=0.02 \\
        --grid shared_scores=0.4,0.55,0.7 lookahead=60,80,100 lookahead_share=0.7,0.8
    python -m evaluation.sweep vlcache vlcache-plus --bench pretrained --samples 40

The pages of a document are prefilled once. Every setting then evicts from the same cache, with the
operations of the product. The output is decoded with teacher forcing. An output that is exact this
way is exact in greedy decoding, too. For dumps the score is the fraction of correct characters,
which overestimates it, because an error does not affect later characters. With the pretrained model
the expected output is the full cache's own, and only cases that the full cache answers count. Use
this module to choose settings and `evaluation.accuracy` to report them.
"""

import itertools
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.accuracy import parse_policy
from evaluation.benches import MODEL, add_case_arguments, bench_cases, pretrained_model
from evaluation.offline import Cache, OfflinePretrained, OfflineReader, Prefill, PrefilledPrompt
from testing.cli import make_parser
from testing.results import write_report
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.admission import plan_eviction
from vl_cache_vllm.policy import Prompt
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.selection import select_kept
from vl_cache_vllm.worker.source import EvictionSource


def evict(
    prompt: PrefilledPrompt, config: KVCompressConfig, block_size: int
) -> list[Tensor] | None:
    """Positions that each layer keeps, [KV heads, kept]; None if no block would be freed.

    Raises:
        ValueError: for a policy whose observation window includes the pages, because their queries
            are not recorded.
    """
    policy, tokens, num_layers = config.policy, prompt.tokens, len(prompt.cache)
    asked = tokens - prompt.generated
    plan = plan_eviction(config, block_size, asked, prompt.pages)
    if not plan.kept_blocks:
        return None
    start = policy.observation_start(prompt.pages, asked)
    if start < prompt.pages:
        raise ValueError(f"{policy.name}: the observation window must not include the pages")
    num_kv_heads = prompt.cache[0][0].shape[0]
    observed = AttentionStats(config, num_layers, num_kv_heads, asked, torch.device("cpu"))
    scale = prompt.cache[0][0].shape[-1] ** -0.5
    ranges = [(start, asked)]
    if prompt.generated:
        ranges.append((tokens - 1, tokens))
    for first, end in ranges:
        if end > observed.tokens:
            observed.extend(end)
        for i, ((keys, _), queries) in enumerate(zip(prompt.cache, prompt.queries, strict=True)):
            seen = queries[first - prompt.pages : end - prompt.pages]
            observed.add(i, seen, keys, first, scale, 0.0)
    num_heads = prompt.queries[0].shape[1]
    selection = select_kept(
        config,
        observed,
        observed.dense_entries,
        Prompt(tokens, prompt.visual, prompt.grids),
        num_heads,
        sum(end - first for first, end in ranges),
        plan.kept_blocks,
        EvictionSource.of_prompt(tokens, num_layers, block_size),
        max(0, prompt.generated - 1),
    )
    sizes = (selection.kept_pages * block_size).tolist()
    tail = torch.arange(tokens // block_size * block_size, tokens).expand(num_kv_heads, -1)
    return [
        torch.cat((row[:, :size], tail), 1)
        for row, size in zip(selection.positions, sizes, strict=True)
    ]


def kept(cache: Cache, positions: list[Tensor]) -> Cache:
    """The cache of these positions only."""
    return [
        tuple(t.gather(1, p[..., None].expand(-1, -1, t.shape[-1])) for t in layer)
        for layer, p in zip(cache, positions, strict=True)
    ]


def sweep(
    reader: Prefill,
    cases: Iterable[Any],
    configs: dict[str, KVCompressConfig],
    block_size: int,
) -> dict[str, dict[str, float]]:
    """Mean scores by setting and cell of the tables, the full cache first."""
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    prefix: Hashable = None
    pages: Cache = []
    for case in cases:
        if reader.prefix(case) != prefix:
            prefix, pages = reader.prefix(case), reader.read(case)
        prompt = reader.ask(pages, case)
        if not prompt.expected:
            continue
        full = reader.correct(prompt, prompt.cache)
        scores["full cache"][case.cell].append(score(case, full))
        begun = {0: prompt}
        for name, config in configs.items():
            correct, after = full, config.policy.evict_after
            if after < len(prompt.expected):  # shorter outputs are never evicted
                if after not in begun:
                    begun[after] = reader.begin(prompt, after)
                positions = evict(begun[after], config, block_size)
                if positions is not None:
                    cache = kept(begun[after].cache, positions)
                    later = reader.correct(begun[after], cache)
                    correct = torch.cat([full[:after], later])
            scores[name][case.cell].append(score(case, correct))
    return {
        name: {cell: sum(values) / len(values) for cell, values in by_cell.items()}
        for name, by_cell in scores.items()
    }


def score(case: Any, correct: Tensor) -> float:
    """Whether all tokens of an output are correct; for dumps the fraction that are."""
    correct = correct.float()
    return float(correct.mean() if case.task == "dump" else correct.min())


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
    add_case_arguments(parser, split="tune", benches=("page-reader", "pretrained"))
    add("--block-size", type=int, default=32)
    options = parser.parse_args(arguments)
    try:
        configs = {}
        for text in settings(options.policies, options.grid):
            config = KVCompressConfig.from_dict(parse_policy(text) | {"budget": options.budget})
            assert config is not None
            configs[text] = config
        cases = bench_cases(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    pretrained = options.bench == "pretrained"
    reader = OfflinePretrained(pretrained_model()) if pretrained else OfflineReader(MODEL)
    results = sweep(reader, tqdm(cases, disable=None), configs, options.block_size)
    full = results["full cache"]

    def gap(name: str) -> float:
        return min(results[name][cell] - full[cell] for cell in full)

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
