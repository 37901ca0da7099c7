# SPDX-License-Identifier: Apache-2.0
"""Blocks: what a request holds, what returns to the pool, and how many requests fit."""

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm import LLM

from testing import engine as harness
from testing import tiny_models
from vl_cache_vllm.core.later_evictions import LaterEviction

BLOCK = 32
LONG = "Describe everything that you can see in the picture, from left to right. " * 8


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


@pytest.fixture(scope="module")
def small_image_model(models_dir: Path) -> Path:
    """64 visual tokens an image: decoding makes up a good part of a request's blocks."""
    return tiny_models.build("llava", models_dir / "llava-112", image_size=112)


def pool_of(num_blocks: int) -> dict[str, Any]:
    """Engine arguments for a pool of that many blocks (one of them is the null block)."""
    return {"num_gpu_blocks_override": num_blocks}


def held(llm: LLM, request_id: str) -> list[int]:
    """Ids of the real blocks of a request."""
    blocks = harness.manager(llm).req_to_blocks.get(request_id, [])
    return [block.block_id for block in blocks if not block.is_null]


def spy_on_early_evictions(llm: LLM) -> set[int]:
    """Numbers of the requests that are evicted before they have reached their bound."""
    later, early = harness.manager(llm).later, set()
    take = later.take

    def take_and_note(request_id: str) -> LaterEviction | None:
        taken = take(request_id)
        if taken is not None and taken.is_early:
            early.add(int(request_id.split("-")[0]))
        return taken

    later.take = take_and_note
    return early


def assert_pool_is_whole(llm: LLM) -> None:
    pool = harness.scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    groups = harness.scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    assert not any(group.req_to_blocks for group in groups)
    assert pool.get_usage() == 0


