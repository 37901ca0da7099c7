# SPDX-License-Identifier: Apache-2.0
"""Evicting engines with LMCache, which copies blocks to and from a server's memory.

The server and LMCache's connector are real. Answers must be those of engines without a connector.
"""

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.distributed.kv_transfer import get_kv_transfer_group

from testing import lmcache, tiny_models
from testing.engine import (
    engine,
    eviction_stats,
    greedy,
    image_request,
    settle,
)
from tests.helpers.connectors import (
    abort_and_preempt,
    answers,
    assert_nothing_leaks,
    assert_same,
    check_stores,
)

KIND, BLOCK, NUM_IMAGES = "llava", 32, 4
START = "Look at the picture with care, from the left to the right and from top to bottom. "
QUESTIONS = (
    START + "What is in it? Name its colours and its shapes, and say where each of them is.",
    START + "Which one is the largest?",
)
SETTINGS = {"policy": "vlcache", "budget": 0.25}
SMALL = {"max_model_len": 1024, "kv_cache_memory_bytes": 4 << 20}  # not two rounds of prompts
TINY = {"kv_cache_memory_bytes": 9 << 18}
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


@pytest.fixture(scope="module")
def alone(model: Path) -> dict[bool, list[list[RequestOutput]]]:
    """Answers to both questions without a connector, without (False) and with eviction."""
    found = {}
    for evicts in (False, True):
        with engine(model, SETTINGS if evicts else None, enable_prefix_caching=False) as llm:
            found[evicts] = [answers(llm, prompts(question)) for question in QUESTIONS]
    return found


@contextlib.contextmanager
def lmcache_engine(
    model: Path,
    settings: dict[str, Any] | None,
    port: int,
    async_scheduling: bool = False,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[LLM]:
    """An engine whose every store is checked."""
    transfer = lmcache.config(port, **extra or {})
    options = SMALL | options
    with engine(model, settings, async_scheduling, kv_transfer_config=transfer, **options) as llm:
        check_stores(llm)
        yield llm


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
    for round_ in range(2):
        with lmcache_engine(model, SETTINGS, server.port, async_scheduling, **options) as llm:
            for question, expected in zip(QUESTIONS, alone[True], strict=True):
                assert_same(answers(llm, prompts(question)), expected)
            assert eviction_stats(llm).evicted == 2 * NUM_IMAGES
            assert_nothing_leaks(llm)
        # Prompts only, and each chunk once.
        assert server.count("Stored") == stored_chunks(alone[True])
        assert (server.count("Retrieved") > 0) >= (round_ > 0)
    # What has been stored is right up to the last token.
    loaded = server.count("Retrieved")
    with lmcache_engine(model, None, server.port, async_scheduling, **options) as llm:
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
    with lmcache_engine(model, settings, server.port, **TINY) as llm:
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

    def finish(self) -> None:
        if self._future is None:
            self._future = self._submit(*self._arguments)

    def query(self) -> bool:
        self._polls -= 1
        if self._polls <= 0:
            self.finish()
        return self._future is not None and self._future.query()

    def result(self, timeout: float | None = None) -> Any:
        return self._future.result(timeout)


@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["", "chunked"])
def test_replaced_blocks_wait_for_their_copies(
    model: Path,
    server: lmcache.Server,
    alone: dict[bool, list[list[RequestOutput]]],
    options: dict[str, Any],
) -> None:
    """On GPUs the server copies while later steps run; here copies are made as late as may be.

    In this pool the next prompt soon takes what an eviction has freed.
    """
    with lmcache_engine(model, SETTINGS, server.port, **TINY | options) as llm:
        context = get_kv_transfer_group().worker_adapter.transfer_ctx
        submit, flush, late = context.submit_store, context.flush_inflight_stores, []

        def submit_late(*arguments: Any) -> LateCopy:
            late.append(LateCopy(60, submit, arguments))
            return late[-1]

        def finish_all() -> None:
            for copy in late:
                copy.finish()

        context.submit_store, context.flush_inflight_stores = submit_late, finish_all
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[True][0])
        assert len(late) >= NUM_IMAGES
        assert_nothing_leaks(llm)
        context.submit_store, context.flush_inflight_stores = submit, flush
        assert llm.reset_prefix_cache()
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[True][0])
    assert server.count("Retrieved")
    with lmcache_engine(model, None, server.port) as llm:
        assert_same(answers(llm, prompts(QUESTIONS[0])), alone[False][0])


