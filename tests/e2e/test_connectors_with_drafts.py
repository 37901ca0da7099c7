# SPDX-License-Identifier: Apache-2.0
"""KV connectors beside drafts: the draft's layers are stored and loaded with the model's.

Answers must be those of an engine with neither, and loaded blocks give as good drafts as new ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.config import KVTransferConfig

from evaluation.benches import MODEL, ImageBench
from evaluation.cases import page_reader_cases
from evaluation.drafts import DRAFTS as READER_DRAFTS
from testing import engine as harness
from tests.e2e import test_draft_models as drafts
from tests.e2e.test_connectors import WHOLE_PREFILLS
from tests.e2e.test_draft_models import QUESTION, engine, request
from tests.helpers import connectors
from tests.helpers.connectors import (
    abort_and_preempt,
    answers,
    assert_nothing_leaks,
    assert_same,
    check_stores,
)

both_runners = pytest.mark.both_runners

NUM_PROMPTS = 4
QUESTIONS = (QUESTION * 2, QUESTION + QUESTION[::-1])
SETTINGS = {"policy": "vlcache", "budget": 0.25}
SMALL = {"max_model_len": 1024, "kv_cache_memory_bytes": 5 << 20}  # not two rounds of prompts
NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
ASYNC = {"async_scheduling": True}
CHUNKED = {"max_num_batched_tokens": 96}

model, connect = drafts.model, connectors.connect


def prompts(question: str = QUESTIONS[0]) -> list[Any]:
    return [request(10 * number, question, images=2) for number in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def plain(model: Path) -> Callable[..., list[list[RequestOutput]]]:
    """Answers to both questions with neither drafts nor a connector, by the settings."""
    found: dict[str, list[list[RequestOutput]]] = {}

    def ask(settings: dict[str, Any]) -> list[list[RequestOutput]]:
        if str(settings) not in found:
            with engine(model, settings, False, enable_prefix_caching=False) as llm:
                found[str(settings)] = [answers(llm, prompts(question)) for question in QUESTIONS]
        return found[str(settings)]

    return ask


@pytest.mark.parametrize(
    ("connector", "settings", "options"),
    [
        pytest.param("offloading", {}, {}, id="offloading", marks=both_runners),
        pytest.param("offloading", {}, ASYNC | CHUNKED, id="offloading-async-chunked"),
        pytest.param("offloading", {"every": 32}, {}, id="offloading-again-and-again"),
        pytest.param("offloading", {}, {"speculative_config": NGRAMS}, id="offloading-n-grams"),
        pytest.param("simple", {}, ASYNC, id="simple"),
        pytest.param("lmcache", {}, {}, id="lmcache", marks=both_runners),
        pytest.param("lmcache", {}, ASYNC | CHUNKED, id="lmcache-async-chunked"),
        pytest.param("files", {}, WHOLE_PREFILLS, id="files"),
    ],
)
def test_answers_are_those_without_drafts(
    model: Path,
    plain: Callable[..., list[list[RequestOutput]]],
    connect: Callable[[str], KVTransferConfig],
    connector: str,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> None:
    settings = SETTINGS | settings
    expected = plain(settings)  # one engine at a time
    options = SMALL | options | {"kv_transfer_config": connect(connector)}
    with engine(model, settings, disable_log_stats=False, **options) as llm:
        if connector == "lmcache":
            check_stores(llm)
        for _ in range(2):
            for question, answer in zip(QUESTIONS, expected, strict=True):
                assert_same(answers(llm, prompts(question)), answer)
            harness.settle(llm)
            llm.reset_prefix_cache()  # fails while blocks are being copied
        assert harness.eviction_stats(llm).evicted >= 4 * NUM_PROMPTS
        assert metric(llm, "external_prefix_cache_hits") > 0
        assert metric(llm, "spec_decode_num_draft_tokens") > 0
        if connector != "simple":  # which holds blocks until a later step
            assert_nothing_leaks(llm)


def metric(llm: LLM, name: str) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")  # type: ignore[attr-defined]


@pytest.mark.parametrize("connector", ["offloading", "lmcache"])
def test_aborted_and_preempted(
    model: Path,
    plain: Callable[..., list[list[RequestOutput]]],
    connect: Callable[[str], KVTransferConfig],
    connector: str,
) -> None:
    (expected, _), settings = plain(SETTINGS), SETTINGS | {"output_reserve": False}
    options = SMALL | {"kv_cache_memory_bytes": 3 << 20}
    with engine(model, settings, kv_transfer_config=connect(connector), **options) as llm:
        if connector == "lmcache":
            check_stores(llm)
        abort_and_preempt(llm, prompts())
        for one, answer in zip(prompts(), expected, strict=True):
            assert_same(answers(llm, [one]), [answer])
        assert_nothing_leaks(llm)


@both_runners
@pytest.mark.parametrize("connector", ["offloading", "lmcache"])
def test_drafts_are_accepted_after_a_load(
    connect: Callable[[str], KVTransferConfig], connector: str
) -> None:
    """The page reader's EAGLE-3 head; its accepted drafts with a new prefill and a loaded one."""
    cases = page_reader_cases("test", ("row",), 6)
    parameters = [harness.greedy(case.max_tokens) for case in cases]
    for one in parameters:
        one.ignore_eos = False  # the head has not learned what follows
    rounds, accepted = [], []
    with harness.engine(
        MODEL,
        {"policy": "vlcache-plus", "budget": 0.25, "evict_after": 0},
        dtype="float32",
        limit_mm_per_prompt={"image": 4},
        speculative_config=READER_DRAFTS,
        kv_transfer_config=connect(connector),
        disable_log_stats=False,
    ) as llm:
        for _ in range(2):
            outputs = ImageBench(str(MODEL)).outputs(llm, cases, parameters)
            rounds.append([harness.token_ids(output) for output in outputs])
            accepted.append(metric(llm, "spec_decode_num_accepted_tokens"))
            harness.settle(llm)
            assert llm.reset_prefix_cache()
        assert metric(llm, "external_prefix_cache_hits") > 3000
    assert rounds[0] == rounds[1]
    new, loaded = accepted[0], accepted[1] - accepted[0]
    assert new and loaded >= 0.97 * new
