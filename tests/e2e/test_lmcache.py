# SPDX-License-Identifier: Apache-2.0
"""Evicting engines with LMCache, which copies blocks to and from a server's memory.

The server and LMCache's connector are real. Answers must be those of engines without a connector.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.distributed.kv_transfer import get_kv_transfer_group

from testing import lmcache, tiny_models
from testing.engine import (
    abort_and_preempt,
    engine,
    eviction_stats,
    greedy,
    image_request,
    logprobs,
    scheduler,
    token_ids,
)

KIND, BLOCK, NUM_TOKENS, NUM_IMAGES = "llava", 32, 40, 4
START = "Look at the picture with care, from the left to the right and from top to bottom. "
QUESTIONS = (
    START + "What is in it? Name its colours and its shapes, and say where each of them is.",
    START + "Which one is the largest?",
)
SETTINGS = {"policy": "vlcache", "budget": 0.25}
SMALL = {"max_model_len": 1024, "kv_cache_memory_bytes": 4 << 20}  # not two rounds of prompts
# Steps end within a block of a prompt, and within what is computed again of a hit.
CHUNKED = {"max_num_batched_tokens": 88, "max_num_seqs": 2}

both_runners = pytest.mark.both_runners


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build(KIND, models_dir / KIND)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[lmcache.Server]:
    with lmcache.running(tmp_path / "lmcache.log") as running:
        yield running


def prompts(question: str) -> list[Any]:
    return [image_request(KIND, question, [seed]) for seed in range(NUM_IMAGES)]


def answers(llm: LLM, requests: list[Any], tokens: int = NUM_TOKENS) -> list[RequestOutput]:
    return llm.generate(requests, greedy(tokens), use_tqdm=False)


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[bool, list[list[RequestOutput]]]:
    """Answers to both questions without a connector, without (False) and with eviction."""
    found = {}
    for evicts in (False, True):
        with engine(model, SETTINGS if evicts else None, enable_prefix_caching=False) as llm:
            found[evicts] = [answers(llm, prompts(question)) for question in QUESTIONS]
    return found


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert token_ids(one) == token_ids(other)
        assert logprobs(one) == pytest.approx(logprobs(other), rel=0, abs=1e-3)


def settle(llm: LLM) -> None:
    """Run steps until LMCache has released the blocks of the last requests."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step()


def assert_nothing_leaks(llm: LLM) -> None:
    settle(llm)
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block


def stored_chunks(outputs: list[list[RequestOutput]]) -> int:
    """Tokens of the whole chunks of prompts, those that prompts share counted once."""
    chunks = {
        (number, tuple((output.prompt_token_ids or ())[:end]))
        for answer in outputs
        for number, output in enumerate(answer)
        for end in range(lmcache.CHUNK, len(output.prompt_token_ids or ()) + 1, lmcache.CHUNK)
    }
    return len(chunks) * lmcache.CHUNK


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["", "async"])
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="", marks=both_runners), pytest.param(CHUNKED, id="chunked")]
)
def test_store_and_load(
    model: Path,
    server: lmcache.Server,
    alone: dict[bool, list[list[RequestOutput]]],
    options: dict[str, Any],
    async_scheduling: bool,
) -> None:
    """An engine stores, and is stopped; another one that evicts and one of vLLM's load."""
    options = SMALL | options | {"kv_transfer_config": lmcache.config(server.port)}
    for round_ in range(2):
        with engine(model, SETTINGS, async_scheduling, **options) as llm:
            for question, expected in zip(QUESTIONS, alone[True], strict=True):
                assert_same(answers(llm, prompts(question)), expected)
            assert eviction_stats(llm).evicted == 2 * NUM_IMAGES
            assert_nothing_leaks(llm)
        # Prompts only, and each chunk once.
        assert server.count("Stored") == stored_chunks(alone[True])
        assert (server.count("Retrieved") > 0) >= (round_ > 0)
    # What has been stored is right up to the last token.
    loaded = server.count("Retrieved")
    with engine(model, None, async_scheduling, **options) as llm:
        for question, expected in zip(QUESTIONS, alone[False], strict=True):
            found = answers(llm, prompts(question))
            assert_same(found, expected)
            for output in found:
                assert output.num_cached_tokens == len(output.prompt_token_ids) // BLOCK * BLOCK
    assert server.count("Retrieved") > loaded


