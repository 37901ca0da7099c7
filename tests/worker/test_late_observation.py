# SPDX-License-Identifier: Apache-2.0
"""Observation after the last layer: the results of layer by layer, in a few launches."""

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.kernels import recorded
from tests.worker.test_evictor import (
    HEAD_SIZE,
    NUM_HEADS,
    NUM_LAYERS,
    PROMPT,
    SCALE,
    VISION_END,
    make_worker,
    pool_of,
    queries,
    run_step,
    start,
)
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.ops.device import Stopwatch
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.worker import evictor, late_observation
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.late_observation import (
    MAX_LATE_QUERIES,
    LateObservation,
    QueryBuffer,
    split_late,
)
from vl_cache_vllm.worker.step import ObservedQueries

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="launches are recorded where they compile"
)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observe late, as on a GPU, but with the operations of a CPU."""
    monkeypatch.setattr(evictor, "implementation_for", lambda _: "triton")


def run_batches(settings: dict[str, Any], chunk: int, most: int = MAX_LATE_QUERIES) -> PagePool:
    """Two prompts side by side, the second in chunks; then both are evicted again."""
    pool = pool_of()
    worker = make_worker(pool, **settings)
    worker.max_late_queries = most
    states = [start(worker, name) for name in "ab"]
    rows = [list(range(1, 18)), list(range(30, 47))]
    kept = [list(range(18, 22)), list(range(47, 51))]
    both = [queries(PROMPT, seed) for seed in (6, 7)]
    run_step(worker, [(states[1], 0, chunk, rows[1])], both[1][:, :chunk])
    run_step(
        worker,
        [(states[0], 0, PROMPT, rows[0]), (states[1], chunk, PROMPT - chunk, rows[1])],
        torch.cat((both[0], both[1][:, chunk:]), 1),
        dict(zip(states, kept, strict=True)),
    )
    again = PROMPT + 2  # 65 tokens, of which 64 in whole blocks
    run_step(
        worker,
        [(state, again - 1, 1, row) for state, row in zip(states, rows, strict=True)],
        queries(2, seed=8),
    )
    kept = [[*range(60, 64)], [*range(70, 74)]]
    run_step(
        worker,
        [(state, again, 1, row) for state, row in zip(states, rows, strict=True)],
        queries(2, seed=9),
        dict(zip(states, kept, strict=True)),
    )
    assert all(state.num_evictions == 2 for state in states)
    return pool


@pytest.mark.parametrize("chunk", [20, 55])
@pytest.mark.parametrize("most", [MAX_LATE_QUERIES, 20, 14, 0], ids=lambda most: f"most{most}")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "vlcache-plus", "min_kept_tokens": 0},
        {"policy": "h2o"},
        {"experimental": {"elite_window": 0.3}, "max_observation_tokens": 11},
        {"experimental": {"diversity": 1.0}},
    ],
    ids=["vlcache", "vlcache-plus", "h2o", "elite-queries", "diverse-keys"],
)
def test_the_result_is_that_of_layer_by_layer(
    settings: dict[str, Any],
    most: int,
    chunk: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many layers the buffer has room for."""
    expected = run_batches(settings, chunk)
    request.getfixturevalue("waits")
    monkeypatch.setattr(late_observation, "MAX_LATE_QUERIES", most)
    late = []
    monkeypatch.setattr(
        late_observation,
        "observe_layers",
        lambda *args: late.append(len(args[0])) or observe_layers(*args),
    )
    found = run_batches(settings, chunk, most)
    assert torch.equal(found.pages, expected.pages)
    assert bool(late) == (most > 0 and "experimental" not in settings)
    if settings == {} and chunk == 20:  # the prefill of both, then one query of each
        prefill = {MAX_LATE_QUERIES: [3], 20: [2, 1], 14: [1, 1, 1]}
        assert late == ([*prefill[most], 3] if most else [])


observe_layers = late_observation.observe_layers


def observation(worker: Evictor, num_queries: int, **settings: Any) -> ObservedQueries:
    config = KVCompressConfig.from_dict({"policy": "vlcache", "budget": 0.25, **settings})
    state = worker.requests.start(str(len(worker.requests)), config, VISION_END, 1000)
    return ObservedQueries(0, state, 5, 5 + num_queries, 0, 1, 1000)


def test_what_waits_fits_the_buffer() -> None:
    worker = make_worker(pool_of())
    elite = {"max_observation_tokens": 64, "experimental": {"elite_window": 0.5}}
    first, large, other, last = (
        observation(worker, MAX_LATE_QUERIES - 10),
        observation(worker, 11),
        observation(worker, 3, **elite),
        observation(worker, 10),
    )
    all_of_them = [first, large, other, last]
    assert split_late(all_of_them, MAX_LATE_QUERIES, 1) == ([first, last], [large, other])
    assert split_late(all_of_them, MAX_LATE_QUERIES, 2) == ([first, large, last], [other])
    assert split_late(all_of_them, 0, 2) == ([], all_of_them)
    too_long = observation(worker, MAX_LATE_QUERIES + 1)
    assert split_late([too_long], MAX_LATE_QUERIES, 9) == ([], [too_long])


