# SPDX-License-Identifier: Apache-2.0
"""Adapter for vLLM's V2 model runner (`vllm.v1.worker.gpu`): wraps its `ModelState`."""

import dataclasses
from bisect import bisect_left
from typing import Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.drafts import DraftEvictor
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.step import Batch, BatchRow
from vl_cache_vllm.worker.step_tables import GraphShape


def draft_layers(runner: Any) -> set[str]:
    """Names of the attention layers of a runner's draft model."""
    return getattr(runner.speculator, "draft_attn_layer_names", set())


def install(
    runner: Any, evictor: Evictor, group: EvictedGroup, drafts: DraftEvictor | None
) -> None:
    """Hook eviction into a V2 model runner and its model state."""
    adapter = V2Adapter(runner, evictor, group, drafts)
    state = runner.model_state
    state.add_request = adapter.add_request
    state.remove_request = adapter.remove_request
    state.prepare_attn = adapter.prepare_attn
    runner.gather_batch_req_state = adapter.gather_batch_req_state
    if drafts is not None:
        speculator = runner.speculator
        speculator._prefill = adapter.draft_first_pass
        speculator._build_attn_metadata = adapter.build_draft_metadata
        # Metadata that vLLM updates in place between two passes would keep the first one's tables.
        speculator.supports_decode_metadata_update = False


class V2Adapter:
    """Translates V2's batches; V2 announces when requests start and end.

    A batch is known by its request ids, because dummy batches use the slots of live requests.
    """

    def __init__(
        self,
        runner: GPUModelRunner,
        evictor: Evictor,
        group: EvictedGroup,
        drafts: DraftEvictor | None = None,
    ) -> None:
        self._runner = runner
        self._evictor = evictor
        self._group = group
        self._drafts = drafts
        if drafts is not None:
            speculator: Any = runner.speculator
            self._draft_prefill = speculator._prefill
            self._build_draft = speculator._build_attn_metadata
        state = runner.model_state
        self._add, self._remove, self._prepare = (
            state.add_request,
            state.remove_request,
            state.prepare_attn,
        )
        self._gather = runner.gather_batch_req_state
        config = runner.vllm_config
        # Tokens of the graphs; with data parallelism another rank may need the largest one.
        self._graph_sizes = sorted(config.compilation_config.cudagraph_capture_sizes or ())
        if config.parallel_config.data_parallel_size > 1:
            self._graph_sizes = self._graph_sizes[-1:]
        # Slot in the table of requests by index of V2's request state.
        self._slots = np.zeros(runner.max_num_reqs, np.intp)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """vLLM's, and starts the request's state; vLLM also calls it after a preemption."""
        self._add(req_index, new_req_data)
        tokens = new_req_data.prefill_token_ids
        assert tokens is not None
        state = self._evictor.requests.add(
            new_req_data.req_id,
            self._evictor.config,
            new_req_data.sampling_params,
            new_req_data.mm_features,
            len(tokens),
            self._runner.model_config,
        )
        self._slots[req_index] = state.slot

    def remove_request(self, req_id: str) -> None:
        """vLLM's, and forgets the request."""
        self._remove(req_id)
        self._evictor.requests.drop(req_id)

    def gather_batch_req_state(
        self, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> tuple[Any, int | None]:
        """vLLM's, but keeps observed steps out of full CUDA graphs, which observe nothing.

        These are the steps that evict, and prefills that are observed: vLLM runs the last chunk of
        one as a decode if it is a single token. Nor do graphs run steps whose tables are wider than
        theirs, which only long requests beside many others need.
        """
        batch, uniform_token_count = self._gather(scheduler_output, dummy_run)
        if (
            not dummy_run
            and batch is not None
            and uniform_token_count is not None
            and (
                self._evictor.orders
                or (batch.has_prefill and self._observes_prefill(batch))
                or not self._fits_graph(batch)
            )
        ):
            return batch, None
        return batch, uniform_token_count

    def _fits_graph(self, batch: BatchReqState) -> bool:
        """Whether a graph's tables are wide enough for a step."""
        sizes = self._evictor.tables.sizes
        # The graph has the batch's requests and padding. Ranks of data parallelism agree on one.
        index = bisect_left(self._graph_sizes, batch.num_tokens)
        if index == len(self._graph_sizes):
            return True  # there is no graph
        width = sizes.graph_width(min(self._graph_sizes[index], sizes.max_graph_reqs))
        if width == sizes.width:
            return True
        computed = self._runner.req_states.num_computed_tokens_np[batch.idx_mapping_np]
        columns = self._evictor.requests.columns(self._slots[batch.idx_mapping_np])
        ends = computed + batch.num_scheduled_tokens
        return self._evictor.table_width(columns, ends) <= width

    def _observes_prefill(self, batch: BatchReqState) -> bool:
        """Whether a row that prefills is observed in this step."""
        evictor = self._evictor
        rows = (
            BatchRow(
                evictor.requests.in_slot(self._slots[batch.idx_mapping_np[index]]),
                int(batch.num_computed_prefill_tokens_np[index]),
                int(batch.num_scheduled_tokens[index]),
            )
            for index in np.flatnonzero(batch.is_prefilling_np)
        )
        return any(map(evictor.observes_prefill, rows))

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """vLLM's, with the step attached to the metadata of the evicted layers."""
        metadata = self._prepare(input_batch, cudagraph_mode, block_tables, *args, **kwargs)
        is_capture = bool(kwargs.get("for_capture"))
        batch = Batch.of(()) if is_capture else self._batch(input_batch)
        if batch is None:
            return metadata
        graph = None
        if is_capture or cudagraph_mode == CUDAGraphMode.FULL:
            graph = GraphShape(
                input_batch.num_reqs_after_padding, input_batch.num_tokens_after_padding
            )
        step = self._evictor.begin_step(
            batch,
            block_tables[self._group.index],
            input_batch.query_start_loc,
            input_batch.seq_lens,
            graph,
        )
        if is_capture and step is not None and step.tables is not None:
            step.tables.slot_mapping.fill_(-1)  # like vLLM: dummy batches write nothing
        if step is not None:
            step.attach(metadata, self._group.layers)
        if self._drafts is not None and not is_capture:
            self._drafts.begin_step(batch)
        return metadata

    def draft_first_pass(
        self,
        num_reqs: int,
        num_tokens: int,
        attn_metadata: dict[str, Any] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Replaces the method of the speculator, which passes on the model's metadata."""
        assert self._drafts is not None
        if attn_metadata is not None:
            # `replace` leaves out what is attached: the model's step.
            attn_metadata = {
                name: dataclasses.replace(attn_metadata[name]) for name in self._drafts.layers
            }
            self._drafts.first_pass(attn_metadata)
        self._draft_prefill(num_reqs, num_tokens, attn_metadata, *args, **kwargs)

    def build_draft_metadata(self, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
        """Replaces the speculator's method, which it calls for each further pass."""
        metadata: dict[str, Any] | None = self._build_draft(*args, **kwargs)
        if metadata is not None:
            assert self._drafts is not None
            self._drafts.further_pass(metadata)
        return metadata

    def _batch(self, input_batch: InputBatch) -> Batch | None:
        """The batch; None for a dummy batch."""
        requests, ids = self._evictor.requests, input_batch.req_ids
        if requests.get(ids[0]) is None:  # a batch has no dummies beside real requests
            return None
        slots = self._slots[input_batch.idx_mapping_np]
        return Batch(
            ids,
            input_batch.num_computed_tokens_np,
            input_batch.num_scheduled_tokens,
            requests.columns(slots),
            lambda row: requests.in_slot(slots[row]),
        )
