# SPDX-License-Identifier: Apache-2.0
"""What V2's adapter does for CUDA graphs, without a graph."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from testing.v2_runner import v2_runner
from tests.worker.test_warmup import BLOCK_SIZE, NUM_LAYERS, warmup_of
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.worker import step_tables
from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.step import plan_step
from vl_cache_vllm.worker.step_tables import StepTables
from vl_cache_vllm.worker.v2 import V2Adapter

NUM_REQS = 2  # of the graph


def adapter(state: Any = None, data_parallel_size: int = 1) -> tuple[V2Adapter, Any]:
    """One whose attention metadata is an object for the only layer group."""
    runner, metadata = v2_runner(
        NUM_REQS, [2, 1], lambda *_: state, data_parallel_size=data_parallel_size
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


def gathered(prefills: Sequence[int], count: int | None = 1) -> Any:
    """V2's state of a batch that schedules one token each, as `gather_batch_req_state` returns it.

    Args:
        prefills: computed tokens of each request, whose prompts have 100.
        count: tokens of every request, if the step can run in a full graph.
    """
    computed = np.array(prefills)
    batch = SimpleNamespace(
        has_prefill=bool((computed < 100).any()),
        idx_mapping_np=np.arange(len(prefills))[::-1],
        is_prefilling_np=computed < 100,
        num_computed_prefill_tokens_np=np.minimum(computed, 100),
        num_scheduled_tokens=np.ones(len(prefills), int),
        num_tokens=len(prefills),
    )
    return batch, count


def with_requests(prefills: Sequence[int], count: int | None = 1) -> V2Adapter:
    """An adapter that knows two prompts of 100 tokens: an image and ten tokens, and text."""
    ours, _ = adapter(gathered(prefills, count))
    for index, name in enumerate(("text", "image")):
        image = MultiModalFeatureSpec(None, "image", "cat", PlaceholderRange(0, 90))
        request: Any = SimpleNamespace(
            req_id=name,
            prefill_token_ids=range(100),
            sampling_params=SamplingParams(max_tokens=50),
            mm_features=[image] if name == "image" else [],
        )
        ours.add_request(index, request)
    return ours


OUTPUT: Any = None
EVICTS = {"image": EvictionOrder(96, (5,))}


@pytest.mark.parametrize(
    ("computed", "messages", "expected"),
    [
        # The requests are the image and, behind it, the text.
        pytest.param((100, 100), ((), None, {}), 1, id="decodes"),
        pytest.param((95, 100), ((), None, {}), None, id="observed"),
        pytest.param((99, 100), ((), None, EVICTS), None, id="evicted"),
        pytest.param((99, 100), ((), None, {}, ["image"]), None, id="evicted-later"),
        pytest.param((102, 100), ((), None, EVICTS), None, id="evicted-while-it-decodes"),
        pytest.param((99, 100), ((), None, {}), 1, id="ends-whole"),
        pytest.param((95, 100), ((), [], {}), 1, id="not-admitted"),
        pytest.param((95, 100), ((), ["image"], {}), None, id="admitted"),
        pytest.param((50, 100), ((), None, {}), 1, id="before-the-first-observed-query"),
        pytest.param((100, 50), ((), None, {}), 1, id="text-is-not-observed"),
    ],
)
def test_only_steps_that_are_observed_leave_full_graphs(
    computed: tuple[int, int], messages: Any, expected: int | None
) -> None:
    """vLLM's full graphs, which run decodes and prefills of one token, observe nothing."""
    ours = with_requests(computed)
    ours._evictor.begin_output(*messages)
    assert ours.gather_batch_req_state(OUTPUT, False)[1] == expected
    # The step agrees: in a graph it would refuse to observe.
    batch, _ = gathered(computed)
    shape = SimpleNamespace(
        req_ids=["image", "text"],
        idx_mapping_np=batch.idx_mapping_np,
        num_computed_tokens_np=np.array(computed),
        num_scheduled_tokens=batch.num_scheduled_tokens,
    )
    planned = ours._batch(cast(Any, shape))
    assert planned is not None
    evictor = ours._evictor
    pool, arguments = evictor.pool, (evictor.admitted, evictor.orders, evictor.deferred)
    plan = plan_step(planned, pool.block_size, pool.num_layers, *arguments)
    assert bool(plan.observations) == (expected is None)


@pytest.mark.parametrize(
    ("num_reqs", "longest", "data_parallel_size", "expected"),
    [
        pytest.param(2, 48 * BLOCK_SIZE, 1, 1, id="as-long-as-the-table-is-wide"),
        pytest.param(2, 48 * BLOCK_SIZE + 1, 1, None, id="longer"),
        pytest.param(1, 48 * BLOCK_SIZE + 1, 1, 1, id="longer-but-alone"),
        pytest.param(1, 48 * BLOCK_SIZE + 1, 2, None, id="another-rank-may-run-two"),
    ],
)
def test_long_requests_leave_graphs_whose_tables_are_narrower(
    monkeypatch: pytest.MonkeyPatch,
    num_reqs: int,
    longest: int,
    data_parallel_size: int,
    expected: int | None,
) -> None:
    """Tables for one request of 96 pages are for two of 48."""
    monkeypatch.setattr(step_tables, "MAX_TABLE_BYTES", 4 * NUM_LAYERS * 96)
    state = gathered([100] * num_reqs)
    ours, _ = adapter(state, data_parallel_size)
    sizes = replace(ours._evictor.tables.sizes, max_table_width=96)
    ours._evictor.tables = StepTables(ours._evictor.pool, sizes)
    assert [sizes.graph_width(number) for number in (1, 2)] == [96, 48]
    ours._runner.req_states.num_computed_tokens_np[0] = longest - 1
    assert ours.gather_batch_req_state(OUTPUT, False)[1] == expected


def test_a_dummy_run_between_two_steps_is_vllms() -> None:
    """The orders are those of the last step."""
    ours = with_requests((100, 100))
    ours._evictor.begin_output((), None, EVICTS)
    assert ours.gather_batch_req_state(OUTPUT, True)[1] == 1


def test_steps_without_a_full_graph_stay_so() -> None:
    assert with_requests((100, 100), None).gather_batch_req_state(OUTPUT, False)[1] is None


def test_a_step_without_a_batch() -> None:
    ours, _ = adapter((None, 1))
    assert ours.gather_batch_req_state(OUTPUT, True) == (None, 1)
