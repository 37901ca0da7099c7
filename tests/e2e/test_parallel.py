# SPDX-License-Identifier: Apache-2.0
"""Workers that share a model keep what one worker keeps."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from testing import engine as harness
from testing import tiny_models
from testing.engine import read_trace_lines
from testing.server import chat_body, image_url, running
from tests.e2e.test_server import wait_until_idle
from tests.helpers import ray_on_cpu

LONG = "Describe everything that you can see in the picture, from left to right. " * 4
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"shared_scores": 0.5, "lookahead": 20.0, "uniform_mix": 0.5},
    {
        "experimental": {"elite_window": 0.5, "diversity": 0.8},
        "max_observation_tokens": 100,
        "uniform_mix": 1.0,
    },
)


def serve(model: Path, trace: Path, **kwargs: Any) -> tuple[list[list[dict]], list[list[int]]]:
    """Each request's trace lines, by stage and rank, and its answer."""
    settings = {
        "policy": "vlcache",
        "budget": 0.25,
        "trace": {"path": str(trace), "positions": True},
    }
    requests = [harness.image_request("llava", LONG, [seed]) for seed, _ in enumerate(OPTIONS)]
    parameters = [
        harness.greedy(24, extra_args={"kv_policy_options": options}) for options in OPTIONS
    ]
    with harness.engine(model, settings, **kwargs) as llm:
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        assert harness.eviction_stats(llm).evicted == len(requests)
    records = [json.loads(line) for line in trace.read_text().splitlines()]
    records.sort(key=lambda record: (record["layers"], record["rank"]))
    lines = [
        [record for record in records if record["request_id"].startswith(f"{output.request_id}-")]
        for output in outputs
    ]
    return lines, [harness.token_ids(output) for output in outputs]


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


Served = tuple[list[list[dict]], list[list[int]]]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    lines, answers = serve(model, tmp_path_factory.mktemp("alone") / "trace")
    assert all(len(of_request) == 1 for of_request in lines)
    return lines, answers


@pytest.fixture(autouse=True)
def one_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize("executor", [pytest.param("mp", marks=pytest.mark.both_runners), "ray"])
def test_tensor_parallel(model: Path, alone: Served, tmp_path: Path, executor: str) -> None:
    """Each rank keeps its own heads' share of what one worker keeps."""
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": executor}
    with ray_on_cpu.cluster(2) if executor == "ray" else contextlib.nullcontext():
        lines, answers = serve(model, tmp_path / "trace", **parallel)
    for (whole,), parts in zip(alone[0], lines, strict=True):
        assert [part["rank"] for part in parts] == [0, 1]
        assert all(part["kept_tokens"] == whole["kept_tokens"] for part in parts)
        for part in parts:
            assert part["density"] == pytest.approx(whole["density"], abs=1e-4)
        heads = zip(*(part["kept_positions"] for part in parts), strict=True)
        assert [[*first, *second] for first, second in heads] == whole["kept_positions"]
    assert answers == alone[1]


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_evicted_again_while_they_decode(model: Path, tmp_path: Path, size: str) -> None:
    """Four times in all; stages divide the same blocks among their own layers."""
    request = harness.image_request("llava", LONG, [5])

    def run(name: str, **kwargs: Any) -> tuple[list[dict], list[int]]:
        settings = {
            "policy": "vlcache-plus",
            "budget": 0.25,
            "every": 32,
            "trace": {"path": str(tmp_path / name), "positions": True},
        }
        with harness.engine(model, settings, **kwargs) as llm:
            (output,) = llm.generate([request], harness.greedy(122), use_tqdm=False)
            assert harness.eviction_stats(llm).evictions == {"prefill": 1, "every": 3}
        records = read_trace_lines(tmp_path / name)
        records.sort(key=lambda one: (one["eviction"], one["layers"], one["rank"]))
        return records, harness.token_ids(output)

    alone, answer = run("alone")
    eager = size == "tensor_parallel_size"
    records, same = run("parallel", **{size: 2}, enforce_eager=eager)
    assert len(records) == 2 * len(alone) == 8
    for whole, first, second in zip(alone, records[::2], records[1::2], strict=True):
        for part in (first, second):
            assert part["evicted_tokens"] == whole["evicted_tokens"]
            assert part["kept_blocks"] == whole["kept_blocks"]
        if eager:
            heads = zip(first["kept_positions"], second["kept_positions"], strict=True)
            assert [[*a, *b] for a, b in heads] == whole["kept_positions"]
        else:  # uniform budgets, so that stages keep as much; scores are shared by a stage's layers
            assert first["kept_tokens"] + second["kept_tokens"] == whole["kept_tokens"]
    if eager:
        assert same == answer


