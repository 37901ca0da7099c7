# SPDX-License-Identifier: Apache-2.0
"""Scheduler and worker agree although only row lengths pass between them.

The random histories of the block manager's test, with a worker that plans every step: what it
observes and finishes must be what the scheduler decided, through the bookkeeping of either runner.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import initialize, run_state_machine_as_test
from vllm.v1.request import Request

from tests.engine.test_block_manager import BLOCK_SIZE, BlockAccounting
from tests.worker.fakes import FakeV1Runner, RecordingWorker
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.engine.admission import post_vision_start
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.attach import EvictedGroup
from vl_cache_vllm.worker.step import BatchRow, RequestState, StepNumbers
from vl_cache_vllm.worker.v1 import V1Adapter


class WorkerAgreement(BlockAccounting):
    """Adds a worker that is told what vLLM tells its runners."""

    @initialize()
    def start_worker(self) -> None:
        self.worker: RecordingWorker | None = None
        self.observed: dict[RequestState, list[int]] = {}

    def on_step(self, step: list[tuple[Request, int]]) -> None:
        if self.worker is None:
            policy = VLCachePolicy(max_observation_tokens=self.max_observation_tokens)
            config = KVCompressConfig(
                policy, float(self.budget), min_prompt_tokens=self.min_prompt_tokens
            )
            self.worker = RecordingWorker(config, BLOCK_SIZE)
            self.start_runner()
        rows, numbers = self.run_step(step)
        finishes = {rows[finish.row].state.request_id: finish for finish in numbers.finishes}
        for observation in numbers.observations:
            row = rows[observation.row]
            first_token = sum(r.num_scheduled for r in rows[: observation.row])
            start = observation.query_start - first_token + row.num_computed
            end = observation.query_end - first_token + row.num_computed
            assert start == observation.first_position
            self.observed.setdefault(row.state, []).extend(range(start, end))
            self.seen["observed"] += 1
        for (request, num_new), row in zip(step, rows, strict=True):
            expected = self.expected[request.request_id]
            finish = finishes.pop(request.request_id, None)
            ends_here = request.num_computed_tokens < expected.prompt_tokens <= row_end(row)
            assert (finish is not None) == (ends_here and expected.num_kept > 0)
            if finish is not None:
                assert row_end(row) == expected.prompt_tokens == row.state.prefill_tokens
                assert finish.prompt_tokens == expected.prompt_tokens
                assert finish.prompt_blocks == expected.num_prompt
                assert finish.kept_blocks == expected.num_kept
                observed_from = self.worker.config.policy.observation_start(
                    post_vision_start(self.worker.config, request.mm_features) or 0,
                    expected.prompt_tokens,
                )
                window = list(range(observed_from, expected.prompt_tokens))
                assert self.observed[row.state] == window
                self.seen["finished"] += 1
                self.seen["finished after chunks"] += num_new < expected.prompt_tokens
            if expected.is_decided and expected.num_kept:
                assert row.state.evicted_tokens == expected.prompt_tokens
                assert row.state.prompt_blocks == expected.num_prompt
                assert row.state.kept_blocks == expected.num_kept
            else:
                assert row.state.evicted_tokens == 0
        assert not finishes
        slots = [row.state.slot for row in rows]
        assert len(set(slots)) == len(slots)

    def start_runner(self) -> None:
        raise NotImplementedError

    def run_step(self, step: list[tuple[Request, int]]) -> tuple[list[BatchRow], StepNumbers]:
        raise NotImplementedError


def row_end(row: BatchRow) -> int:
    return row.num_computed + row.num_scheduled


class V2Agreement(WorkerAgreement):
    """V2 announces every start, also after a preemption."""

    def start_runner(self) -> None:
        self.states: dict[str, tuple[object, RequestState]] = {}

    def run_step(self, step: list[tuple[Request, int]]) -> tuple[list[BatchRow], StepNumbers]:
        assert self.worker is not None
        table = self.worker.requests
        for request_id in [i for i in self.states if i not in self.harness.requests]:
            table.drop(request_id)
            del self.states[request_id]
        rows = []
        for request, num_new in step:
            # A new record of the model: the request started or restarted.
            expected = self.expected[request.request_id]
            if self.states.get(request.request_id, (None,))[0] is not expected:
                state = table.start(
                    request.request_id,
                    self.worker.config.for_request(request.sampling_params.extra_args),
                    post_vision_start(self.worker.config, request.mm_features),
                    request.num_tokens,
                )
                self.states[request.request_id] = expected, state
            state = self.states[request.request_id][1]
            num_blocks = len(self.harness.row(request))
            rows.append(BatchRow(state, request.num_computed_tokens, num_new, num_blocks))
        self.worker.begin_step(rows)
        assert self.worker.planned is not None
        return self.worker.planned


class V1Agreement(WorkerAgreement):
    """V1 tells nobody about restarts; the real adapter finds them out."""

    def start_runner(self) -> None:
        self.runner = FakeV1Runner()
        self.last_known: dict[str, object] = {}
        self.adapter = V1Adapter(self.runner, self.worker, EvictedGroup(0, {}))  # type: ignore[arg-type]

    def run_step(self, step: list[tuple[Request, int]]) -> tuple[list[BatchRow], StepNumbers]:
        assert self.worker is not None
        self.runner.requests = {
            i: record for i, record in self.runner.requests.items() if i in self.harness.requests
        }
        resumed = {
            request.request_id
            for request, _ in step
            if self.last_known.get(request.request_id, self.expected[request.request_id])
            is not self.expected[request.request_id]
        }
        self.last_known.update((r.request_id, self.expected[r.request_id]) for r, _ in step)
        rows = [(r, r.num_computed_tokens, self.harness.row(r)) for r, _ in step]
        self.runner.schedule(rows, resumed)
        self.seen["resumed"] += len(resumed)
        num_scheduled = {request.request_id: num_new for request, num_new in step}
        self.adapter.build_attention_metadata(num_scheduled_tokens=num_scheduled)
        assert self.worker.planned is not None
        return self.worker.planned


@pytest.mark.parametrize("machine", [V1Agreement, V2Agreement], ids=["v1", "v2"])
def test_random_histories(machine: type[WorkerAgreement]) -> None:
    seen = machine.seen = Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )
    for event in ("observed", "finished", "finished after chunks", "evicted after preemption"):
        assert seen[event], f"no history had: {event} ({dict(seen)})"
