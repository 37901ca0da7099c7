# SPDX-License-Identifier: Apache-2.0
"""Adapter for vLLM's V2 model runner (`vllm.v1.worker.gpu`): wraps its `ModelState`."""

from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from vl_cache_vllm.worker.attach import EvictedGroup, attach_step
from vl_cache_vllm.worker.eviction import EvictionWorker
from vl_cache_vllm.worker.step import BatchRow


class V2Adapter:
    """V2 announces when requests start and end.

    Dummy batches borrow the slots of live requests, but not their ids: hence keyed by id.
    """

    def __init__(self, runner: GPUModelRunner, worker: EvictionWorker, group: EvictedGroup) -> None:
        self._runner = runner
        self._worker = worker
        self._group = group
        state = runner.model_state
        self._add, self._remove, self._prepare = (
            state.add_request,
            state.remove_request,
            state.prepare_attn,
        )

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """A request starts, or starts over after a preemption."""
        self._add(req_index, new_req_data)
        tokens = new_req_data.prefill_token_ids
        assert tokens is not None
        self._worker.requests.arrive(
            new_req_data.req_id,
            self._worker.config,
            new_req_data.sampling_params,
            new_req_data.mm_features,
            len(tokens),
            self._runner.model_config,
        )

    def remove_request(self, req_id: str) -> None:
        self._remove(req_id)
        self._worker.requests.drop(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata = self._prepare(input_batch, *args, **kwargs)
        states = [self._worker.requests.get(req_id) for req_id in input_batch.req_ids]
        if kwargs.get("for_capture") or None in states:
            return metadata  # a dummy batch: warm-up or graph capture
        group = self._group.index
        slots = input_batch.idx_mapping_np[: input_batch.num_reqs]
        num_blocks = self._runner.block_tables.num_blocks.np[group, slots]
        rows = [
            BatchRow(state, int(computed), int(scheduled), int(blocks))  # type: ignore[arg-type]
            for state, computed, scheduled, blocks in zip(
                states,
                input_batch.num_computed_tokens_np,
                input_batch.num_scheduled_tokens,
                num_blocks,
                strict=True,
            )
        ]
        step = self._worker.begin_step(
            rows,
            self._runner.block_tables.input_block_tables[group],
            input_batch.query_start_loc,
            input_batch.seq_lens,
        )
        if step is not None:
            attach_step(metadata, self._worker, step, self._group)
        return metadata