def test_more_ranks_than_kv_heads(models_dir: Path, tmp_path: Path) -> None:
    """Ranks with a copy of one head: equal layers, but each keeps what its queries attend to."""
    model = tiny_models.build("llava", models_dir / "llava-one-kv-head", num_kv_heads=1)
    whole, _ = serve(model, tmp_path / "whole")
    lines, answers = serve(
        model, tmp_path / "trace", tensor_parallel_size=2, max_num_batched_tokens=128
    )
    for (one,), parts in zip(whole, lines, strict=True):
        assert [part["rank"] for part in parts] == [0, 1]
        assert all(part["kept_tokens"] == one["kept_tokens"] for part in parts)
        kept = [part["kept_positions"] for part in parts]
        assert [len(layer) for layer in kept[0]] == [1] * len(one["kept_tokens"])
        assert kept[0] != kept[1]
    assert all(len(answer) == 24 for answer in answers)


def test_pipeline_parallel(model: Path, alone: Served, tmp_path: Path) -> None:
    """Each stage divides the same blocks among its own layers."""
    # vLLM's CPU workers need compilation for it: eager ones allocate no buffer between stages.
    lines, _ = serve(model, tmp_path / "trace", pipeline_parallel_size=2, enforce_eager=False)
    for (whole,), stages, options in zip(alone[0], lines, OPTIONS, strict=True):
        assert [stage["layers"] for stage in stages] == [[0, 1], [2, 3]]
        density = [d for stage in stages for d in stage["density"]]
        assert density == pytest.approx(whole["density"], abs=1e-3)
        for stage in stages:
            pages = stage["kept_blocks"] * len(stage["kept_tokens"])
            assert sum(stage["kept_tokens"]) == pages * stage["block_size"]
        if options.get("uniform_mix") == 1 and not options.get("shared_scores"):
            kept = [layer for stage in stages for layer in stage["kept_positions"]]
            assert kept == whole["kept_positions"]


@pytest.mark.server
def test_data_parallel(model: Path, tmp_path: Path) -> None:
    """Two engines behind one front end; each evicts and counts for itself, as one alone does."""
    urls = [image_url(tiny_models.random_image(seed)) for seed in range(8)]
    bodies = [chat_body(model, LONG, url, max_tokens=80, ignore_eos=True) for url in urls]
    with harness.engine(model, {"policy": "vlcache", "every": 32}) as llm:
        alone = [
            output.outputs[0].text
            for output in llm.chat(
                [body["messages"] for body in bodies], harness.greedy(80), use_tqdm=False
            )
        ]
        evictions = harness.eviction_stats(llm).evictions
    assert evictions["every"] >= 2 * len(bodies)
    arguments = (
        "--kv-compress=vlcache",
        "--kv-compress-every=32",
        "--data-parallel-size=2",
        "--dtype=float32",
        "--block-size=32",
        "--enforce-eager",
        "--max-model-len=2048",
        "--kv-cache-memory-bytes=16M",
    )
    with running(model, tmp_path / "log", *arguments) as server:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(server.chat, bodies))
        assert [a["choices"][0]["message"]["content"] for a in answers] == alone
        # A request's own settings: each API server, one an engine, must know of eviction.
        whole = {"max_tokens": 32, "vllm_xargs": {"kv_budget": 1.0}}
        for url in urls[:4]:
            server.chat(chat_body(model, LONG, url, **whole))
        evicted = [
            server.metric("vllm:kv_compress_evicted_requests_total", f'engine="{engine}"')
            for engine in (0, 1)
        ]
        assert sum(evicted) == 8
        assert min(evicted) > 0
        for trigger, count in evictions.items():
            name = "vllm:kv_compress_evictions_total"
            assert server.metric(name, f'trigger="{trigger}"') == count
        wait_until_idle(server)