@pytest.mark.usefixtures("waits")
def test_the_buffer_is_as_large_as_any_step_needs() -> None:
    """So the memory profile, whose warm-up makes one, has seen it."""
    worker = make_worker(pool_of())
    for name in "ab":
        state = start(worker, name)
        batch = [(state, 0, PROMPT, list(range(16)))]
        run_step(worker, batch, queries(PROMPT, seed=1), {state: [16, 17, 18, 19]})
        held = worker._query_buffer._queries
        assert held is not None
        assert held.shape == (NUM_LAYERS * MAX_LATE_QUERIES, NUM_HEADS, HEAD_SIZE)
        if name == "a":
            first = held
        assert held is first


def test_layers_have_one_soft_cap() -> None:
    worker = make_worker(pool_of())
    late = LateObservation([observation(worker, 3)], worker.pool, QueryBuffer())
    late.hold(0, queries(9, seed=1)[0], SCALE, 2.0)
    with pytest.raises(ValueError, match=r"soft caps 2\.0 and 0\.0"):
        late.hold(1, queries(9, seed=1)[1], SCALE, 0.0)


@needs_compiler
@pytest.mark.parametrize(
    ("room", "launches_of_step"),
    [pytest.param(4, 1, id="all-layers"), pytest.param(3, 2, id="not-the-last-layer")],
)
def test_launches_where_the_buffer_is_small(
    room: int, launches_of_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pair for every few layers, and none for single requests."""
    monkeypatch.setattr(late_observation, "MAX_LATE_QUERIES", room)
    worker = make_worker(pool_of(), max_num_reqs=4, max_observation_tokens=1)
    states = [start(worker, str(index)) for index in range(4)]
    batch = [(state, 0, PROMPT, list(range(16))) for state in states]
    kept = {state: [16, 17, 18, 19] for state in states}
    with dispatch.use("triton"), recorded() as launches:
        run_step(worker, batch, queries(PROMPT * 4, seed=1), kept)
    found = Counter(launch.kernel.__name__ for launch in launches)
    assert found["columns_of_step_kernel"] == launches_of_step
    assert found["statistics_of_step_kernel"] == launches_of_step
    assert not {"statistics_kernel", "columns_kernel"} & found.keys()


@needs_compiler
@pytest.mark.parametrize("num_reqs", [1, 2, 4])
@pytest.mark.parametrize("rows", [16, 64])
def test_launches_do_not_grow_with_requests_and_layers(
    num_reqs: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches observe a step, three if few rows leave room for splits."""
    programs = num_reqs * NUM_LAYERS * 2  # of two KV heads, with a tile of rows each
    monkeypatch.setattr(
        "vl_cache_vllm.kernels.observe._num_programs", lambda _: programs + (rows == 16)
    )
    monkeypatch.setattr("vl_cache_vllm.kernels.observe.KEYS", 16)  # several tiles
    most = rows // 3  # a group of 3
    worker = make_worker(pool_of(), max_num_reqs=4, max_observation_tokens=most)
    states = [start(worker, str(index)) for index in range(num_reqs)]
    batch = [(state, 0, PROMPT, list(range(16))) for state in states]
    kept = {state: [16, 17, 18, 19] for state in states}
    with dispatch.use("triton"), recorded() as launches:
        run_step(worker, batch, queries(PROMPT * num_reqs, seed=1), kept)
    found = Counter(launch.kernel.__name__ for launch in launches)
    assert {name: number for name, number in found.items() if "_of_step_" in name} == {
        "statistics_of_step_kernel": 1,
        "columns_of_step_kernel": 1,
    }
    assert found["combine_kernel"] == (rows == 16)
    assert launches[0].arguments["ROWS"] == rows
    assert launches[0].arguments["requests"].shape == (16 * num_reqs,)
    assert not {"statistics_kernel", "columns_kernel"} & found.keys()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _CountLaunches(TorchDispatchMode):
    """Counts the operations of torch that do more than view a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        inputs = {_storage(one) for one in tree_iter(args) if isinstance(one, torch.Tensor)}
        name = func.overloadpacket.__name__
        is_view = isinstance(found, torch.Tensor) and _storage(found) in inputs
        self.number += "empty" not in name and (name.endswith("_") or not is_view)
        return found


@needs_compiler
@pytest.mark.parametrize(
    ("policy", "triton", "others"), [("vlcache", 0, 25), ("vlcache-plus", 8, 51)]
)
def test_launches_of_another_request_that_finishes(policy: str, triton: int, others: int) -> None:
    """`apportion`, `select` and `compact` are joined; budgets for a policy's own operations."""

    def launched(num_reqs: int) -> tuple[int, int]:
        worker = make_worker(pool_of(), max_num_reqs=4, policy=policy, min_kept_tokens=0)
        states = [start(worker, str(index)) for index in range(num_reqs)]
        batch = [(state, 0, PROMPT, list(range(16))) for state in states]
        kept = {state: [16, 17, 18, 19] for state in states}
        query = queries(PROMPT * num_reqs, seed=1)
        with dispatch.use("triton"), recorded() as launches, _CountLaunches() as counted:
            run_step(worker, batch, query, kept)
        return len(launches), counted.number

    two, three = launched(2), launched(3)
    assert three[0] - two[0] == triton
    assert 0 < three[1] - two[1] <= others, three[1] - two[1]


def test_a_shared_stopwatch_counts_by_queries() -> None:
    whole, part = Stopwatch(torch.device("cpu")), Stopwatch(torch.device("cpu"))
    part.share(whole, 0.25)
    with whole:
        pass
    whole._seconds = 8.0
    part._seconds = 1.0
    assert part.seconds() == 3.0