def test_preempted_and_aborted(
    model: Path, server: lmcache.Server, alone: dict[bool, list[list[RequestOutput]]]
) -> None:
    settings = SETTINGS | {"output_reserve": False}
    options = SMALL | {"kv_cache_memory_bytes": 9 << 18}
    with engine(model, settings, kv_transfer_config=lmcache.config(server.port), **options) as llm:
        abort_and_preempt(llm, prompts(QUESTIONS[0]))
        loaded = server.count("Retrieved")
        for request, answer in zip(prompts(QUESTIONS[0]), alone[True][0], strict=True):
            assert_same(answers(llm, [request]), [answer])
        assert server.count("Retrieved") > loaded
        assert_nothing_leaks(llm)


class LateCopy:
    """A store that copies when it has been asked for its result several times."""

    def __init__(self, polls: int, submit: Any, arguments: Any) -> None:
        self._polls, self._submit, self._arguments = polls, submit, arguments
        self._future: Any = None

    def query(self) -> bool:
        self._polls -= 1
        if self._polls <= 0 and self._future is None:
            self._future = self._submit(*self._arguments)
        return self._future is not None and self._future.query()

    def result(self, timeout: float | None = None) -> Any:
        return self._future.result(timeout)


def test_replaced_blocks_wait_for_their_copies(
    model: Path, server: lmcache.Server, alone: dict[bool, list[list[RequestOutput]]]
) -> None:
    """On GPUs the server copies while later steps run; here copies are made as late as may be."""
    transfer = lmcache.config(server.port)
    # A pool in which the next prompt soon takes what an eviction has freed.
    options = SMALL | {"kv_cache_memory_bytes": 9 << 18}
    with engine(model, SETTINGS, kv_transfer_config=transfer, **options) as llm:
        context = get_kv_transfer_group().worker_adapter.transfer_ctx
        submit, late = context.submit_store, []

        def submit_late(*arguments: Any) -> LateCopy:
            late.append(LateCopy(60, submit, arguments))
            return late[-1]

        context.submit_store = submit_late
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[True][0])
        assert len(late) == NUM_IMAGES
        assert_nothing_leaks(llm)
        context.submit_store = submit
        assert llm.reset_prefix_cache()
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[True][0])
    assert server.count("Retrieved")
    with engine(model, None, kv_transfer_config=transfer, **SMALL) as llm:
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[False][0])


def test_a_server_that_fails_while_it_loads(
    model: Path, server: lmcache.Server, alone: dict[bool, list[list[RequestOutput]]]
) -> None:
    """The requests compute their prompts themselves, and so do those that follow."""
    options = {"lmcache.mp.heartbeat_interval": 0.5, "lmcache.mp.mq_timeout": 5.0}
    transfer = lmcache.config(server.port, **options)
    with engine(model, SETTINGS, kv_transfer_config=transfer, **SMALL) as llm:
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[True][0])
        settle(llm)
        assert llm.reset_prefix_cache()
        adapter = get_kv_transfer_group().worker_adapter
        submit = adapter.submit_retrieve_request

        def stop_server_first(*args: Any, **kwargs: Any) -> Any:
            server.stop()
            return submit(*args, **kwargs)

        adapter.submit_retrieve_request = stop_server_first
        for question, expected in zip(QUESTIONS, alone[True], strict=True):
            assert_same(answers(llm, prompts(question)), expected)
        assert eviction_stats(llm).evicted == 3 * NUM_IMAGES
        assert_nothing_leaks(llm)
