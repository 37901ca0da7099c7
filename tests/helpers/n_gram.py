# SPDX-License-Identifier: Apache-2.0
"""Answers with and without n-gram drafts, as JSON; run as a program by tests/e2e/test_features.py.

In a process of its own: vLLM's n-gram proposer loads numba, and the start of a later engine in the
same process (0.32: the search for Triton kernels to override) fails at one of its modules.

    python -m tests.helpers.n_gram MODEL
"""

import json
import sys
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  chooses the runner
from testing import engine as harness
from tests.e2e.test_features import SETTINGS, answers, questions

BUDGETS = (0.25, 1.0, 0.1, 1.0, 0.25, 0.5, 1.0, 0.1)
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def main(model: Path) -> None:
    """Without drafts first."""
    requests = questions(len(BUDGETS))
    parameters = [harness.greedy(150, extra_args={"kv_budget": budget}) for budget in BUDGETS]
    results: list[dict[str, Any]] = []
    for drafts in (None, DRAFTS):
        with harness.engine(
            model, SETTINGS, speculative_config=drafts, disable_log_stats=False
        ) as llm:
            result: dict[str, Any] = {"answers": answers(llm, requests, parameters)}
            result["evicted"] = harness.eviction_stats(llm).evicted
            counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
            for name in ("draft", "accepted"):
                result[name] = counts.get(f"vllm:spec_decode_num_{name}_tokens", 0)
        results.append(result)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
