# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the worker's surroundings: no device, no model, no engine."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.request import Request

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.worker.requests import RequestTable
from vl_cache_vllm.worker.step import Batch, BatchRow, StepPlan, plan_step
from vl_cache_vllm.worker.step_tables import StepTables, TableSizes

NUM_LAYERS = 3


def give_graphs_tables(monkeypatch: pytest.MonkeyPatch, num_reqs: int) -> None:
    """Give engines, which have no graphs on a CPU, the tables of graphs for so many requests."""
    original = StepTables.__init__

    def init(self: StepTables, pool: PagePool, sizes: TableSizes) -> None:
        original(self, pool, replace(sizes, max_graph_reqs=num_reqs))

    monkeypatch.setattr(StepTables, "__init__", init)


class RecordingWorker:
    """In place of `Evictor`: plans steps, has no device."""

    def __init__(self, config: KVCompressConfig, block_size: int) -> None:
        self.config = config
        self.block_size = block_size
        self.requests = RequestTable()
        self.cached_requests: Any = None
        self.orders: Mapping[str, EvictionOrder] = {}
        self.planned: tuple[list[BatchRow], StepPlan] | None = None

    def begin_step(self, batch: Batch, *tensors: Any) -> None:
        rows = [batch.row(index) for index in range(len(batch.request_ids))]
        self.planned = rows, plan_step(batch, self.block_size, NUM_LAYERS, orders=self.orders)


@dataclass
class Record:
    """As much of V1's CachedRequestState as the adapter reads."""

    mm_features: list[MultiModalFeatureSpec]
    num_prompt_tokens: int
    output_token_ids: list[int]
    sampling_params: SamplingParams | None
    block_ids: tuple[list[int], ...]


@dataclass
class FakeV1Runner:
    """V1's requests and batch: records live from arrival to the end, also while preempted."""

    requests: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model_config = SimpleNamespace(hf_config=SimpleNamespace())
        self.input_batch = SimpleNamespace(
            req_ids=[],
            num_reqs=0,
            num_computed_tokens_cpu=[],
            block_table=[SimpleNamespace(get_device_tensor=lambda _: torch.zeros(0))],
        )
        self.query_start_loc = SimpleNamespace(gpu=torch.zeros(0))
        self.seq_lens = torch.zeros(0)

    def _build_attention_metadata(self, **kwargs: Any) -> tuple[dict[str, Any], None]:
        return {}, None

    def schedule(
        self, rows: list[tuple[Request, int, list[int]]], resumed: Container[str] = ()
    ) -> None:
        """Apply a step as `_update_states` does.

        Args:
            rows: request, computed tokens and whole block row of each request.
            resumed: ids of those that start over after a preemption.
        """
        self.input_batch.req_ids = [request.request_id for request, _, _ in rows]
        self.input_batch.num_reqs = len(rows)
        self.input_batch.num_computed_tokens_cpu = [computed for _, computed, _ in rows]
        for request, _, block_ids in rows:
            record = self.requests.get(request.request_id)
            if record is None:
                record = Record(
                    request.mm_features,
                    request.num_prompt_tokens,
                    [],
                    request.sampling_params,
                    ([],),
                )
                self.requests[request.request_id] = record
            record.output_token_ids = list(request.output_token_ids)
            if request.request_id in resumed:
                record.block_ids = (list(block_ids),)
            else:
                record.block_ids[0].extend(block_ids[len(record.block_ids[0]) :])
