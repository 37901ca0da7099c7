# SPDX-License-Identifier: Apache-2.0
"""A made-up prompt goes the way of a real one, whatever the settings are."""

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks.kernels import recorded
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.policy import Shard
from vl_cache_vllm.worker import attention_stats, selection
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.warmup import (
    WarmupEviction,
    blank_pool,
    profiling_config,
    warm_up_kernels,
)

NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE = 3, 2, 16


def warmup_of(config: KVCompressConfig, tokens: int, room: int) -> tuple[WarmupEviction, Evictor]:
    pool = blank_pool(NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, 32, torch.float32, torch.device("cpu"))
    worker = Evictor(
        profiling_config(config),
        pool,
        num_heads=4,
        max_num_reqs=2,
        max_num_tokens=64,
        max_table_width=tokens // BLOCK_SIZE + 2,
        max_graph_reqs=2,
        shard=Shard(),
    )
    return WarmupEviction(worker, tokens, room, num_heads=4), worker


@pytest.mark.parametrize("tokens", [64, 333, 1000])
@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "vlcache"},
        {"policy": "vlcache-plus"},
        {"policy": "vlcache", "budget": 1.0, "min_prompt_tokens": 5000},
        {"policy": "vlcache", "experimental": {"diversity": 0.5}},
        {
            "policy": "vlcache",
            "experimental": {"elite_window": 0.3},
            "max_observation_tokens": 90,
        },
        {"policy": "h2o"},
        {"policy": "snapkv", "max_observation_tokens": 200},
        {"policy": "pyramidkv"},
        {"policy": "streamingllm"},
        {"policy": "random"},
    ],
    ids=lambda settings: settings["policy"],
)
def test_ends_evicted(settings: dict[str, object], tokens: int) -> None:
    warmup, worker = warmup_of(KVCompressConfig.from_dict(settings), tokens, 2 * tokens)
    warmup.observe()
    state = worker.requests.get("warm-up")
    assert state is not None
    warmup.evict()
    assert state.num_evictions == 2
    assert state.evicted_tokens == (tokens // BLOCK_SIZE + 1) * BLOCK_SIZE
    assert worker.tables.kept_pages(state.slot).sum() == state.kept_blocks * NUM_LAYERS
    assert not worker.take_reports()


@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus", "streamingllm"])
def test_what_requests_may_ask_for_is_compiled_before(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    seen = set()

    def spy(module: object, name: str, kind: Callable[..., object]) -> None:
        operation = getattr(module, name)

        def run(*args: object) -> object:
            seen.add((name, kind(*args)))
            return operation(*args)

        monkeypatch.setattr(module, name, run)

    spy(selection, "select_all", lambda candidates: candidates[0].precedence is not None)
    spy(
        attention_stats,
        "observe",
        lambda *args: (
            len(args[0]) > 2,  # `elite_window` joins the queries of both steps
            isinstance(args[1], torch.Tensor),
            *(a is not None for a in args[6:]),
        ),
    )
    _, worker = warmup_of(KVCompressConfig.from_dict({"policy": policy}), 200, 200)
    warm_up_kernels(worker, 200, num_heads=4)
    # Whether keys are read out of their pages, and whether there are weights and maxima.
    kinds = [(False, False, False), (True, True, False), (True, False, False)]
    if policy == "vlcache-plus":
        kinds = [(False, True, True), (True, True, True)]  # no elite queries, but diversity
    assert seen == {
        *(("select_all", has_precedence) for has_precedence in (False, True)),
        # Few queries take other kernels than many do.
        *(("observe", (many, *kind, False)) for kind in kinds for many in (False, True)),
        # While a request decodes, the device alone knows how many keys a layer has.
        *(("observe", (False, *kind, True)) for kind in kinds),
    }
    assert not worker.take_reports()


def test_nobody_hears_of_it(tmp_path) -> None:
    trace = tmp_path / "trace.jsonl"
    config = KVCompressConfig.from_dict({"policy": "vlcache", "trace": {"path": str(trace)}})
    warmup, _ = warmup_of(config, 100, 100)
    warmup.observe()
    warmup.evict()
    assert not trace.exists()


def test_scores_of_the_whole_room_are_held_while_vllm_profiles() -> None:
    warmup, worker = warmup_of(KVCompressConfig.from_dict({"policy": "vlcache"}), 100, 260)
    warmup.observe()
    state = worker.requests.get("warm-up")
    assert state is not None and state.attention_stats is not None
    held = state.attention_stats._sums.numel() + warmup._others._sums.numel()
    assert held == 260 * NUM_LAYERS * NUM_KV_HEADS


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus"])
def test_kernels_of_few_and_many_queries_late_or_not_are_compiled_before(policy: str) -> None:
    _, worker = warmup_of(KVCompressConfig.from_dict({"policy": policy}), 200, 200)
    most = worker.max_late_queries
    with dispatch.use("triton"), recorded() as launches:
        warm_up_kernels(worker, 200, num_heads=4)
    assert worker.max_late_queries == most
    plus = policy == "vlcache-plus"
    found = {
        (launch.kernel.__name__, launch.arguments["ROWS"])
        for launch in launches
        if launch.arguments.get("HAS_MAXIMA", plus) == plus
        and launch.arguments.get("IS_LAST", plus) == plus
        and launch.arguments.get("BLOCK_SIZE")
    }
    assert found == {
        (f"{kernel}{entry}", rows)
        for kernel in ("statistics", "columns")
        for entry in ("_kernel", "_of_step_kernel")
        for rows in (16, 64)
    }
