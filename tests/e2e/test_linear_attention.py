# SPDX-License-Identifier: Apache-2.0
"""Full attention beside linear attention (Qwen3.5), whose groups hold states instead of tokens.

vLLM's kernels of linear attention need bfloat16. Other chunks round other states, so engines are
compared with the oracle rather than with each other.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput, SamplingParams

import testing.random_weights  # noqa: F401  registers the load format
from checks import matrix
from testing import engine as harness
from testing import model_zoo
from testing.attention_recorder import Record, after_hit, recording
from testing.engine import read_trace
from testing.tiny_models import random_image
from vl_cache_vllm.core.pressure import max_blocks

KIND, BLOCK, GROUPS = "qwen3.5", 64, 3
SETTINGS = {"policy": "vlcache", "budget": matrix.BUDGET}
LONG = "Describe everything that you can see in the picture, from left to right. " * 3


@contextmanager
def hybrid(
    models_dir: Path, settings: dict[str, Any] | None, kind: str = KIND, **kwargs: Any
) -> Iterator[LLM]:
    model = model_zoo.build(kind, models_dir / kind)
    with harness.engine(
        model,
        settings,
        dtype=model_zoo.dtype(kind),
        load_format="random",
        trust_remote_code=model_zoo.has_code(kind),
        **kwargs,
    ) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == BLOCK  # a page holds a state
        yield llm


def request(question: str, seed: int, num_images: int = 1, kind: str = KIND) -> dict[str, Any]:
    images = [random_image(seed + number) for number in range(num_images)]
    return {
        "prompt": model_zoo.prompt_for(kind, question, num_images),
        "multi_modal_data": {"image": images},
    }


def ask(llm: LLM, prompt: dict[str, Any]) -> tuple[RequestOutput, list[Record]]:
    with recording(llm) as layers:
        (output,) = llm.generate([prompt], harness.greedy(matrix.NUM_TOKENS), use_tqdm=False)
    return output, layers


def blocks_of_others(llm: LLM) -> int:
    """States that all requests hold in the groups of linear attention."""
    managers = harness.scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    assert len(managers) == GROUPS + 1
    return sum(
        not block.is_null
        for manager in managers
        if manager is not harness.manager(llm)
        for blocks in manager.req_to_blocks.values()
        for block in blocks
    )


@pytest.mark.parametrize("chunk", [2048, 96], ids=["whole", "chunks"])
def test_prefix_hits_and_chunks_are_exact(models_dir: Path, tmp_path: Path, chunk: int) -> None:
    """The second question continues from the state at the last block of the image."""
    trace = tmp_path / "trace"
    settings = SETTINGS | {"trace": {"path": str(trace), "positions": True}}
    with hybrid(models_dir, settings, max_num_batched_tokens=chunk) as llm:
        first, first_layers = ask(llm, request(LONG, 7))
        second, layers = ask(llm, request("And what colour is it? " + LONG, 7))
        again, _ = ask(llm, request("And what colour is it? " + LONG, 7))
        records = list(read_trace(trace).values())
        hit = records[0]["vision_end"] // BLOCK * BLOCK
        assert [o.num_cached_tokens for o in (first, second, again)] == [0, hit, hit]
        for output, layers_of_it, record in (
            (first, first_layers, records[0]),
            (second, after_hit(layers, first_layers, hit), records[1]),
        ):
            assert output.prompt_token_ids is not None
            tokens = len(output.prompt_token_ids)
            row = matrix.compare(
                layers_of_it, tokens, record["vision_end"], record, model_zoo.dtype(KIND)
            )
            assert row is not None
        assert records[2]["kept_positions"] == records[1]["kept_positions"]
        assert harness.token_ids(again) == harness.token_ids(second)


@pytest.mark.parametrize("chunk", [2048, 96], ids=["whole", "chunks"])
def test_mamba_is_exact(models_dir: Path, tmp_path: Path, chunk: int) -> None:
    """Without prefix caching, for which vLLM's CPU kernel of Mamba-2 lacks the states."""
    trace, kind = tmp_path / "trace", "nemotron-nano-vl"
    settings = SETTINGS | {"trace": {"path": str(trace), "positions": True}}
    with hybrid(
        models_dir, settings, kind, enable_prefix_caching=False, max_num_batched_tokens=chunk
    ) as llm:
        rows = []
        for seed in range(3):
            output, layers = ask(llm, request(LONG, seed, kind=kind))
            (*_, record) = read_trace(trace).values()
            assert output.prompt_token_ids is not None
            tokens = len(output.prompt_token_ids)
            end = record["vision_end"]
            rows.append(matrix.compare(layers, tokens, end, record, model_zoo.dtype(kind)))
        assert any(rows)  # None: a near tie


