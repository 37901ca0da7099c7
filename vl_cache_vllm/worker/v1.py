# SPDX-License-Identifier: Apache-2.0
"""Adapter for vLLM's V1 model runner (`vllm.v1.worker.gpu_model_runner`)."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vl_cache_vllm.engine.admission import post_vision_start
from vl_cache_vllm.worker.attach import attach_step
from vl_cache_vllm.worker.eviction import EvictionWorker
from vl_cache_vllm.worker.step import BatchRow, RequestState


class V1Adapter:
    """Turns the runner's batch into `BatchRow`s and hands the step to the metadata.

    V1 tells nobody about restarts after a preemption, so they are recognised by what they do:
    a request that has computed fewer tokens than it had starts over.
    """

    def __init__(
        self, runner: GPUModelRunner, worker: EvictionWorker, layer_index: dict[str, int]
    ) -> None:
        self._runner = runner
        self._worker = worker
        self._layer_index = layer_index
        self._build = runner._build_attention_metadata
        # The runner's record of a request; a reused id comes with a new record.
        self._records: dict[str, object] = {}

    def build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the runner's method of the same name."""
        result = self._build(*args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:  # None: a dummy run
            self._attach(result[0], scheduled)
        return result

    def _attach(self, metadata: Any, num_scheduled_tokens: dict[str, int]) -> None:
        runner = self._runner
        requests = self._worker.requests
        if len(requests) > len(runner.requests):
            requests.drop_all_but(runner.requests)
            self._records = {k: v for k, v in self._records.items() if k in runner.requests}
        batch = runner.input_batch
        rows = [
            BatchRow(
                state=self._state(req_id, int(num_computed)),
                num_computed=int(num_computed),
                num_scheduled=num_scheduled_tokens[req_id],
                num_blocks=len(runner.requests[req_id].block_ids[0]),
            )
            for req_id, num_computed in zip(
                batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], strict=True
            )
        ]
        step = self._worker.begin_step(
            rows,
            batch.block_table[0].get_device_tensor(batch.num_reqs),
            runner.query_start_loc.gpu,
            runner.seq_lens,
        )
        if step is not None:
            attach_step(metadata, self._worker, step, self._layer_index)

    def _state(self, req_id: str, num_computed: int) -> RequestState:
        record = self._runner.requests[req_id]
        state = self._worker.requests.get(req_id)
        if (
            state is None
            or self._records[req_id] is not record
            or num_computed < state.num_computed
        ):
            self._records[req_id] = record
            state = self._worker.requests.start(
                req_id,
                req_id,
                post_vision_start(record.mm_features or ()),
                record.num_prompt_tokens + len(record.output_token_ids),
            )
        return state