def test_a_server_that_fails_while_it_loads(
    model: Path, server: lmcache.Server, alone: dict[bool, list[list[RequestOutput]]]
) -> None:
    """The requests compute their prompts themselves, and so do those that follow."""
    extra = {"lmcache.mp.heartbeat_interval": 0.5, "lmcache.mp.mq_timeout": 5.0}
    with lmcache_engine(model, SETTINGS, server.port, extra=extra) as llm:
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


EARLY_LOOKUP = {"lmcache.mp.eager_prefetch": True, "lmcache.mp.nonblocking_lookup_status": False}


def fail_retrieves(request_id: str | None = None) -> None:
    """Let the next load of a request fail, or all loads."""
    adapter = get_kv_transfer_group().worker_adapter
    submit, failed = adapter.submit_retrieve_request, set()

    def fail(name: str, op: Any, *args: Any, **kwargs: Any) -> None:
        if request_id is not None and (not name.startswith(request_id) or name in failed):
            submit(name, op, *args, **kwargs)
            return
        failed.add(name)
        adapter.error_block_ids.update(op.flat_block_ids)
        adapter._failed_request_ids.add(name)
        adapter._dropped_retrieves.add(name)

    adapter.submit_retrieve_request = fail


def tokens(seed: int, number: int) -> list[int]:
    return random.Random(seed).choices(range(20, 60), k=number)


def test_a_load_that_fails_behind_a_local_hit(model: Path, server: lmcache.Server) -> None:
    """What has been hit is computed in steps that end within a chunk."""
    start = tokens(1, 200)
    with lmcache_engine(model, SETTINGS, server.port, **CHUNKED) as llm:
        answers(llm, [{"prompt_token_ids": start}], 2)
        settle(llm)
        assert llm.reset_prefix_cache()
        answers(llm, [{"prompt_token_ids": start[:70]}], 2)
        fail_retrieves()
        answers(llm, [{"prompt_token_ids": start + tokens(2, 300)}], 2)
        settle(llm)
    assert server.count("Stored") == 480  # each chunk once


def test_a_hit_that_vllm_ignores(model: Path, server: lmcache.Server) -> None:
    """With ``prompt_logprobs`` vLLM computes the whole prompt."""
    start = tokens(1, 200)
    options = {"extra": EARLY_LOOKUP, **CHUNKED}
    with lmcache_engine(model, SETTINGS, server.port, **options) as llm:
        answers(llm, [{"prompt_token_ids": start}], 2)
        settle(llm)
        assert llm.reset_prefix_cache()
        parameters = greedy(2, prompt_logprobs=1)
        prompt: Any = {"prompt_token_ids": start + tokens(2, 300)}
        llm.llm_engine.add_request("all", prompt, parameters)
        time.sleep(0.5)  # for the lookup
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
    assert server.count("Stored") == 480 and not server.count("Retrieved")


def test_a_load_that_fails_beside_one_that_does_not(model: Path, server: lmcache.Server) -> None:
    """The request then finds what the other one has loaded, of which LMCache does not know."""
    texts = ["".join(random.Random(seed).choices("abcdefghij ", k=260)) for seed in range(2)]
    options = {"extra": EARLY_LOOKUP, "max_model_len": 1400, "kv_cache_memory_bytes": 3 << 20}
    requests: list[Any] = [image_request(KIND, text, [0]) for text in texts]
    with lmcache_engine(model, SETTINGS, server.port, **options) as llm:
        answers(llm, [image_request(KIND, "What?", [0])], 2)
        settle(llm)
        assert llm.reset_prefix_cache()
        fail_retrieves("fails")
        core, steps = llm.llm_engine, 0
        core.add_request("loads", requests[0], greedy(60))
        core.add_request("fails", requests[1], greedy(500))
        time.sleep(0.5)
        while core.has_unfinished_requests():
            core.step()
            steps += 1
            if steps % 4 == 0 and steps < 400:  # others take what has been freed
                other: Any = image_request(KIND, "And this?", [steps])
                core.add_request(f"other-{steps}", other, greedy(30))
        assert eviction_stats(llm).evicted > 2
    with engine(model, None, enable_prefix_caching=False) as llm:
        expected = answers(llm, requests)
    with lmcache_engine(model, None, server.port, **options) as llm:
        assert_same(answers(llm, requests), expected)
