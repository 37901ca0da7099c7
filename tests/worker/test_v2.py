# SPDX-License-Identifier: Apache-2.0
"""What V2's adapter does for CUDA graphs, without a graph."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from tests.worker.test_warmup import BLOCK_SIZE, NUM_LAYERS, warmup_of
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.v2 import V2Adapter

NUM_REQS = 2  # of the graph


def adapter(gathered: Any = None) -> tuple[V2Adapter, Any]:
    """One whose attention metadata is an object for the only layer group."""
    metadata = SimpleNamespace()
    runner: Any = SimpleNamespace(
        max_num_reqs=NUM_REQS,
        model_state=SimpleNamespace(
            add_request=None,
            remove_request=None,
            prepare_attn=lambda *_, **__: {"layer": metadata},
        ),
        gather_batch_req_state=lambda *_: gathered,
    )
    _, worker = warmup_of(KVCompressConfig(), 100, 100)
    return V2Adapter(runner, worker, EvictedGroup(0, {"layer": 0})), metadata


def dummy_batch() -> Any:
    return SimpleNamespace(
        req_ids=["dummy-0", "dummy-1"],
        num_reqs=NUM_REQS,
        num_reqs_after_padding=NUM_REQS,
        num_tokens_after_padding=NUM_REQS,
        query_start_loc=torch.arange(NUM_REQS + 1, dtype=torch.int32),
        seq_lens=torch.ones(NUM_REQS, dtype=torch.int32),
    )


def tables_of(metadata: Any) -> Any:
    return metadata.kv_compress_step.tables


def test_a_capture_sees_the_tables_and_writes_nothing() -> None:
    ours, metadata = adapter()
    zeros = torch.zeros(NUM_REQS, 20, dtype=torch.int32)
    found = []
    for _ in range(2):
        ours.prepare_attn(dummy_batch(), CUDAGraphMode.NONE, (zeros,), for_capture=True)
        tables = tables_of(metadata)
        found.append((tables.block_table.data_ptr(), tables.block_table.shape))
        assert (tables.slot_mapping == -1).all()
        assert (tables.seq_lens == 1).all()
    assert found[0] == found[1]
    assert tables.block_table.shape[:2] == (NUM_LAYERS, NUM_REQS)
    assert tables.block_table.shape[2] * BLOCK_SIZE >= 100


def test_dummy_batches_without_a_graph_are_vllms() -> None:
    ours, metadata = adapter()
    zeros = torch.zeros(NUM_REQS, 20, dtype=torch.int32)
    ours.prepare_attn(dummy_batch(), CUDAGraphMode.NONE, (zeros,))
    assert vars(metadata) == {}


@pytest.mark.parametrize(
    ("has_prefill", "orders", "dummy_run", "expected"),
    [
        pytest.param(False, {}, False, 1, id="decodes"),
        pytest.param(True, {}, False, None, id="a-prefill-of-one-token"),
        pytest.param(False, {"a": EvictionOrder(32, (5,))}, False, None, id="evicts"),
        # A dummy run comes between two steps; the orders are those of the last one.
        pytest.param(False, {"a": EvictionOrder(32, (5,))}, True, 1, id="dummy-run"),
    ],
)
def test_observed_steps_are_no_decodes(
    has_prefill: bool, orders: Any, dummy_run: bool, expected: int | None
) -> None:
    """vLLM's full graphs, which run decodes, observe nothing."""
    batch = SimpleNamespace(has_prefill=has_prefill)
    ours, _ = adapter((batch, 1))
    ours._evictor.orders = orders
    output: Any = None
    assert ours.gather_batch_req_state(output, dummy_run) == (batch, expected)


def test_a_step_without_a_batch() -> None:
    ours, _ = adapter((None, 1))
    output: Any = None
    assert ours.gather_batch_req_state(output, True) == (None, 1)
