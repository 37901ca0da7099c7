# SPDX-License-Identifier: Apache-2.0
"""vLLM's other features beside eviction: each answers as without it, or as one after the other."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import save_file
from vllm import LLM, AsyncEngineArgs, SamplingParams
from vllm.engine.protocol import StreamingInput
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from testing import engine as harness
from testing import tiny_models
from tests.e2e.test_accounting import assert_pool_is_whole

LONG = "Describe everything that you can see in the picture, from left to right. " * 4
SETTINGS: dict[str, Any] = {"policy": "vlcache", "budget": 0.25}
AGAIN = {**SETTINGS, "every": 32}  # also while requests decode


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


def questions(count: int) -> list[dict[str, Any]]:
    rng = random.Random(count)
    return [
        harness.image_request("llava", LONG[: rng.randint(60, len(LONG))], [seed])
        for seed in range(count)
    ]


def answers(
    llm: LLM, requests: Sequence[Any], parameters: Any, **kwargs: Any
) -> list[list[list[int]]]:
    """Token ids of each request's completions."""
    outputs = llm.generate(requests, parameters, use_tqdm=False, **kwargs)
    assert_pool_is_whole(llm)
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def test_n_gram_drafts(model: Path) -> None:
    """Steps of several tokens, some taken back: of evicted requests and of others beside them."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.n_gram", str(model)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr
    plain, drafted = json.loads(result.stdout.splitlines()[-1])
    assert drafted["answers"] == plain["answers"]
    assert drafted["evicted"] == plain["evicted"] == 5
    assert 50 < drafted["accepted"] < drafted["draft"] - 50


def test_structured_output(model: Path) -> None:
    pattern = r"[0-9]{3}-[a-c]{5}!"
    parameters = SamplingParams(
        temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(regex=pattern)
    )
    with harness.engine(model, AGAIN) as llm:
        outputs = llm.generate(questions(4), parameters, use_tqdm=False)
        assert harness.eviction_stats(llm).evicted == 4
    for output in outputs:
        assert re.fullmatch(pattern, output.outputs[0].text)


def test_several_answers_to_one_prompt(model: Path) -> None:
    """Each answer is a request of its own, evicted by itself, and all keep the same tokens."""
    requests = questions(3)

    def sampled(n: int, seed: int) -> SamplingParams:
        return SamplingParams(n=n, temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)

    with harness.engine(model, AGAIN) as llm:
        several = answers(llm, requests, sampled(3, seed=7))
        assert harness.eviction_stats(llm).evicted == 9
        for number in range(3):  # vLLM gives each answer the next seed
            single = answers(llm, requests, sampled(1, seed=7 + number))
            assert single == [[completions[number]] for completions in several]


@pytest.mark.both_runners
def test_prompt_logprobs(model: Path) -> None:
    """They come out of the prefill, which is stock vLLM's to the last bit."""
    parameters = harness.greedy(20, prompt_logprobs=1)
    found = []
    for settings in (None, AGAIN):
        with harness.engine(model, settings) as llm:
            outputs = llm.generate(questions(3), parameters, use_tqdm=False)
            if settings:
                assert harness.eviction_stats(llm).evicted == 3
        found.append([output.prompt_logprobs for output in outputs])
    assert len(found[0][0]) > 300
    assert found[0] == found[1]


def test_beam_search_is_left_alone(model: Path) -> None:
    """vLLM asks for one token at a time: nothing is decoded from what would be kept."""
    parameters = BeamSearchParams(beam_width=2, max_tokens=6)
    found = []
    for settings in (None, SETTINGS):
        with harness.engine(model, settings) as llm:
            outputs = llm.beam_search(questions(2), parameters)
            if settings:
                assert harness.eviction_stats(llm).evicted == 0
                assert_pool_is_whole(llm)
        found.append([[s.tokens for s in output.sequences] for output in outputs])
    assert found[0] == found[1]


def test_priorities(model: Path) -> None:
    """Urgent requests preempt others, evicted ones too; who is not preempted answers as alone.

    Who is reads its prompt again with what it had generated, and is evicted by the longer text.
    """
    requests = questions(8)
    parameters = harness.greedy(200, extra_args={"kv_budget": 0.1})
    with harness.engine(model, SETTINGS, enable_prefix_caching=False) as llm:
        alone = answers(llm, requests, parameters)
    with harness.engine(
        model,
        SETTINGS,
        scheduling_policy="priority",
        num_gpu_blocks_override=30,
        max_model_len=896,
    ) as llm:
        engine = llm.llm_engine
        finished: dict[str, list[int]] = {}
        preempted: set[str] = set()

        def step() -> None:
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = harness.token_ids(output)
            live = harness.scheduler(llm).requests.values()
            preempted.update(r.request_id.split("-")[0] for r in live if r.num_preemptions)

        for number, request in enumerate(requests):
            engine.add_request(str(number), request, parameters, priority=-number)
            for _ in range(5):
                step()
        while engine.has_unfinished_requests():
            step()
        assert 0 < len(preempted) < len(requests)
        for number, (expected,) in enumerate(alone):
            answer = finished[str(number)]
            assert len(answer) == 200
            assert answer == expected or str(number) in preempted
        assert finished[str(len(requests) - 1)] == alone[-1][0], "the most urgent one"
        assert_pool_is_whole(llm)


