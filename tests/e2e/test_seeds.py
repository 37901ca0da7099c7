# SPDX-License-Identifier: Apache-2.0
"""Seeded requests answer the same in however many steps their prompts are read.

vLLM's V1 runner ends on CPU when a seeded prompt takes more than one step; V2's is the same on all
devices.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from testing import engine as harness
from testing import tiny_models
from tests.e2e.test_features import LONG, SETTINGS, answers, questions

NOTHING_EVICTED: dict[str, Any] = {"policy": "vlcache", "budget": 1.0}
CHUNKED: dict[str, Any] = {"max_num_batched_tokens": 64 * 3 + 8, "long_prefill_token_threshold": 64}


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


def sampled(seed: int | None, n: int = 1, **kwargs: Any) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True, **kwargs)


def tokens_of(outputs: Sequence[Any]) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


@pytest.mark.both_runners
def test_a_prompt_longer_than_a_step(model: Path) -> None:
    """The smallest case, which ends unmodified vLLM's V1 runner on CPU."""
    arguments: dict[str, Any] = {"max_num_batched_tokens": 64, "enable_prefix_caching": False}
    request = {"prompt": "one two three four five six seven eight nine ten eleven twelve " * 4}
    with harness.engine(model, enable_prefix_caching=False) as llm:
        (output,) = llm.generate([request], sampled(3), use_tqdm=False)
        expected = tokens_of([output])
        assert len(output.prompt_token_ids) > 64
    dies = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0" and not torch.cuda.is_available()
    with harness.engine(model, **arguments) as llm:
        if dies:
            with pytest.raises(RuntimeError, match="CPU Generator does not use offset"):
                llm.generate([request], sampled(3), use_tqdm=False)
        else:
            assert tokens_of(llm.generate([request], sampled(3), use_tqdm=False)) == expected
    with harness.engine(model, SETTINGS, **arguments) as llm:
        assert answers(llm, [request], sampled(3)) == expected


@pytest.mark.both_runners
def test_several_answers_to_one_image(models_dir: Path) -> None:
    """Prefix hits end before the observed queries: the answers' prompts do not fit one step."""
    model = tiny_models.build("llava", models_dir / "llava-112", image_size=112)
    request = harness.image_request("llava", LONG[:160])
    found = []
    for settings, tokens in (
        (None, 512),
        (NOTHING_EVICTED, 512),
        (SETTINGS, 512),
        (SETTINGS, 2048),
    ):
        with harness.engine(model, settings, max_num_batched_tokens=tokens) as llm:
            (output,) = llm.generate([request], sampled(3, n=4), use_tqdm=False)
            assert len(output.prompt_token_ids) == 242
            found += tokens_of([output])
    stock, nothing_evicted, evicted, in_one_step = found
    assert len({tuple(answer) for answer in stock}) == 4
    assert nothing_evicted == stock
    assert evicted == in_one_step != stock


def test_chunked_prefill(model: Path) -> None:
    """A batch of seeded requests, all kinds of sampling, and one without a seed among them."""
    requests = questions(6)
    parameters = [
        sampled(3, n=2),
        sampled(4, top_k=20),
        sampled(None),
        sampled(3, top_p=0.9, logprobs=2),
        harness.greedy(24),
        sampled(5, presence_penalty=0.5, min_p=0.01),
    ]
    whole = []
    for settings in (None, NOTHING_EVICTED, SETTINGS):
        with harness.engine(model, settings, enable_prefix_caching=False) as llm:
            whole.append(tokens_of(llm.generate(requests, parameters, use_tqdm=False)))
    for outputs in whole:
        del outputs[2]  # another one in each run
    stock, nothing_evicted, evicted = whole
    assert nothing_evicted == stock != evicted
    for settings, expected in ((NOTHING_EVICTED, stock), (SETTINGS, evicted)):
        for async_scheduling in (False, True):
            with harness.engine(
                model,
                settings,
                async_scheduling=async_scheduling,
                enable_prefix_caching=False,
                **CHUNKED,
            ) as llm:
                chunked = answers(llm, requests, parameters)
            del chunked[2]
            assert chunked == expected


def run_counting_preemptions(
    llm: LLM, requests: list[Any], parameters: list[Any]
) -> tuple[list[list[int]], int]:
    """Token ids of each request's answer, and how many requests were preempted after a token."""
    engine = llm.llm_engine
    for number, (request, one) in enumerate(zip(requests, parameters, strict=True)):
        engine.add_request(str(number), request, one)
    finished: dict[str, list[int]] = {}
    preempted: set[str] = set()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = harness.token_ids(output)
        for live in harness.scheduler(llm).requests.values():
            if live.num_preemptions and live.num_output_tokens:
                preempted.add(live.request_id)
    return [finished[str(number)] for number in range(len(requests))], len(preempted)


def test_preempted_requests(model: Path) -> None:
    """They read their prompts again, with their answers so far, and go on with the next number."""
    requests, parameters = questions(6), [sampled(seed) for seed in range(6)]
    for one in parameters:
        one.max_tokens = 200
    with harness.engine(model, enable_prefix_caching=False) as llm:
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        expected = [answer for (answer,) in tokens_of(outputs)]
    for async_scheduling in (False, True):
        with harness.engine(
            model,
            NOTHING_EVICTED,
            async_scheduling=async_scheduling,
            enable_prefix_caching=False,
            num_gpu_blocks_override=40,
            max_model_len=896,
            **CHUNKED,
        ) as llm:
            found, num_preempted = run_counting_preemptions(llm, requests, parameters)
        assert num_preempted > 1
        assert found == expected
