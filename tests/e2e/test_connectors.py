# SPDX-License-Identifier: Apache-2.0
"""Evicting engines with KV connectors: what is stored, loaded and kept, and when blocks are freed.

Answers and kept positions must be those of an engine without a connector.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.config import KVTransferConfig
from vllm.v1.request import Request
from vllm.v1.simple_kv_offload import manager

from testing import offloading, tiny_models
from testing.engine import (
    engine,
    eviction_stats,
    greedy,
    image_request,
    read_trace_lines,
    scheduler,
)
from tests.helpers.connectors import (
    NUM_TOKENS,
    abort_and_preempt,
    answers,
    assert_nothing_leaks,
    assert_same,
    example_config,
)

KIND = "llava"
BLOCK, NUM_IMAGES = 32, 6
BLOCK_BYTES = 64 << 10  # at least, of all layers
# The observed part of the first prompt has a full block, which a hit must not cover.
QUESTIONS = (
    "What is in the picture? Tell all that you see, from the left to the right.",
    "Which colours does it have?",
)
SETTINGS = {"policy": "vlcache", "budget": 0.25}
TINY = 9 << 18
SMALL = {"max_model_len": 1024, "kv_cache_memory_bytes": 5 << 20}  # not two rounds of prompts
# What `ExampleConnector` needs.
WHOLE_PREFILLS = {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048}

both_runners = pytest.mark.both_runners
schedulers = pytest.mark.parametrize("async_scheduling", [False, True], ids=["", "async"])
offloads = pytest.mark.parametrize(
    ("host_blocks", "options"),
    [
        pytest.param(1024, {}, id="", marks=both_runners),
        pytest.param(1024, {"max_num_batched_tokens": 96}, id="chunked"),
        # Copies fail for lack of room, and are tried again.
        pytest.param(40, {}, id="little-host-memory"),
    ],
)


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build(KIND, models_dir / KIND)


def prompts(question: str = QUESTIONS[0], seeds: Sequence[int] = range(NUM_IMAGES)) -> list[Any]:
    return [image_request(KIND, question, [seed]) for seed in seeds]


def settings_with_trace(path: Path, **settings: Any) -> dict[str, Any]:
    return SETTINGS | settings | {"trace": {"path": str(path), "positions": True}}


def kept_positions(path: Path) -> list[Any]:
    """Of each eviction, in the order in which the requests were sent."""
    records = read_trace_lines(path)
    records.sort(key=lambda record: int(record["request_id"].split("-")[0]))
    return [record["kept_positions"] for record in records]


class Offloaded:
    """What an `OffloadingConnector` has been asked to store and to load."""

    def __init__(self, llm: LLM) -> None:
        self.stored: set[bytes] = set()
        self.loaded = 0
        self.refused = 0
        self.requests: list[Request] = []
        manager = scheduler(llm).connector.connector_scheduler.manager
        prepare_store, prepare_load = manager.prepare_store, manager.prepare_load
        add_request = scheduler(llm).add_request

        def note_stored(keys: Any, *args: Any) -> Any:
            self.stored.update(key[:-4] for key in keys)  # without the group
            output = prepare_store(keys, *args)
            self.refused += output is None
            return output

        def note_loaded(keys: Any, *args: Any) -> Any:
            self.loaded += len(keys)
            return prepare_load(keys, *args)

        def note_request(request: Request) -> None:
            self.requests.append(request)
            add_request(request)

        manager.prepare_store, manager.prepare_load = note_stored, note_loaded
        scheduler(llm).add_request = note_request

    @property
    def of_prompts(self) -> set[bytes]:
        return {
            bytes(key)
            for request in self.requests
            for key in request.block_hashes[: request.num_prompt_tokens // BLOCK]
        }


@pytest.fixture
def expected(model: Path) -> Iterator[list[list[RequestOutput]]]:
    """Answers to both questions without a connector, each after its own prefill."""
    with engine(model, SETTINGS, enable_prefix_caching=False) as llm:
        yield [answers(llm, prompts(question)) for question in QUESTIONS]


@schedulers
@offloads
def test_offloading_to_host_memory(
    model: Path,
    expected: list[list[RequestOutput]],
    host_blocks: int,
    options: dict[str, Any],
    async_scheduling: bool,
) -> None:
    # Answers are stored, too, as far as they are decoded with the full cache.
    transfer = offloading.config(host_blocks * BLOCK_BYTES, offload_prompt_only=False)
    options = SMALL | options | {"kv_transfer_config": transfer}
    with engine(model, SETTINGS, async_scheduling, **options) as llm:
        offloaded = Offloaded(llm)
        for _ in range(2):
            for question, answer in zip(QUESTIONS, expected, strict=True):
                assert_same(answers(llm, prompts(question)), answer)
                # The last prompts, which little memory still has, but not the pool.
                again = range(NUM_IMAGES)[:1:-1]
                assert_same(answers(llm, prompts(question, again)), answer[:1:-1])
        assert eviction_stats(llm).evicted == 4 * (2 * NUM_IMAGES - 2)
        assert offloaded.stored and offloaded.stored <= offloaded.of_prompts
        if host_blocks < 1024:
            assert offloaded.refused
        else:
            assert offloaded.loaded and not offloaded.refused
        assert not scheduler(llm).connector.connector_scheduler._jobs
        assert_nothing_leaks(llm)


@schedulers
@offloads
def test_simple_offloading(
    model: Path,
    expected: list[list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
    host_blocks: int,
    options: dict[str, Any],
    async_scheduling: bool,
) -> None:
    offloading.use_late_copies(monkeypatch)
    warnings: list[str] = []
    monkeypatch.setattr(manager.logger, "warning", lambda text, *_: warnings.append(text))
    transfer = offloading.simple_config(host_blocks * BLOCK_BYTES)
    options = SMALL | options | {"kv_transfer_config": transfer}
    with engine(model, SETTINGS, async_scheduling, **options) as llm:
        for _ in range(2):
            for question, answer in zip(QUESTIONS, expected, strict=True):
                assert_same(answers(llm, prompts(question)), answer)
                again = range(NUM_IMAGES)[:1:-1]
                assert_same(answers(llm, prompts(question, again)), answer[:1:-1])
        assert eviction_stats(llm).evicted == 4 * (2 * NUM_IMAGES - 2)
        loaded, stored = offloading.LateBackend.blocks
        assert stored and (loaded or host_blocks < 1024)
        finish_copies(llm)
        assert_nothing_leaks(llm)
    assert not warnings  # of hits that were not loaded


@pytest.mark.parametrize("is_lazy", [False, True], ids=["", "lazy"])
def test_simple_offloading_of_requests_that_end_early(
    model: Path,
    expected: list[list[RequestOutput]],
    monkeypatch: pytest.MonkeyPatch,
    is_lazy: bool,
) -> None:
    """The lazy connector stores blocks of the prefix cache that are about to leave it."""
    offloading.use_late_copies(monkeypatch)
    transfer = offloading.simple_config(1024 * BLOCK_BYTES, lazy_offload=is_lazy)
    settings = SETTINGS | {"output_reserve": False}
    options = SMALL | {"kv_cache_memory_bytes": TINY}
    with engine(model, settings, kv_transfer_config=transfer, **options) as llm:
        abort_and_preempt(llm, prompts())
        loaded = offloading.LateBackend.blocks[0]
        for request, answer in zip(prompts(), expected[0], strict=True):
            assert_same(answers(llm, [request]), [answer])
        assert offloading.LateBackend.blocks[0] > loaded
        finish_copies(llm)
        assert_nothing_leaks(llm)


def finish_copies(llm: LLM) -> None:
    """Run steps until `SimpleCPUOffloadConnector` holds no blocks."""
    offload = scheduler(llm).connector.scheduler_manager
    while offload.has_pending_stores():
        answers(llm, [{"prompt": "USER: Hello. ASSISTANT:"}], 1)


def test_requests_end_while_their_blocks_are_copied(
    model: Path, expected: list[list[RequestOutput]]
) -> None:
    """Aborted before and after their eviction, and preempted; what is stored is right."""
    transfer = offloading.config(1024 * BLOCK_BYTES)
    settings = SETTINGS | {"output_reserve": False}
    options = SMALL | {"kv_cache_memory_bytes": TINY}
    with engine(model, settings, kv_transfer_config=transfer, **options) as llm:
        offloaded = Offloaded(llm)
        abort_and_preempt(llm, prompts())
        assert any(request.num_preemptions for request in offloaded.requests)
        loaded = offloaded.loaded
        for request, answer in zip(prompts(), expected[0], strict=True):
            assert_same(answers(llm, [request]), [answer])
        assert offloaded.loaded > loaded
        assert_nothing_leaks(llm)


@both_runners
def test_evicted_some_tokens_into_the_answer(model: Path) -> None:
    settings = SETTINGS | {"policy": "vlcache-plus", "evict_after": 20, "every": 32}
    with engine(model, settings, enable_prefix_caching=False) as llm:
        expected = answers(llm, prompts(), 100)
    transfer = offloading.config(1024 * BLOCK_BYTES, offload_prompt_only=False)
    with engine(model, settings, kv_transfer_config=transfer, **SMALL) as llm:
        offloaded = Offloaded(llm)
        for _ in range(2):
            assert_same(answers(llm, prompts(), 100), expected)
        assert offloaded.stored and offloaded.stored <= offloaded.of_prompts
        assert offloaded.loaded
        assert_nothing_leaks(llm)


def test_kept_blocks_are_not_overwritten_before_they_are_copied(model: Path) -> None:
    """A request ends, its blocks are still to be copied, and an eviction takes some of them."""
    text = {"prompt": "USER: " + "Say something about pictures. " * 24 + "ASSISTANT:"}
    with engine(model, SETTINGS, enable_prefix_caching=False) as llm:
        (alone,) = answers(llm, [text], 8)
    transfer = offloading.config(1024 * BLOCK_BYTES, polls=100)
    with engine(model, SETTINGS, kv_transfer_config=transfer, **SMALL) as llm:
        offloaded, core = Offloaded(llm), llm.llm_engine
        core.add_request("image", prompts()[0], greedy(8))
        core.add_request("text", text, greedy(1))
        taken: list[set[int]] = []
        guard = scheduler(llm)._connector_guard
        note = guard.on_blocks_taken

        def taken_from_pool(blocks: Any) -> None:
            blocks = list(blocks)
            taken.append({block.block_id for block in blocks})
            note(blocks)
            waiting = scheduler(llm).connector.connector_scheduler
            assert taken[-1] <= waiting._current_batch_allocated_block_ids

        guard.on_blocks_taken = taken_from_pool
        while core.has_unfinished_requests():
            core.step()
        assert taken and taken[0]
        assert llm.reset_prefix_cache()
        assert_same(answers(llm, [text], 8), [alone])
        assert offloaded.loaded


def test_a_hit_that_the_scheduler_ignores(model: Path) -> None:
    """With ``prompt_logprobs`` vLLM computes the whole prompt, whatever a connector finds."""
    transfer = offloading.config(1024 * BLOCK_BYTES)
    with engine(model, SETTINGS, kv_transfer_config=transfer, **SMALL) as llm:
        guard = scheduler(llm)._connector_guard
        answers(llm, prompts(), 2)
        guard._matched_tokens = lambda request, num_computed_tokens: (BLOCK, True)  # as NIXL does
        llm.generate(prompts(seeds=[9]), greedy(NUM_TOKENS, prompt_logprobs=1), use_tqdm=False)
        assert eviction_stats(llm).evicted == NUM_IMAGES + 1
        assert_nothing_leaks(llm)


def test_only_a_connector_that_hands_over_leaves_requests_alone(model: Path) -> None:
    transfer = offloading.config(1024 * BLOCK_BYTES)
    parameters = greedy(NUM_TOKENS, extra_args={"kv_transfer_params": {"do_remote_decode": True}})
    with engine(model, SETTINGS, kv_transfer_config=transfer, **SMALL) as llm:
        llm.generate(prompts(seeds=[0]), parameters, use_tqdm=False)
        assert eviction_stats(llm).evicted == 1


@pytest.mark.parametrize("prefill", ["unmodified", pytest.param("evicting", marks=both_runners)])
def test_disaggregated_prefill(model: Path, tmp_path: Path, prefill: str) -> None:
    """One engine computes prompts, another one decodes: what it keeps is what one engine keeps."""
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    with engine(model, settings_with_trace(one)) as llm:
        expected = answers(llm, prompts())
    transfer = example_config(tmp_path)
    settings = SETTINGS if prefill == "evicting" else None
    with engine(model, settings, kv_transfer_config=transfer, **WHOLE_PREFILLS) as llm:
        answers(llm, prompts(), 1)
        if prefill == "evicting":
            assert eviction_stats(llm).evicted == 0
    with engine(
        model, settings_with_trace(other), kv_transfer_config=transfer, **WHOLE_PREFILLS
    ) as llm:
        found = answers(llm, prompts())
        assert eviction_stats(llm).evicted == NUM_IMAGES
        assert_nothing_leaks(llm)
    assert_same(found, expected)
    assert all(output.num_cached_tokens for output in found)
    assert kept_positions(other) == kept_positions(one)
    assert len(kept_positions(one)) == NUM_IMAGES


def test_two_connectors(model: Path, tmp_path: Path, expected: list[list[RequestOutput]]) -> None:
    parts = [offloading.config(1024 * BLOCK_BYTES), example_config(tmp_path)]
    names = "kv_connector", "kv_role", "kv_connector_extra_config"
    transfer = KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "connectors": [{name: getattr(part, name) for name in names} for part in parts]
        },
    )
    with engine(model, SETTINGS, kv_transfer_config=transfer, **SMALL | WHOLE_PREFILLS) as llm:
        for _ in range(2):
            assert_same(answers(llm, prompts()), expected[0])
        assert_nothing_leaks(llm)
    assert list(tmp_path.iterdir())
