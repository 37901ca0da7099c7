# SPDX-License-Identifier: Apache-2.0
"""Nobody reads a page that eviction gave back: freed pages are overwritten at once."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from testing import engine as harness
from testing import tiny_models

LONG = "Describe everything that you can see in the picture, from left to right. " * 6
SETTINGS: dict[str, Any] = {"policy": "vlcache", "budget": 0.15, "max_observation_tokens": 64}


# Whoever attends to it answers otherwise, or not at all. Not NaN: vLLM's CPU kernel multiplies the
# unwritten rest of a request's last block by zero, so that stock vLLM would answer NaN, too.
POISON = 1e30


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava-112", image_size=112)


def poison(llm: LLM) -> list[int]:
    """Overwrite every page now, and a block's pages in the moment when it has no owner left.

    Returns a list that grows by the ids of overwritten blocks. They are no prefix of anything any
    more, so that whoever reads one of them reads the poison.
    """
    pool = harness.eviction_worker(llm).pool
    block_pool = harness.scheduler(llm).kv_cache_manager.block_pool
    free_blocks = block_pool.free_blocks
    poisoned: list[int] = []

    def free_and_overwrite(ordered_blocks: Iterable[Any]) -> None:
        blocks = list(ordered_blocks)
        free_blocks(blocks)
        freed = [b.block_id for b in blocks if b.ref_cnt == 0 and not b.is_null]
        block_pool.evict_blocks(set(freed))
        for layer in range(pool.num_layers):
            pool.pages[pool.page_ids(layer, torch.tensor(freed, dtype=torch.int64))] = POISON
        poisoned.extend(freed)

    pool.pages.fill_(POISON)
    block_pool.free_blocks = free_and_overwrite
    return poisoned


def mixed_requests() -> tuple[list[Any], list[Any]]:
    """Images and text, short and long answers, whole and small budgets."""
    rng = random.Random(5)
    requests: list[Any] = []
    parameters = []
    for number in range(24):
        if number % 4 == 3:
            requests.append({"prompt": "Hello " * rng.randint(5, 60)})
        else:
            question = LONG[: rng.randint(40, len(LONG))]
            requests.append(harness.image_request("llava", question, [number % 5]))
        budget = rng.choice((0.05, 0.15, 0.5, 1.0))
        extra = {"kv_budget": budget}
        parameters.append(harness.greedy(rng.randint(2, 90), extra_args=extra))
    return requests, parameters


@pytest.mark.parametrize(
    "async_scheduling",
    [pytest.param(False, marks=pytest.mark.both_runners), True],
    ids=["sync", "async"],
)
def test_freed_pages_are_read_by_nobody(model: Path, async_scheduling: bool) -> None:
    """Chunked prefills, preemptions and evictions beside each other, in a pool too small."""
    requests, parameters = mixed_requests()
    with harness.engine(model, SETTINGS, enable_prefix_caching=False) as llm:
        quiet = llm.generate(requests, parameters, use_tqdm=False)
    with harness.engine(
        model,
        SETTINGS,
        async_scheduling=async_scheduling,
        num_gpu_blocks_override=40,
        max_model_len=1024,
        max_num_batched_tokens=128,
    ) as llm:
        poisoned = poison(llm)
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        assert harness.eviction_stats(llm).evicted > 10
        assert len(poisoned) > 200
    for output, expected in zip(outputs, quiet, strict=True):
        assert harness.token_ids(output) == harness.token_ids(expected)
        assert all(torch.isfinite(torch.tensor(harness.logprobs(output))))


@pytest.mark.parametrize(
    "async_scheduling",
    [False, pytest.param(True, marks=pytest.mark.both_runners)],
    ids=["sync", "async"],
)
def test_pages_that_later_evictions_free_are_read_by_nobody(
    model: Path, async_scheduling: bool
) -> None:
    """Beside requests that are evicted once or never, in a pool that all fit into."""
    requests, parameters = mixed_requests()
    for number, params in enumerate(parameters):
        params.max_tokens = 40 + 10 * (number % 9)
        params.extra_args |= {"kv_evict_every": (None, 20, 32)[number % 3]}
    with harness.engine(model, SETTINGS, enable_prefix_caching=False, max_num_seqs=1) as llm:
        alone = llm.generate(requests, parameters, use_tqdm=False)
    with harness.engine(
        model, SETTINGS, async_scheduling=async_scheduling, max_num_batched_tokens=128
    ) as llm:
        poisoned = poison(llm)
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        assert harness.eviction_stats(llm).evictions["every"] > 15
        assert len(poisoned) > 200
        assert not any(r.num_preemptions for r in harness.scheduler(llm).requests.values())
    for output, expected in zip(outputs, alone, strict=True):
        assert harness.token_ids(output) == harness.token_ids(expected)


@pytest.mark.both_runners
def test_a_shared_prefix_outlives_the_eviction_of_one(model: Path) -> None:
    """Three requests hold the same cached blocks; one is evicted, two go on reading them."""
    request = harness.image_request("llava", LONG, [3])
    budgets = (1.0, 0.15, 1.0)
    parameters = [harness.greedy(40, extra_args={"kv_budget": budget}) for budget in budgets]
    with harness.engine(model, SETTINGS, enable_prefix_caching=False) as llm:
        quiet = llm.generate([request] * 3, parameters, use_tqdm=False)
    with harness.engine(model, SETTINGS) as llm:
        poisoned = poison(llm)
        engine = llm.llm_engine
        outputs = {}

        def step() -> None:
            for output in engine.step():
                if output.finished:
                    outputs[output.request_id] = output

        engine.add_request("0", request, parameters[0])
        step()  # the prefix is there, and held
        engine.add_request("1", request, parameters[1])
        engine.add_request("2", request, parameters[2])
        step()
        shared = [
            {b.block_id for b in harness.manager(llm).req_to_blocks[r] if not b.is_null}
            for r in harness.scheduler(llm).requests
        ]
        assert len(shared) == 3
        while engine.has_unfinished_requests():
            step()
            if not outputs:
                assert not set(poisoned) & (shared[0] & shared[2])
        assert harness.eviction_stats(llm).evicted == 1
        assert len(shared[0] & shared[2]) > 5
        assert poisoned
    for number, expected in enumerate(quiet):
        assert harness.token_ids(outputs[str(number)]) == harness.token_ids(expected)
