# SPDX-License-Identifier: Apache-2.0
"""The offline benchmark: rows, order of the engines, and merging of repeats."""

import argparse
from typing import Any

from benchmarks import offline


def options(**changed: Any) -> argparse.Namespace:
    settings = {
        "engines": ["stock", "ours", "hf"],
        "images": [1, 4],
        "batch": [1, 8],
        "max_images": 16,
        "repeats": 3,
        "peer_repeats": 2,
    }
    return argparse.Namespace(**settings | changed)


def test_batches_with_too_many_images_are_skipped() -> None:
    assert offline.cells(options()) == [(1, 1), (1, 8), (4, 1)]


def test_engine_order_alternates_and_peers_measure_the_first_repeats_only() -> None:
    assert list(offline.engine_order(options(), options().engines)) == [
        ["stock", "ours", "hf"],
        ["hf", "ours", "stock"],
        ["stock", "ours"],
    ]


def test_times_of_prefill_decode_and_batch() -> None:
    found = offline.times([10.0, 12.0, 12.5, 12.75, 13.75])
    assert found == {"prefill": 2000, "decode": 500, "end_to_end": 3750}


def test_merged_rows_have_all_times_and_their_medians() -> None:
    runs = [
        [{"batch": 1, "prefill": 30.0, "decode": 2.0, "end_to_end": 50.0}],
        [{"batch": 1, "prefill": 10.0, "decode": 3.0, "end_to_end": 40.0}],
        [{"batch": 1, "prefill": 20.0, "decode": 1.0, "end_to_end": 60.0}],
    ]
    [row] = offline.merge(runs)
    assert row == {
        "batch": 1,
        "prefill": 20.0,
        "decode": 2.0,
        "end_to_end": 50.0,
        "repeats": {
            "prefill": [30.0, 10.0, 20.0],
            "decode": [2.0, 3.0, 1.0],
            "end_to_end": [50.0, 40.0, 60.0],
        },
    }


class _Scheduling:
    """An engine whose first step returns no outputs, as with async scheduling."""

    def __init__(self) -> None:
        self._steps = [[], ["first token"], [], ["second token"]]

    def has_unfinished_requests(self) -> bool:
        return bool(self._steps)

    def step(self) -> list[str]:
        return self._steps.pop(0)


def test_a_step_without_outputs_counts_with_the_next_one() -> None:
    ends, outputs = offline.run_steps(_Scheduling())
    assert len(ends) == 3 and outputs == ["second token"]
