# SPDX-License-Identifier: Apache-2.0
"""Draft models (EAGLE-3, MTP): their layers are evicted, and outputs are those without drafts."""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm import LLM
from vllm.forward_context import get_forward_context

import testing.random_weights  # noqa: F401  registers the load format
from evaluation.benches import MODEL, ImageBench
from evaluation.cases import page_reader_cases
from evaluation.drafts import DRAFTS as READER_DRAFTS
from testing import engine as harness
from testing import model_zoo
from testing.oracle import Settings, decide_prompt
from testing.tiny_models import random_image
from tests.e2e.test_accounting import assert_pool_is_whole

both_runners = pytest.mark.both_runners

KIND, BLOCK, NUM_DRAFTS = "glm-ocr", 32, 3
DRAFTS = {"method": "mtp", "num_speculative_tokens": NUM_DRAFTS}
QUESTION = "Describe everything that you can see in the picture, from left to right. "


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    """A tiny GLM-OCR with one MTP module; random weights are made when it is loaded."""
    path = model_zoo.build(KIND, models_dir / "glm-ocr-mtp")
    config = json.loads((path / "config.json").read_text())
    config["num_nextn_predict_layers"] = config["text_config"]["num_nextn_predict_layers"] = 1
    (path / "config.json").write_text(json.dumps(config))
    return path


@contextlib.contextmanager
def engine(
    model: Path, settings: dict[str, Any] | None, has_drafts: bool = True, **kwargs: Any
) -> Iterator[LLM]:
    kwargs = {"speculative_config": DRAFTS if has_drafts else None} | kwargs
    dtype = model_zoo.dtype(KIND)
    with harness.engine(model, settings, dtype=dtype, load_format="random", **kwargs) as llm:
        yield llm


def request(seed: int, question: str = QUESTION, images: int = 1) -> dict[str, Any]:
    return {
        "prompt": model_zoo.prompt_for(KIND, question, images),
        "multi_modal_data": {"image": [random_image(seed + i) for i in range(images)]},
    }