def test_questions_share_the_image_with_few_observed_queries(models_dir: Path) -> None:
    """A state is saved where the image ends, not only where the observation starts."""
    settings = {"policy": "vlcache-plus", "budget": 0.25, "evict_after": 0}
    with hybrid(models_dir, settings) as llm:
        hits = []
        for question in (LONG, "And what colour is it? " + LONG, LONG):
            output, _ = ask(llm, request(question, 7))
            hits.append(output.num_cached_tokens)
        assert harness.eviction_stats(llm).evicted == 3
    assert hits == [0, 2 * BLOCK, 2 * BLOCK]  # the image ends in the third block


@pytest.mark.parametrize("caching", [True, False], ids=["prefix caching", "no prefix caching"])
def test_blocks_of_one_request(models_dir: Path, caching: bool) -> None:
    """States stay; of the full attention's blocks the kept ones and the tail."""
    with hybrid(models_dir, SETTINGS, enable_prefix_caching=caching) as llm:
        engine, pool = llm.llm_engine, harness.scheduler(llm).kv_cache_manager.block_pool
        total = pool.num_gpu_blocks - 1
        engine.add_request("0", request(LONG, 1, 2), harness.greedy(2 * BLOCK))
        engine.step()
        while harness.eviction_stats(llm).evicted == 0:
            engine.step()
        (held,) = harness.scheduler(llm).requests.values()
        prompt = held.num_prompt_tokens
        kept = ceil(ceil(prompt / BLOCK) * matrix.BUDGET)
        for _ in range(BLOCK):
            engine.step()
            tail = -(-(held.num_computed_tokens - prompt // BLOCK * BLOCK) // BLOCK)
            states = blocks_of_others(llm)
            assert GROUPS <= states <= (1 + caching) * GROUPS
            assert pool.get_num_free_blocks() == total - kept - tail - states
        while engine.has_unfinished_requests():
            engine.step()
        assert pool.get_num_free_blocks() == total


def test_nothing_evicted_is_vllm(models_dir: Path) -> None:
    prompts = [request(LONG, seed, 1 + seed % 2) for seed in range(4)]
    outputs = []
    for settings in (None, {"policy": "vlcache", "budget": 1.0}):
        with hybrid(models_dir, settings) as llm:
            found = llm.generate(prompts, harness.greedy(20), use_tqdm=False)
            outputs.append([*map(harness.token_ids, found)])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("when", ["always", "pressure"])
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_random_requests(models_dir: Path, when: str, async_scheduling: bool) -> None:
    """A pool too small for the load, aborts, later evictions: nothing leaks."""
    rng = random.Random(5)
    with hybrid(
        models_dir,
        SETTINGS | {"when": when},
        async_scheduling=async_scheduling,
        max_model_len=1024,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=30,
    ) as llm:
        engine, scheduler = llm.llm_engine, harness.scheduler(llm)
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        added = preempted = 0
        finished: set[str] = set()
        while added < 30 or engine.has_unfinished_requests():
            if added < 30 and len(scheduler.requests) < 8:
                every = rng.choice([None, None, 64])
                params = SamplingParams(
                    temperature=0,
                    max_tokens=rng.choice([2, 40, 150]),
                    ignore_eos=True,
                    extra_args={"kv_evict_every": every},
                )
                prompt = request("What is it? " * rng.randrange(1, 12), rng.randrange(4))
                engine.add_request(str(added), prompt, params)
                added += 1
            finished |= {o.request_id for o in engine.step() if o.finished}
            for held in scheduler.requests.values():
                preempted = max(preempted, held.num_preemptions)
                for manager in managers:
                    if manager is not harness.manager(llm):
                        blocks = manager.req_to_blocks.get(held.request_id, ())
                        states = sum(not block.is_null for block in blocks)
                        assert states <= max_blocks(manager, held.num_tokens)
            if rng.random() < 0.02 and scheduler.requests:
                engine.abort_request([rng.choice([*scheduler.requests])], internal=True)
        stats = harness.eviction_stats(llm)
        assert stats.evicted > 10
        assert len(finished) > 15
        if when == "always":
            assert preempted
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not any(manager.req_to_blocks for manager in managers)