@pytest.mark.both_runners
@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
def test_blocks_of_one_request(model: Path, caching: bool) -> None:
    settings = {"policy": "vlcache", "budget": 0.25}
    with harness.engine(model, settings, enable_prefix_caching=caching) as llm:
        engine = llm.llm_engine
        pool = harness.scheduler(llm).kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1
        request = harness.image_request("llava", LONG, [1])
        engine.add_request("0", request, harness.greedy(3 * BLOCK))
        engine.step()  # prefill
        (request_id,) = harness.scheduler(llm).requests
        prompt_tokens = harness.scheduler(llm).requests[request_id].num_prompt_tokens
        prompt_blocks = -(-prompt_tokens // BLOCK)
        kept_blocks = -(-prompt_blocks // 4)
        assert prompt_blocks > 20
        assert pool.get_num_free_blocks() == total - prompt_blocks - kept_blocks
        for generated in range(1, 3 * BLOCK - 1):
            engine.step()
            # The last block of the prompt stays, and decoding fills it.
            row_blocks = -(-(prompt_tokens % BLOCK + generated) // BLOCK)
            assert len(held(llm, request_id)) == row_blocks
            assert pool.get_num_free_blocks() == total - kept_blocks - row_blocks
        while engine.has_unfinished_requests():
            engine.step()
        assert_pool_is_whole(llm)


# 500 in four cases. V2 runs through Triton's interpreter: a shorter run of the same.
NUM_RANDOM = 125 if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0" else 60
RANDOM_SETTINGS = {"policy": "vlcache", "budget": 0.4}


class RandomRequests(NamedTuple):
    """Requests of one model, and the answers of an ample pool in which nothing is aborted."""

    model: Path
    requests: list[Any]
    params: list[Any]
    answers: list[list[int]]

    def never_evicted(self, number: int) -> bool:
        """Whether the load of the pool makes no difference to a request's answer."""
        is_whole = self.params[number].extra_args.get("kv_budget") == 1.0
        return is_whole or "multi_modal_data" not in self.requests[number]


@pytest.fixture(scope="module")
def random_requests(models_dir: Path) -> Callable[[str], RandomRequests]:
    """By the kind of model."""

    @functools.cache
    def answered(kind: str) -> RandomRequests:
        model = tiny_models.build(kind, models_dir / f"{kind}-112", image_size=112)
        rng = random.Random(7)
        requests, params = [], []
        for _ in range(NUM_RANDOM):
            words = "a picture of " * rng.randrange(1, 12)
            images = rng.choices([[], [rng.randrange(5)], [rng.randrange(5), 9]], [1, 4, 1])[0]
            requests.append(
                harness.image_request(kind, words, images)
                if images
                else {"prompt": f"USER: {words}\nASSISTANT:"}
            )
            own: dict[str, Any] = {"kv_evict_every": rng.choice([None, None, 20, 64])}
            if rng.random() < 0.15:
                own["kv_budget"] = 1.0
            max_tokens = rng.choice([1, 2, 40, 90, 130])
            params.append(harness.greedy(max_tokens, logprobs=None, extra_args=own))
        with harness.engine(
            model, RANDOM_SETTINGS, enable_prefix_caching=False, max_num_seqs=32
        ) as llm:
            outputs = llm.generate(requests, params, use_tqdm=False)
            assert_pool_is_whole(llm)
        return RandomRequests(model, requests, params, [*map(harness.token_ids, outputs)])

    return answered


@pytest.mark.parametrize(
    ("kind", "async_scheduling", "num_blocks", "when"),
    [
        pytest.param("llava", False, 24, "always", id="sync"),
        pytest.param("llava", True, 24, "always", id="async", marks=pytest.mark.both_runners),
        pytest.param("llava-hybrid", True, 44, "always", id="hybrid"),
        pytest.param("llava", True, 40, "pressure", id="pressure"),
    ],
)
def test_random_requests(
    random_requests: Callable[[str], RandomRequests],
    kind: str,
    async_scheduling: bool,
    num_blocks: int,
    when: str,
) -> None:
    """A pool too small for the load, aborts, single tokens: nothing leaks, nobody is disturbed.

    Under pressure, who is evicted depends on the load, and before a preemption, when a bounded
    request is: only the others' answers are known.
    """
    made = random_requests(kind)
    model, requests, params, expected = made
    rng = random.Random(8)
    with harness.engine(
        model,
        {**RANDOM_SETTINGS, "when": when},
        async_scheduling=async_scheduling,
        max_model_len=640,
        max_num_batched_tokens=640,
        **pool_of(num_blocks),
    ) as llm:
        engine, scheduler = llm.llm_engine, harness.scheduler(llm)
        evicted_early = spy_on_early_evictions(llm)
        finished: dict[int, Any] = {}
        preempted: set[int] = set()
        aborted = set()
        next_request = 0
        while next_request < NUM_RANDOM or engine.has_unfinished_requests():
            for _ in range(rng.randrange(4)):
                if next_request < NUM_RANDOM and len(scheduler.requests) < 16:
                    engine.add_request(
                        str(next_request), requests[next_request], params[next_request]
                    )
                    next_request += 1
            for output in engine.step():
                if output.finished:
                    finished[int(output.request_id)] = harness.token_ids(output)
            preempted |= {
                int(r.request_id.split("-")[0])
                for r in scheduler.requests.values()
                if r.num_preemptions
            }
            if rng.random() < 0.02 and scheduler.requests:
                victim = rng.choice([r.split("-")[0] for r in scheduler.requests])
                if int(victim) not in finished:
                    engine.abort_request([victim])
                    aborted.add(int(victim))
        engine.step()
        assert_pool_is_whole(llm)
        manager, stats = harness.manager(llm), harness.eviction_stats(llm)
        assert stats.evicted > NUM_RANDOM // 4
        assert stats.evictions["every"] > NUM_RANDOM // 10
        if when == "pressure":
            assert stats.evictions["pressure"] > 0
        assert preempted and len(aborted) > NUM_RANDOM // 40
        assert not manager.decisions.decided_plans and not manager._evicted
    checked = [i for i in finished if i not in preempted | aborted | evicted_early]
    if when == "pressure":
        checked = [i for i in checked if made.never_evicted(i)]
    assert len(checked) > NUM_RANDOM // (8 if when == "pressure" else 2)
    different = [i for i in checked if finished[i] != expected[i]]
    assert not different


def test_four_times_as_many_sequences(model: Path) -> None:
    """The scheduler's own running count, same pool, same prompts."""

    def most_running(settings: dict[str, Any] | None) -> int:
        requests = [harness.image_request("llava", LONG, [seed]) for seed in range(24)]
        with harness.engine(
            model, settings, **pool_of(100), max_num_seqs=32, max_num_batched_tokens=2048
        ) as llm:
            for i, request in enumerate(requests):
                llm.llm_engine.add_request(str(i), request, harness.greedy(BLOCK))
            most = 0
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                most = max(most, len(harness.scheduler(llm).running))
        return most

    stock = most_running(None)
    assert stock >= 2
    for when in ("always", "pressure"):
        assert most_running({"policy": "vlcache", "budget": 0.1, "when": when}) >= 4 * stock


def test_under_pressure_requests_keep_their_cache_until_blocks_are_scarce(model: Path) -> None:
    """One after another none is evicted; all at once the later ones are; and then none again."""
    settings = {"policy": "vlcache", "budget": 0.1, "when": "pressure"}
    requests = [harness.image_request("llava", LONG, [seed]) for seed in range(8)]
    with harness.engine(
        model, settings, **pool_of(100), max_num_batched_tokens=2048, enable_prefix_caching=False
    ) as llm:

        def evicted(batch: list[Any]) -> int:
            before = harness.eviction_stats(llm).evicted
            llm.generate(batch, harness.greedy(BLOCK), use_tqdm=False)
            assert_pool_is_whole(llm)
            return harness.eviction_stats(llm).evicted - before

        assert [evicted([request]) for request in requests[:3]] == [0, 0, 0]
        assert harness.eviction_stats(llm).skipped == {"no_pressure": 3}
        assert evicted(requests) >= 6
        assert evicted(requests[:1]) == 0


@pytest.mark.parametrize(
    "async_scheduling",
    [False, pytest.param(True, marks=pytest.mark.both_runners)],
    ids=["sync", "async"],
)
def test_running_requests_are_evicted_before_anyone_is_preempted(
    model: Path, async_scheduling: bool
) -> None:
    """Outputs outgrow a pool into which all prompts fit."""
    settings = {"policy": "vlcache", "budget": 0.1, "when": "pressure"}
    requests = [harness.image_request("llava", LONG, [seed]) for seed in range(4)]

    def run(settings: dict[str, Any] | None) -> tuple[int, Any]:
        with harness.engine(
            model,
            settings,
            **pool_of(130),
            async_scheduling=async_scheduling,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        ) as llm:
            for number, request in enumerate(requests):
                llm.llm_engine.add_request(str(number), request, harness.greedy(10 * BLOCK))
            preemptions: dict[str, int] = {}
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                for one in harness.scheduler(llm).requests.values():
                    preemptions[one.request_id] = one.num_preemptions
            assert_pool_is_whole(llm)
            stats = None if settings is None else harness.eviction_stats(llm)
            return sum(preemptions.values()), stats

    preempted, _ = run(None)
    assert preempted > 0
    preempted, stats = run(settings)
    assert preempted == 0
    assert stats.evictions["pressure"] > 0
    assert stats.evictions["prefill"] == 0


def test_requests_that_wait_for_a_seat_are_no_pressure(model: Path) -> None:
    """`max_num_seqs` holds them back, not blocks: evicting would gain nothing."""
    settings = {"policy": "vlcache", "budget": 0.1, "when": "pressure"}
    requests = [harness.image_request("llava", LONG, [seed]) for seed in range(8)]
    with harness.engine(model, settings, **pool_of(200), max_num_seqs=2) as llm:
        llm.generate(requests, harness.greedy(BLOCK), use_tqdm=False)
        assert harness.eviction_stats(llm).skipped == {"no_pressure": 8}


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_small_pool_does_not_thrash(small_image_model: Path, async_scheduling: bool) -> None:
    """The first decode block is scheduled while prompt blocks are held: it must be there."""
    settings = {"policy": "vlcache", "budget": 0.25}
    requests = [
        harness.image_request("llava", "b" * (60 + (i * 37) % 90), [i % 5]) for i in range(30)
    ]
    with harness.engine(
        small_image_model,
        settings,
        async_scheduling=async_scheduling,
        enable_prefix_caching=False,
        max_model_len=384,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        **pool_of(20),
    ) as llm:
        for i, request in enumerate(requests):
            llm.llm_engine.add_request(str(i), request, harness.greedy(64, logprobs=None))
        preemptions: dict[str, int] = {}
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            for request in harness.scheduler(llm).requests.values():
                preemptions[request.request_id] = request.num_preemptions
        assert harness.eviction_stats(llm).evicted >= len(requests)
        assert sum(preemptions.values()) <= 5
        assert_pool_is_whole(llm)


def test_a_prompt_that_does_not_fit_beside_its_survivors_is_left_alone(model: Path) -> None:
    """Rather than waiting for ever for N + M blocks."""
    request = harness.image_request("llava", LONG, [1])
    with harness.engine(
        model, {"policy": "vlcache", "budget": 0.5}, **pool_of(32), max_model_len=960
    ) as llm:
        (output,) = llm.generate([request], harness.greedy(8), use_tqdm=False)
        assert len(harness.token_ids(output)) == 8
        assert [*harness.eviction_stats(llm).skipped] == ["pool_too_small"]
        assert_pool_is_whole(llm)


@pytest.mark.both_runners
def test_workers_forget_at_once(model: Path) -> None:
    """Aborted in the middle of its prefill, with no request after it; and one not to be decoded."""
    with harness.engine(model, {"policy": "vlcache"}, max_num_batched_tokens=300) as llm:
        engine, worker = llm.llm_engine, harness.eviction_worker(llm)
        engine.add_request("0", harness.image_request("llava", LONG, [1]), harness.greedy(9))
        engine.step()
        (state,) = worker.requests._states.values()
        assert state.attention_stats is not None
        (request_id,) = harness.scheduler(llm).requests
        engine.abort_request([request_id], internal=True)
        engine.step()
        assert len(worker.requests) == 0
        engine.add_request("1", harness.image_request("llava", LONG, [2]), harness.greedy(1))
        while engine.has_unfinished_requests():
            engine.step()
            assert all(state.attention_stats is None for state in worker.requests._states.values())
        assert_pool_is_whole(llm)