def requests(count: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [request(seed, (QUESTION * 3)[: rng.randint(60, 200)]) for seed in range(count)]


# --------------------------------------------------------------------------------------------------
# The draft's layer against attention over the tokens that it should have


@dataclass
class Pass:
    """One pass through the draft's layer, of one request; float32."""

    first: int  # position of the first token
    query: torch.Tensor  # [tokens, H, D]
    key: torch.Tensor  # [tokens, KV heads, D]
    value: torch.Tensor
    output: torch.Tensor  # [tokens, H, D]


@contextlib.contextmanager
def recorded_passes(llm: LLM) -> Iterator[list[Pass]]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    ((name, _),) = worker.drafts.layers.items()
    layer = worker.compilation_config.static_forward_context[name]
    forward, passes = layer.forward, []

    def recorded(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        metadata = get_forward_context().attn_metadata[name]
        heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_size
        new = Pass(
            int(metadata.seq_lens[0]) - len(query),
            query.clone().view(-1, heads, size),
            key.clone().view(-1, kv_heads, size),
            value.clone().view(-1, kv_heads, size),
            torch.empty(0),
        )
        output = forward(query, key, value, *args, **kwargs)
        new.output = output.clone().view(-1, heads, size)
        passes.append(new)
        return output

    with mock.patch.object(layer, "forward", recorded):
        yield passes


class Cache:
    """What the draft's layer should have of one request, and what attention to it gives."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.key: dict[int, torch.Tensor] = {}  # by position, [KV heads, D]
        self.value: dict[int, torch.Tensor] = {}
        self.kept: list[list[int]] | None = None  # of each KV head
        self.evicted_tokens = 0

    def run(self, one: Pass) -> torch.Tensor:
        """Probabilities of a pass, [H, tokens, positions]; compares its outputs."""
        count, heads = one.query.shape[:2]
        for index in range(count):
            self.key[one.first + index] = one.key[index].double()
            self.value[one.first + index] = one.value[index].double()
        end = one.first + count
        key = torch.stack([self.key[p] for p in range(end)])
        value = torch.stack([self.value[p] for p in range(end)])
        group = heads // key.shape[1]
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        logits = torch.einsum("qhd,khd->hqk", one.query.double(), key) * self.scale
        hidden = torch.arange(one.first, end)[:, None] < torch.arange(end)
        logits.masked_fill_(hidden, -torch.inf)
        if self.kept is not None:
            for head, positions in enumerate(self.kept):
                evicted = torch.ones(end, dtype=torch.bool)
                evicted[self.evicted_tokens :] = False
                evicted[positions] = False
                logits[head * group : (head + 1) * group, :, evicted] = -torch.inf
        probabilities = logits.softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", probabilities, value)
        torch.testing.assert_close(one.output.double(), expected, atol=2e-4, rtol=2e-3)
        return probabilities


@both_runners
def test_the_drafts_layer_attends_to_what_it_keeps(model: Path) -> None:
    """All its passes: the prompt, the drafts of a step, and what is taken back."""
    budget, num_tokens = 0.25, 40
    with engine(model, {"policy": "vlcache", "budget": budget}) as llm:
        with recorded_passes(llm) as passes:
            (output,) = llm.generate(
                [request(7, QUESTION * 2)], harness.greedy(num_tokens), use_tqdm=False
            )
        assert harness.eviction_stats(llm).evicted == 1
        drafts = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.drafts
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        (name,) = drafts.layers
        scale = layers[name].impl.scale
    prompt = output.prompt_token_ids
    tokens, start = len(prompt), last_visual(llm, prompt) + 1
    cache = Cache(scale)
    assert passes[0].first == 0 and len(passes[0].query) == tokens
    attention = cache.run(passes[0])[:, start:]
    settings = Settings(budget, BLOCK)
    found = decide_prompt([attention], 2, settings)
    assert found.score_gap > 1e-5
    cache.kept = found.kept_positions[0]
    cache.evicted_tokens = tokens // BLOCK * BLOCK
    assert len(cache.kept[0]) < tokens / 2
    further = [one for one in passes[1:] if len(one.query) == 1]
    assert len(further) > num_tokens
    for one in passes[1:]:
        cache.run(one)


def last_visual(llm: LLM, prompt: Sequence[int]) -> int:
    image = llm.model_config.hf_config.image_token_id
    return max(i for i, token in enumerate(prompt) if token == image)


# --------------------------------------------------------------------------------------------------
# Outputs


def answers(
    model: Path, has_drafts: bool, settings: dict[str, Any], **kwargs: Any
) -> tuple[list[list[int]], int]:
    """Of requests with different budgets, and the number of evictions."""
    budgets = (0.25, 1.0, 0.1, 1.0, 0.25, 0.5, 0.1)
    parameters = [harness.greedy(90, extra_args={"kv_budget": budget}) for budget in budgets]
    with engine(model, settings, has_drafts, **kwargs) as llm:
        outputs = llm.generate(requests(len(budgets)), parameters, use_tqdm=False)
        assert_pool_is_whole(llm)
        return [harness.token_ids(output) for output in outputs], harness.num_evicted(
            llm.llm_engine
        )


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        pytest.param({}, {}, id="after the prefill"),
        pytest.param({"evict_after": 20}, {}, id="after some tokens", marks=both_runners),
        pytest.param({"every": 32}, {}, id="again and again", marks=both_runners),
        pytest.param({}, {"max_num_batched_tokens": 96}, id="chunked prefill"),
        pytest.param({}, {"async_scheduling": True}, id="asynchronous scheduling"),
    ],
)
def test_outputs_are_those_without_drafts(
    model: Path, settings: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    settings = {"policy": "vlcache", "budget": 0.25, **settings}
    plain, evicted = answers(model, False, settings, **kwargs)
    drafted, evicted_too = answers(model, True, settings, **kwargs)
    assert drafted == plain
    assert evicted_too == evicted >= 5


def test_under_pressure(model: Path) -> None:
    """Requests are evicted while they decode; those that keep their cache answer as ever."""
    settings = {"policy": "vlcache", "budget": 0.25, "when": "pressure"}
    room = {"max_model_len": 1024, "kv_cache_memory_bytes": 3 << 20}
    plain, _ = answers(model, False, {"policy": "vlcache", "budget": 0.25})
    drafted, evicted = answers(model, True, settings, **room)
    assert evicted >= 2
    assert [drafted[i] for i in (1, 3)] == [plain[i] for i in (1, 3)]


def test_a_second_question_finds_the_prompt_in_the_prefix_cache(model: Path) -> None:
    found = []
    for has_drafts in (False, True):
        with engine(model, {"policy": "vlcache", "budget": 0.25}, has_drafts) as llm:
            first, second = (
                llm.generate([request(3, text, images=2)], harness.greedy(50), use_tqdm=False)[0]
                for text in (QUESTION, QUESTION[::-1] + QUESTION)
            )
        assert second.num_cached_tokens and second.num_cached_tokens > 5 * BLOCK
        found.append([harness.token_ids(output) for output in (first, second)])
    assert found[0] == found[1]


def test_steps_without_the_draft_model(model: Path) -> None:
    """vLLM's V1 runner leaves it out while a request of the step is near the maximum length."""
    budgets, found = (1.0, 0.25, 0.1), []
    prompts = [request(0, QUESTION * 3), request(1), request(2, QUESTION * 2)]
    parameters = [harness.greedy(60, extra_args={"kv_budget": budget}) for budget in budgets]
    parameters[0].max_tokens = 2
    for has_drafts in (False, True):
        length = 358
        settings = {"policy": "vlcache", "budget": 0.25, "every": 32}
        with engine(model, settings, has_drafts, max_model_len=length) as llm:
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            assert length - NUM_DRAFTS < len(outputs[0].prompt_token_ids) + 2 <= length
            assert harness.eviction_stats(llm).evicted == 2
        found.append([harness.token_ids(output) for output in outputs])
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------------------
# Accepted drafts, and more than one worker: the page reader and its EAGLE-3 head


def copies(
    cases: Sequence[Any], settings: dict[str, Any] | None, has_drafts: bool = True, **kwargs: Any
) -> tuple[list[list[int]], float]:
    """Answers of the page reader, and the share of its drafts that are accepted."""
    with harness.engine(
        MODEL,
        settings,
        dtype="float32",
        limit_mm_per_prompt={"image": 4},
        speculative_config=READER_DRAFTS if has_drafts else None,
        disable_log_stats=False,
        **kwargs,
    ) as llm:
        parameters = [harness.greedy(case.max_tokens) for case in cases]
        for one in parameters:
            one.ignore_eos = False  # the head has not learned what follows
        outputs = ImageBench(str(MODEL)).outputs(llm, cases, parameters)
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        drafted, accepted = (
            counts.get(f"vllm:spec_decode_num_{name}_tokens", 0) for name in ("draft", "accepted")
        )
        assert harness.num_evicted(llm.llm_engine) == (len(cases) if settings else 0)
        return [harness.token_ids(output) for output in outputs], accepted / max(1, drafted)


@both_runners
def test_drafts_are_accepted_with_an_evicted_cache() -> None:
    cases = page_reader_cases("test", ("row",), 6)
    settings = {"policy": "vlcache-plus", "budget": 0.25, "evict_after": 0}
    _, full = copies(cases, None)
    plain, _ = copies(cases, settings, has_drafts=False)
    drafted, evicted = copies(cases, settings)
    assert drafted == plain
    assert full > 0.9 and evicted > 0.8


@both_runners
def test_two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism: each worker has one of the draft's two KV heads."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases = page_reader_cases("test", ("row",), 4)
    settings = {"policy": "vlcache-plus", "budget": 0.25, "evict_after": 0}
    alone = copies(cases, settings)
    assert copies(cases, settings, tensor_parallel_size=2) == alone
