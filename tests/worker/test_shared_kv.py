# SPDX-License-Identifier: Apache-2.0
"""Layers that read the KV cache of an earlier one: their attention counts as that of more heads."""

from typing import Any

import pytest
import torch

from tests.worker.test_evictor import (
    NUM_HEADS,
    PROMPT,
    make_worker,
    pool_of,
    queries,
    run_step,
    start,
)
from tests.worker.test_late_observation import waits as waits  # a fixture
from vl_cache_vllm.ops.page_pool import PagePool

READERS = [1, 1, 3]  # two later layers read the last cache
LAST = len(READERS) - 1
ROW, KEPT, AGAIN = [*range(1, 18)], [*range(18, 22)], [*range(60, 64)]

POLICIES = pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "vlcache-plus", "min_kept_tokens": 0},
        {"experimental": {"elite_window": 0.3}, "max_observation_tokens": 11},
        {"experimental": {"diversity": 1.0}},
    ],
    ids=["vlcache", "vlcache-plus", "elite-queries", "diverse-keys"],
)


def evict_twice(settings: dict[str, Any], seeds: list[int] | None) -> tuple[PagePool, list[float]]:
    """Evict a prompt in two chunks, then again; the pool and the densities of the prompt.

    Args:
        settings: of the engine.
        seeds: of the sharers' queries; None: no layer shares a cache.
    """
    pool = pool_of()
    worker = make_worker(pool, readers=READERS if seeds is not None else (), **settings)
    state = start(worker, "a")
    evictor_inputs = worker._inputs
    found: list[Any] = []
    worker._inputs = lambda step: found.append(evictor_inputs(step)) or found[-1]  # type: ignore
    last = PROMPT + 1
    steps: list[tuple[int, int, list[int] | None]] = [
        (0, 55, None),
        (55, PROMPT, KEPT),
        (PROMPT, last, None),
        (last, last + 1, AGAIN),
    ]
    of_own = queries(last + 1, seed=6)
    of_sharers = [
        of_own[LAST] if seed == 6 else queries(last + 1, seed)[LAST] for seed in seeds or ()
    ]
    for first, end, kept in steps:
        run_step(
            worker,
            [(state, first, end - first, ROW)],
            of_own[:, first:end],
            None if kept is None else {state: kept},
            [(LAST, own[first:end]) for own in of_sharers],
        )
    assert state.num_evictions == 2
    (one,) = found[0]
    entries = sum(range(PROMPT - one.num_queries + 1, PROMPT + 1)) * NUM_HEADS
    return pool, (one.dense_entries.double() / entries).tolist()


@POLICIES
def test_readers_that_attend_alike_change_nothing(settings: dict[str, Any]) -> None:
    """Sums are means over the readers, and a density is a fraction of all readers' entries."""
    alone, density = evict_twice(settings, None)
    shared, density_of_shared = evict_twice(settings, [6, 6])
    assert torch.equal(alone.pages, shared.pages)
    assert density == density_of_shared


@POLICIES
def test_every_reader_counts(settings: dict[str, Any]) -> None:
    alone, _ = evict_twice(settings, None)
    shared, _ = evict_twice(settings, [6, 11])
    others, _ = evict_twice(settings, [7, 11])
    assert not torch.equal(alone.pages, shared.pages)
    assert not torch.equal(others.pages, shared.pages)


@POLICIES
def test_late_observation_gives_the_same(
    settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    expected, _ = evict_twice(settings, [7, 11])
    request.getfixturevalue("waits")
    found, _ = evict_twice(settings, [7, 11])
    assert torch.equal(found.pages, expected.pages)
