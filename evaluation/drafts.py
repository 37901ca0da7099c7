# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a draft model are accepted, with whole caches and with evicted ones.

    python -m evaluation.drafts [--samples 50] [--json OUT]

The page reader copies rows and all records of a page, with drafts of its EAGLE-3 head. The draft's
layer is evicted like those of the reader; answers must be the same as without drafts.
"""

from pathlib import Path
from typing import Any

from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

EAGLE3 = Path(__file__).parent.parent / "models" / "page-reader-eagle3"
NUM_DRAFTS = 3
DRAFTS = {"method": "eagle3", "model": str(EAGLE3), "num_speculative_tokens": NUM_DRAFTS}
TASKS = "row", "dump"
CACHES: dict[str, dict[str, Any] | None] = {
    "full cache": None,
    "vlcache-plus": {"policy": "vlcache-plus"},
    "vlcache-plus:evict_after=0": {"policy": "vlcache-plus", "evict_after": 0},
    "vlcache": {"policy": "vlcache"},
}
BUDGETS = 0.1, 0.05


def measure(
    name: str, settings: dict[str, Any] | None, budget: float | None, cases: list[Any]
) -> Row:
    """Ask all cases with drafts, and again without."""
    from evaluation.benches import MODEL, ImageBench
    from testing.engine import greedy, num_evicted, running_llm

    bench, found, row = ImageBench(str(MODEL)), [], {"cache": name, "budget": budget}
    sampling = [greedy(case.max_tokens, logprobs=None) for case in cases]
    for one in sampling:
        one.ignore_eos = False
    for has_drafts in (True, False):
        with running_llm(
            model=bench.model,
            enforce_eager=True,
            block_size=32,
            max_model_len=2048,
            max_num_seqs=4,
            kv_cache_memory_bytes=1 << 28,
            limit_mm_per_prompt={"image": 4},
            async_scheduling=False,
            disable_log_stats=False,
            speculative_config=DRAFTS if has_drafts else None,
            additional_config={"kv_compress": {**settings, "budget": budget}} if settings else {},
        ) as llm:
            outputs = bench.outputs(llm, cases, sampling)
            found.append([output.outputs[0].text for output in outputs])
            if has_drafts:
                row |= counts(llm) | {"evicted": num_evicted(llm.llm_engine)}
    same = sum(map(str.__eq__, *found))
    scores = [bench.score(case, text) for case, text in zip(cases, found[0], strict=True)]
    return row | {
        "answers": len(cases),
        "same_without_drafts": same,
        "score": round(sum(scores) / len(scores), 4),
    }


def counts(llm: Any) -> dict[str, Any]:
    """Shares of accepted drafts, of all and by place, and tokens that a step generates."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}

    def total(name: str) -> int:
        return metrics[f"vllm:spec_decode_num_{name}"].value

    steps = total("drafts")
    by_place = metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return {
        "steps": steps,
        "accepted": round(total("accepted_tokens") / total("draft_tokens"), 4),
        "accepted_by_place": [round(number / steps, 4) for number in by_place[:NUM_DRAFTS]],
        "tokens_per_step": round(1 + total("accepted_tokens") / steps, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--samples", type=int, default=50, help="of each task")
    options = parser.parse_args(arguments)
    set_vllm_environment(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    from evaluation.cases import page_reader_cases

    cases, rows = page_reader_cases("test", TASKS, options.samples), []
    for name, settings in CACHES.items():
        for budget in BUDGETS if settings else (None,):
            rows.append(measure(name, settings, budget, cases))
            print(rows[-1], flush=True)
    if options.json:
        write_report(options.json, "evaluation.drafts", arguments, tasks=[*TASKS], rows=rows)


if __name__ == "__main__":
    main()
