# SPDX-License-Identifier: Apache-2.0
"""What a second question costs if it goes on from the cache that the first one left.

    python -m evaluation.compressed_turns [--documents 60] [--json OUT]

Conversations of two questions about one document. The prompt of the first one is evicted at its
end, as in the product. The second question is then appended

- to the whole cache ("full"): a new prefill, or a hit of the prefix cache,
- to the evicted cache ("compressed"),
- to the whole cache, which is evicted for the second question ("evicted anew"): what the product
  does in the second turn.

Only second questions count that the full cache answers. Decoding is teacher-forced, without vLLM.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from evaluation.accuracy import parse_policy
from evaluation.benches import MODEL, pretrained_model
from evaluation.cases import page_reader_cases
from evaluation.offline import Cache, OfflineModel, OfflinePretrained, OfflineReader
from evaluation.offline_eviction import evict, kept
from evaluation.pretrained.tasks import NEXT_USER, pretrained_cases
from testing.cli import make_parser
from testing.results import Row, write_report
from vl_cache_vllm.config import KVCompressConfig

POLICY = "vlcache-plus:evict_after=0"
BUDGETS = 0.1, 0.2, 0.4
BLOCK_SIZE = 32
TASKS = {
    "page-reader": ("lookup", "row", "dump"),
    "pretrained": ("fact", "needle", "copy8", "list"),
}


def next_turn(model: OfflineModel, case: Any) -> list[int]:
    """The tokens of a question after an answer."""
    if isinstance(model, OfflineReader):
        return [model.encoder.user, *_encoded(model, case)[0]]
    assert isinstance(model, OfflinePretrained)
    question = model.tokenizer.decode(case.after).lstrip()
    return model.tokenizer.encode(NEXT_USER + question, add_special_tokens=False)


def _encoded(model: OfflineReader, case: Any) -> tuple[list[int], list[int]]:
    """The tokens of a question and of its answer."""
    return model.encoder.question(SimpleNamespace(text=case.question, answer=case.answers[0]))


def pairs(model: OfflineModel, cases: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Two questions about each document, of different tasks where there are several."""
    for _, group in itertools.groupby(cases, model.prefix):
        of_document = [*group]
        if len(of_document) > 1:
            yield of_document[0], of_document[-1]


@torch.no_grad()
def scores(
    model: OfflineModel, first: Any, second: Any, configs: dict[float, KVCompressConfig]
) -> dict[str, list[bool]] | None:
    """Which expected tokens of the second answer are right; None if the full cache fails."""
    prompt = model.ask(model.read(first), first)
    if not prompt.expected:
        return None
    turn = [*prompt.expected, *next_turn(model, second)]

    def asked(cache: Cache) -> Any:
        hidden, after, queries = model.run(model.embed(turn), cache, prompt.tokens)
        return int(model.next_tokens(hidden[-1])), after, queries

    token, cache, queries = asked(prompt.cache)
    if isinstance(model, OfflinePretrained):
        expected = model._right_output(cache, token, second)
    else:
        assert isinstance(model, OfflineReader)
        expected = _encoded(model, second)[1]
    if not expected:
        return None
    whole = replace(
        prompt,
        cache=cache,
        queries=[torch.cat(pair) for pair in zip(prompt.queries, queries, strict=True)],
        first=token,
        expected=expected,
    )
    full = model.correct(whole, cache)
    if not full.all():
        return None
    found = {"full": full.tolist()}
    for budget, config in configs.items():
        positions = evict(prompt, config, BLOCK_SIZE)
        anew = evict(whole, config, BLOCK_SIZE)
        if positions is None or anew is None:
            return None
        token, after, _ = asked(kept(prompt.cache, positions))
        one = replace(whole, first=token)
        found[f"compressed {budget}"] = model.correct(one, after).tolist()
        found[f"evicted anew {budget}"] = model.correct(whole, kept(cache, anew)).tolist()
    return found


def measure(bench: str, documents: int) -> list[Row]:
    """A row for each way and budget: the share of second answers that stay right."""
    model: OfflineModel
    cases: Sequence[Any]
    if bench == "page-reader":
        model = OfflineReader(MODEL)
        cases = page_reader_cases("test", TASKS[bench], documents)
    else:
        model = OfflinePretrained(pretrained_model())
        cases = pretrained_cases(model.tokenizer, "test", TASKS[bench], ["chat"], documents)
    configs = {budget: parse_config(budget) for budget in BUDGETS}
    right: dict[str, list[bool]] = defaultdict(list)
    tokens: dict[str, list[float]] = defaultdict(list)
    asked = 0
    for first, second in itertools.islice(pairs(model, cases), documents):
        asked += 1
        if (found := scores(model, first, second, configs)) is None:
            continue
        for way, correct in found.items():
            right[way].append(all(correct))
            tokens[way].append(sum(correct) / len(correct))
    return [
        {
            "bench": bench,
            "way": way,
            "conversations": asked,
            "counted": len(values),
            "right": round(sum(values) / len(values), 4),
            "right_tokens": round(sum(tokens[way]) / len(values), 4),
        }
        for way, values in right.items()
    ]


def parse_config(budget: float) -> KVCompressConfig:
    config = KVCompressConfig.from_dict(parse_policy(POLICY) | {"budget": budget})
    assert config is not None
    return config


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=int, default=60, help="of each model")
    parser.add_argument("--bench", nargs="+", choices=[*TASKS], default=[*TASKS])
    options = parser.parse_args(arguments)
    rows = []
    for bench in options.bench:
        for row in measure(bench, options.documents):
            rows.append(row)
            print(row, flush=True)
    if options.json:
        write_report(
            options.json, "evaluation.compressed_turns", arguments, policy=POLICY, rows=rows
        )


if __name__ == "__main__":
    main()
