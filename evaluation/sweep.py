# SPDX-License-Identifier: Apache-2.0
"""Search for policy settings on the tuning split of a bench, without vLLM.

    python -m evaluation.sweep vlcache:max_observation_tokens=1,recent_ratio=0.02 \\
        --grid shared_scores=0.4,0.55,0.7 lookahead=60,80,100 lookahead_share=0.7,0.8
    python -m evaluation.sweep vlcache vlcache-plus --bench pretrained --samples 40

The pages of a document are prefilled once. Every setting then evicts from the same cache, with the
operations of the product. The output is decoded with teacher forcing. An output that is exact this
way is exact in greedy decoding, too. For dumps the score is the fraction of correct characters,
which overestimates it, because an error does not affect later characters. With the pretrained model
the expected output is the full cache's own, and only cases that the full cache answers count. The
bench `long` asks it for long answers, whose score is the fraction of correct tokens. Use this
module to choose settings and `evaluation.accuracy` to report them.
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
from evaluation.offline import (
    Cache,
    OfflineModel,
    OfflinePretrained,
    OfflineReader,
    PrefilledPrompt,
)
from evaluation.offline_eviction import decode
from evaluation.pretrained.long_answers import TASKS as LONG_TASKS
from testing.cli import make_parser
from testing.results import write_report
from vl_cache_vllm.config import KVCompressConfig

GRADED = ("dump", *LONG_TASKS)


def sweep(
    reader: OfflineModel,
    cases: Iterable[Any],
    configs: dict[str, KVCompressConfig],
    block_size: int,
    later_queries: Sequence[int] = (1,),
) -> dict[str, dict[str, float]]:
    """Mean scores by setting and cell of the tables, the full cache first.

    Args:
        reader: the model.
        cases: the questions.
        configs: the settings by name.
        block_size: tokens per block.
        later_queries: queries that later evictions observe at most. Settings with later evictions
            are measured with each; if they observe more than one, the name says so.
    """
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
        begun: dict[int, PrefilledPrompt | None] = {0: prompt}
        for name, config in configs.items():
            after = config.policy.evict_after
            if after not in begun:  # outputs that end before are never evicted
                begun[after] = reader.begin(prompt, after) if after < len(prompt.expected) else None
            for number in later_queries if config.every else (1,):
                begin, later = begun[after], None
                if begin is not None:
                    later = decode(reader, begin, config, block_size, number)
                correct = full if later is None else torch.cat([full[:after], later])
                label = name if number == 1 else f"{name} observing {number}"
                scores[label][case.cell].append(score(case, correct))
    return {
        name: {cell: sum(values) / len(values) for cell, values in by_cell.items()}
        for name, by_cell in scores.items()
    }


def score(case: Any, correct: Tensor) -> float:
    """Whether all tokens of an output are correct; for long outputs the fraction that are."""
    correct = correct.float()
    return float(correct.mean() if case.task in GRADED else correct.min())


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
    add_case_arguments(parser, split="tune", benches=("page-reader", "pretrained", "long"))
    add("--block-size", type=int, default=32)
    add(
        "--later-queries",
        nargs="+",
        type=int,
        default=[1],
        help="with the setting every: queries that later evictions observe at most (vLLM: 1)",
    )
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
    reader = (
        OfflineReader(MODEL)
        if options.bench == "page-reader"
        else OfflinePretrained(pretrained_model())
    )
    results = sweep(
        reader, tqdm(cases, disable=None), configs, options.block_size, options.later_queries
    )
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
