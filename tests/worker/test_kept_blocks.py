# SPDX-License-Identifier: Apache-2.0
"""The kept blocks of requests that come and go, against a dictionary."""

import random

import numpy as np
import pytest
import torch

from vl_cache_vllm.worker import kept_blocks
from vl_cache_vllm.worker.kept_blocks import KeptBlocks


def row(blocks: KeptBlocks, slot: int, number: int) -> list[int]:
    """The first ids of a slot, among rows of other lengths."""
    first = torch.tensor(blocks.first(np.array([0, slot])))
    return blocks.rows(first, number + 3)[1, :number].tolist()


@pytest.mark.parametrize("size", [1, 1024])
def test_requests_that_come_and_go(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_blocks, "_FIRST_SIZE", size)
    rng, blocks = random.Random(0), KeptBlocks(torch.device("cpu"))
    expected: dict[int, list[int]] = {}
    most = 0
    for _ in range(500):
        slot, number = rng.randrange(1, 40), rng.randrange(1, 30)
        if slot in expected and rng.random() < 0.5:
            del expected[slot]
            continue
        expected[slot] = [rng.randrange(10_000) for _ in range(number)]
        blocks.store(slot, torch.tensor(expected[slot]), expected)
        most = max(most, sum(map(len, expected.values())))
        for live, ids in expected.items():
            assert row(blocks, live, len(ids)) == ids
    assert len(blocks._ids) <= max(size, 2 * most)


def test_rows_may_be_wider_than_what_is_left_of_the_buffer() -> None:
    blocks = KeptBlocks(torch.device("cpu"))
    blocks.store(3, torch.arange(1024), ())
    first = torch.tensor(blocks.first(np.array([3, 7])))
    assert blocks.rows(first, 2000)[0, :1024].tolist() == list(range(1024))


def test_slots_that_are_about_to_be_filled_may_be_among_the_live_ones() -> None:
    """All requests that are evicted in a step are live before the first one's blocks are stored."""
    blocks = KeptBlocks(torch.device("cpu"))
    for slot, number in ((1, 700), (2, 900), (1, 800)):
        blocks.store(slot, torch.arange(number) + slot, (1, 2))
    assert row(blocks, 1, 800) == list(range(1, 801))
    assert row(blocks, 2, 900) == list(range(2, 902))
