# SPDX-License-Identifier: Apache-2.0
"""Adapter for vLLM's V1 model runner (`vllm.v1.worker.gpu_model_runner`)."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.drafts import DraftEvictor
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.requests import RequestState
from vl_cache_vllm.worker.step import Batch, BatchRow


def draft_layers(runner: Any) -> set[str]:
    """Names of the attention layers of a runner's draft model."""
    return getattr(getattr(runner, "drafter", None), "_draft_attn_layer_names", set())


def install(
    runner: Any, evictor: Evictor, group: EvictedGroup, drafts: DraftEvictor | None
) -> None:
    """Hook eviction into a V1 model runner."""
    adapter = V1Adapter(runner, evictor, group, drafts)
    runner._build_attention_metadata = adapter.build_attention_metadata
    if drafts is not None:
        runner.drafter.build_per_group_and_layer_attn_metadata = adapter.build_draft_metadata


class V1Adapter:
    """Translates the runner's batch into a `Batch` and attaches the step to the metadata.

    V1 does not announce that a request restarts after a preemption. It replaces the request's list
    of block ids then (`_update_states`), whereas it extends the list in place while the request
    runs.
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
        self._build = runner._build_attention_metadata
        if drafts is not None:
            drafter: Any = runner.drafter
            self._build_draft = drafter.build_per_group_and_layer_attn_metadata
        # The list of block ids that a request's state belongs to, compared by identity. A reused
        # request id comes with a new list, too.
        self._block_ids: dict[str, object] = {}

    def build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces the runner's method of the same name."""
        result = self._build(*args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:  # None: a dummy run
            self._attach(result[0], scheduled)
        return result

    def _attach(self, metadata: Any, num_scheduled_tokens: dict[str, int]) -> None:
        runner = self._runner
        requests = self._evictor.requests
        if len(requests) > len(runner.requests):
            requests.drop_all_but(runner.requests)
            self._block_ids = {k: v for k, v in self._block_ids.items() if k in runner.requests}
        batch, group = runner.input_batch, self._group.index
        rows = [
            BatchRow(
                state=self._state(req_id),
                num_computed=int(num_computed),
                num_scheduled=num_scheduled_tokens[req_id],
            )
            for req_id, num_computed in zip(
                batch.req_ids, batch.num_computed_tokens_cpu[: batch.num_reqs], strict=True
            )
        ]
        planned = Batch.of(rows)
        step = self._evictor.begin_step(
            planned,
            batch.block_table[group].get_device_tensor(batch.num_reqs),
            runner.query_start_loc.gpu,
            runner.seq_lens,
        )
        if step is not None:
            step.attach(metadata, self._group.layers)
        if self._drafts is not None:
            self._drafts.begin_step(planned)

    def build_draft_metadata(self, *args: Any, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        """Replaces the drafter's method, which it calls for each pass of its model."""
        assert self._drafts is not None
        groups, layers = self._build_draft(*args, **kwargs)
        if kwargs.get("draft_index", 0) == 0:
            self._drafts.first_pass(layers)
        else:
            self._drafts.further_pass(layers)
        return groups, layers

    def _state(self, req_id: str) -> RequestState:
        runner = self._runner
        record = runner.requests[req_id]
        state = self._evictor.requests.get(req_id)
        if state is None or self._block_ids[req_id] is not record.block_ids:
            self._block_ids[req_id] = record.block_ids
            state = self._evictor.requests.add(
                req_id,
                self._evictor.config,
                record.sampling_params,
                record.mm_features,
                record.num_prompt_tokens + self._num_output_tokens(req_id),
                runner.model_config,
            )
        return state

    def _num_output_tokens(self, req_id: str) -> int:
        """The scheduler's number; the runner of an early pipeline stage may lag behind."""
        cached = self._evictor.cached_requests
        if cached is not None and req_id in cached.req_ids:
            return cached.num_output_tokens[cached.req_ids.index(req_id)]
        return len(self._runner.requests[req_id].output_token_ids)