@pytest.mark.both_runners
def test_reset_of_the_prefix_cache(model: Path) -> None:
    requests = questions(2)
    with harness.engine(model, SETTINGS) as llm:
        first = answers(llm, requests, harness.greedy(40))
        assert llm.reset_prefix_cache()
        (output, _) = llm.generate(requests, harness.greedy(40), use_tqdm=False)
        assert output.num_cached_tokens == 0
        assert harness.token_ids(output) == first[0][0]


@pytest.mark.both_runners
def test_sleep(model: Path) -> None:
    """Level 0 holds requests in the middle of their answers; a deeper one ends them.

    vLLM's CPU workers keep their memory in any case, and say so.
    """
    requests, parameters = questions(2), harness.greedy(104)
    with harness.engine(model, AGAIN) as llm:
        engine = llm.llm_engine

        def evicted_again() -> int:
            return harness.eviction_stats(llm).evictions["every"]

        expected = answers(llm, requests, parameters)
        again = evicted_again()
        assert again >= 4

        def run_half() -> None:
            for number, request in enumerate(requests):
                engine.add_request(str(number), request, parameters)
            for _ in range(66):
                assert not any(output.finished for output in engine.step())

        run_half()
        assert again + 2 <= evicted_again() <= 2 * again - 2
        engine.sleep(0, "keep")
        assert engine.is_sleeping()
        engine.wake_up()
        found = {}
        while engine.has_unfinished_requests():
            found |= {o.request_id: [harness.token_ids(o)] for o in engine.step() if o.finished}
        assert [found[str(number)] for number in range(2)] == expected
        assert evicted_again() == 2 * again
        assert_pool_is_whole(llm)
        run_half()
        engine.sleep(1, "abort")
        assert_pool_is_whole(llm)
        engine.wake_up()
        engine.abort_request([*found])  # the engine core is in this process and told nobody
        assert harness.eviction_stats(llm).evicted == 6
        assert answers(llm, requests, parameters) == expected


def test_streaming_input_is_left_alone(model: Path) -> None:
    """A prompt that grows after its first answer keeps its cache."""
    prompts = [questions(1)[0], {"prompt": " And on the left?"}, {"prompt": " And on the right?"}]

    async def session(settings: dict[str, Any] | None) -> list[int]:
        extra = {"additional_config": {"kv_compress": settings}} if settings else {}
        engine_args: dict[str, Any] = {**harness.DEFAULTS, **extra, "disable_log_stats": False}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **engine_args))

        async def grow() -> AsyncGenerator[StreamingInput, None]:
            for prompt in prompts:
                (rendered,) = await engine.renderer.render_cmpl_async([prompt])
                yield StreamingInput(rendered)

        parameters = harness.greedy(20, logprobs=None, output_kind=RequestOutputKind.DELTA)
        try:
            outputs = [output async for output in engine.generate(grow(), parameters, "0")]
        finally:
            engine.shutdown()
        return [token for output in outputs for token in output.outputs[0].token_ids]

    plain, beside_eviction = (asyncio.run(session(settings)) for settings in (None, SETTINGS))
    assert len(plain) > 40
    assert beside_eviction == plain
    labels = {"model_name": str(model), "engine": "0", "reason": "streaming_input"}
    assert REGISTRY.get_sample_value("vllm:kv_compress_skipped_requests_total", labels) == 1


def adapter(folder: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter with random weights on the language model's attention."""
    config = json.loads((model / "config.json").read_text())["text_config"]
    hidden, rank = config["hidden_size"], 4
    size = config["head_dim"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in (("q_proj", "num_attention_heads"), ("v_proj", "num_key_value_heads")):
            key = f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}"
            shapes = {"lora_A": (rank, hidden), "lora_B": (config[heads] * size, rank)}
            for part, shape in shapes.items():
                values = 0.3 * torch.randn(shape, generator=generator)
                weights[f"{key}.{part}.weight"] = values
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    text = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(text))
    return folder


def test_adapters(model: Path, tmp_path: Path) -> None:
    """In one batch each request keeps and says what it does when its adapter is alone.

    None goes without: there vLLM's CPU build (0.32) applies one of the others' adapters.
    """
    loras = [
        LoRARequest(f"lora{i}", i, str(adapter(tmp_path / f"lora{i}", model, i))) for i in (1, 2)
    ]
    request = questions(1)[0]
    trace = tmp_path / "trace"
    settings = {**AGAIN, "trace": {"path": str(trace), "positions": True}}
    with harness.engine(model, settings, enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        alone = [answers(llm, [request], harness.greedy(128), lora_request=[one]) for one in loras]
        together = answers(llm, [request] * 2, harness.greedy(128), lora_request=loras)
    assert [[one] for one in together] == alone
    assert together[0] != together[1]
    kept: dict[str, list[Any]] = {}  # by each eviction of a request
    for record in harness.read_trace_lines(trace):
        kept.setdefault(record["request_id"], []).append(record["kept_positions"])
    first, second, *both = kept.values()
    assert both == [first, second]
    assert len(first) == len(second) >= 3
    assert all(one != other for one, other in zip(first, second, strict=True))
