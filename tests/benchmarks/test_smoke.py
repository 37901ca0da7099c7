# SPDX-License-Identifier: Apache-2.0
"""Our code is found where its time is taken, and left as it was."""

from benchmarks.gpu.agreement import forbidden_to_wait
from benchmarks.smoke import timed
from vl_cache_vllm.attention.layered import LayeredAttention
from vl_cache_vllm.worker.eviction import EvictionWorker


def test_methods_are_wrapped_and_restored() -> None:
    before = LayeredAttention._layer_view, EvictionWorker.layer_done
    for context in (timed, forbidden_to_wait):
        with context():
            assert EvictionWorker.layer_done is not before[1]
        assert (LayeredAttention._layer_view, EvictionWorker.layer_done) == before
