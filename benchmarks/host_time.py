# SPDX-License-Identifier: Apache-2.0
"""Host time that eviction adds to a decode step, in the scheduler and in a V2 worker.

    python -m benchmarks.host_time [--running 1 64 256] [--when always] [--every TOKENS]

The scheduler is vLLM's real one, with and without eviction, on equal requests. Both take their
steps in turns; the overhead is the median difference of the same step. The worker is the V2 adapter
over a stand-in for vLLM's runner that does nothing, so all time in it is overhead. Steps are
measured with an unchanged batch, and with one in which a request has ended and another one has
started. Admission is one question for the blocks of a waiting request, of which vLLM asks one in
each step in which requests wait and blocks are free. There is no model and no device: launches of
kernels are not counted. Times are CPU time of this thread, which other processes hardly affect.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks import shape
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report
from testing.v2_runner import v2_runner

PROMPT_TOKENS, BLOCK_SIZE, NUM_LAYERS = 640, 16, 36
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_NUM_TOKENS = 8192, 256, 16384
MAX_OUTPUT = MAX_MODEL_LEN - PROMPT_TOKENS
NUM_BLOCKS = 20000  # no request waits
STEPS = 200


def _microseconds(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.thread_time_ns()
    result = call()
    return (time.thread_time_ns() - began) / 1000, result


# --------------------------------------------------------------------------------------------------
# Scheduler


class SchedulerUnderTest:
    """A scheduler whose requests decode, with a worker that samples one token for each of them."""

    def __init__(self, model: Path, kv_compress: dict[str, Any] | None) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.structured_output import StructuredOutputManager

        config = EngineArgs(
            str(model),
            load_format="dummy",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_TOKENS,
            block_size=BLOCK_SIZE,
            async_scheduling=False,
            additional_config={} if kv_compress is None else {"kv_compress": kv_compress},
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        config.device_config.device_type = "cuda"  # observation is bounded, as on a GPU
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            config,
            _kv_cache_config(config),
            StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self.scheduler.use_v2_model_runner = True  # vLLM's configuration refuses it without a GPU
        self._count = 0

    def add(self) -> None:
        """Queue one more request."""
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self._count += 1
        prompt = [self._count, *range(PROMPT_TOKENS - 1)]  # no common prefix
        self.scheduler.add_request(
            Request(
                f"request-{self._count}",
                prompt,
                # All end at different times, which the output reserve takes into account.
                SamplingParams(max_tokens=MAX_OUTPUT - self._count % (MAX_OUTPUT // 2)),
                None,
                block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
            )
        )

    def step(self) -> float:
        """Schedule and process a step; microseconds of both."""
        from vllm.v1.outputs import ModelRunnerOutput

        scheduling, output = _microseconds(self.scheduler.schedule)
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        done = [requests[i].num_computed_tokens >= PROMPT_TOKENS for i in ids]
        result = ModelRunnerOutput(
            ids, {r: i for i, r in enumerate(ids)}, [[7] if is_done else [] for is_done in done]
        )
        processing, _ = _microseconds(lambda: self.scheduler.update_from_output(output, result))
        return scheduling + processing

    def run(self, running: int) -> None:
        """Have so many requests, all of which decode and are evicted."""
        for _ in range(running):
            self.add()
        while self.scheduler.waiting:
            self.step()
        for _ in range(8):
            self.step()
        assert len(self.scheduler.running) == running

    def replace_one(self) -> None:
        """End a request and queue another."""
        from vllm.v1.request import RequestStatus

        oldest = self.scheduler.running[0].request_id
        self.scheduler.finish_requests(oldest, RequestStatus.FINISHED_STOPPED)
        self.add()

    def admission(self) -> float:
        """Microseconds of asking for the blocks of a waiting request."""
        self.add()
        (request,) = self.scheduler.waiting
        tokens = request.num_tokens
        coordinator = self.scheduler.kv_cache_manager.coordinator

        def ask() -> int:
            return coordinator.get_num_blocks_to_allocate(
                request.request_id, tokens, ((),), 0, 0, 0, tokens, apply_admission_cap=True
            )

        return statistics.median(_microseconds(ask)[0] for _ in range(STEPS))


def _kv_cache_config(config: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from vl_cache_vllm.config import get_kv_compress_config
    from vl_cache_vllm.core.spec import EvictionAttentionSpec

    spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    settings = get_kv_compress_config(config)
    if settings is not None:
        spec = EvictionAttentionSpec.wrap(spec, settings)
    names = [f"layer.{index}" for index in range(NUM_LAYERS)]
    return KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(names, spec)])


def measure_scheduler(model: Path, settings: dict[str, Any], running: int) -> list[Row]:
    stock, ours = SchedulerUnderTest(model, None), SchedulerUnderTest(model, settings)
    both = stock, ours
    for one in both:
        one.run(running)
    assert ours.scheduler.eviction_stats.evicted == (running if settings["when"] == "always" else 0)
    rows = []
    for changed in (False, True):
        times: list[tuple[float, float]] = []
        gc.collect()
        gc.freeze()
        for number in range(STEPS):
            if changed:
                for one in both:
                    one.replace_one()
            pair = [one.step() for one in (both if number % 2 else both[::-1])]
            times.append((pair[0], pair[1]) if number % 2 else (pair[1], pair[0]))
        rows.append(
            {
                "part": "scheduler",
                "running": running,
                "changed": changed,
                "baseline_us": _median([b for b, _ in times]),
                "overhead_us": _median([o - b for b, o in times]),
            }
        )
    admissions = [one.admission() for one in both]
    rows.append(
        {
            "part": "admission",
            "running": running,
            "changed": False,
            "baseline_us": round(admissions[0], 1),
            "overhead_us": round(admissions[1] - admissions[0], 1),
        }
    )
    return rows


# --------------------------------------------------------------------------------------------------
# Worker


class WorkerUnderTest:
    """A V2 adapter and its evictor; vLLM's runner and the device do nothing."""

    def __init__(self) -> None:
        import torch

        from vl_cache_vllm.config import KVCompressConfig
        from vl_cache_vllm.policy.snapkv import SnapKVPolicy
        from vl_cache_vllm.worker.build import EvictedGroup
        from vl_cache_vllm.worker.evictor import Evictor
        from vl_cache_vllm.worker.v2 import V2Adapter
        from vl_cache_vllm.worker.warmup import blank_pool

        pool = blank_pool(NUM_LAYERS, 1, BLOCK_SIZE, 8, torch.float32, torch.device("cpu"))
        self.evictor = Evictor(
            KVCompressConfig(SnapKVPolicy(), text=True, min_prompt_tokens=1),
            pool,
            num_heads=1,
            max_num_reqs=MAX_NUM_SEQS,
            max_num_tokens=MAX_NUM_TOKENS,
            max_table_width=MAX_MODEL_LEN // BLOCK_SIZE + 1,
            max_graph_reqs=MAX_NUM_SEQS,
        )
        layers = {f"layer.{index}": index for index in range(NUM_LAYERS)}
        runner, _ = v2_runner(MAX_NUM_SEQS, [MAX_NUM_SEQS], lambda *_: (self._gathered, 1), layers)
        self.adapter = V2Adapter(runner, self.evictor, EvictedGroup(0, layers))
        self._gathered: Any = None
        self._count = 0
        self._ids: list[str] = []  # by index of V2's request state
        self._block_table = torch.zeros(
            MAX_NUM_SEQS, MAX_MODEL_LEN // BLOCK_SIZE, dtype=torch.int32
        )

    def start(self, index: int) -> None:
        """Prefill and evict a request with an index of V2's request state."""
        import torch
        from vllm.sampling_params import SamplingParams

        from vl_cache_vllm.messages import EvictionOrder

        self._count += 1
        request_id = f"request-{self._count}"
        new: Any = SimpleNamespace(
            req_id=request_id,
            prefill_token_ids=range(PROMPT_TOKENS),
            sampling_params=SamplingParams(max_tokens=MAX_MODEL_LEN),
            mm_features=[],
        )
        self.adapter.add_request(index, new)
        order = EvictionOrder(PROMPT_TOKENS // BLOCK_SIZE * BLOCK_SIZE, (0,) * 4)
        self.evictor.begin_output((), None, {request_id: order})
        self._prepare([request_id], [index], 0, PROMPT_TOKENS)
        state = self.evictor.requests.get(request_id)
        assert state is not None and state.evicted_tokens
        kept_pages = torch.full((NUM_LAYERS,), 4)
        kept_row = torch.zeros(4, dtype=torch.int64)
        live = self.evictor.requests.evicted_slots()
        self.evictor.tables.set_kept(state.slot, kept_pages, kept_row, live)
        self.evictor.begin_output((), None, {})
        self._ids[index : index + 1] = [request_id]

    def replace_one(self, index: int) -> None:
        """End the request with an index, and evict another one that has the index."""
        self.adapter.remove_request(self._ids[index])
        self.start(index)

    def step(self, computed: int) -> float:
        """Microseconds of a decode step in a full graph."""
        return self._prepare(self._ids, range(len(self._ids)), computed, 1)

    def _prepare(
        self, ids: Sequence[str], indices: Sequence[int], computed: int, scheduled: int
    ) -> float:
        import numpy as np
        import torch
        from vllm.config import CUDAGraphMode

        num = len(ids)
        graph = CUDAGraphMode.FULL if scheduled == 1 else CUDAGraphMode.NONE
        all_computed = np.full(num, computed, dtype=np.int32)
        prefill = np.full(num, PROMPT_TOKENS, dtype=np.int32)
        batch: Any = SimpleNamespace(
            req_ids=ids,
            num_reqs=num,
            num_reqs_after_padding=num,
            num_tokens=num * scheduled,
            num_tokens_after_padding=num * scheduled,
            idx_mapping_np=np.array(indices, dtype=np.intp),
            num_computed_tokens_np=all_computed,
            num_scheduled_tokens=np.full(num, scheduled, dtype=np.int32),
            query_start_loc=torch.arange(num + 1, dtype=torch.int32) * scheduled,
            seq_lens=torch.full((num,), computed + scheduled, dtype=torch.int32),
        )
        self._gathered = SimpleNamespace(
            req_ids=ids,
            has_prefill=scheduled > 1,
            idx_mapping_np=batch.idx_mapping_np,
            is_prefilling_np=all_computed < prefill,
            num_computed_prefill_tokens_np=np.minimum(all_computed, prefill),
            num_scheduled_tokens=batch.num_scheduled_tokens,
            num_tokens=batch.num_tokens,
        )
        output: Any = None
        block_tables = (self._block_table[:num],)

        def run() -> None:
            self.evictor.begin_output((), [], self.evictor.orders)
            self.adapter.gather_batch_req_state(output, False)
            self.adapter.prepare_attn(batch, graph, block_tables)

        with mock.patch("vl_cache_vllm.worker.step_tables.layer_tables", lambda *_: None):
            return _microseconds(run)[0]


def measure_worker(running: int) -> list[Row]:
    worker = WorkerUnderTest()
    for index in range(running):
        worker.start(index)
    rows = []
    for changed in (False, True):
        times = []
        gc.collect()
        gc.freeze()
        for number in range(STEPS):
            if changed:
                worker.replace_one(number % running)
            times.append(worker.step(PROMPT_TOKENS + number))
        rows.append(
            {
                "part": "worker",
                "running": running,
                "changed": changed,
                "baseline_us": 0.0,
                "overhead_us": _median(times),
            }
        )
    return rows


def measure(model: Path, settings: dict[str, Any], running: int) -> list[Row]:
    """Microseconds of each part, with this number of running requests."""
    return measure_worker(running) + measure_scheduler(model, settings, running)


def eviction_settings(when: str, every: int | None) -> dict[str, Any]:
    """Settings of KV compression: all prompts can be evicted, also those of text."""
    return {
        "policy": "snapkv",
        "budget": 0.1,
        "text": True,
        "min_prompt_tokens": 1,
        "when": when,
        "every": every,
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--running", type=int, nargs="+", default=[1, 64, MAX_NUM_SEQS])
    parser.add_argument("--when", choices=("always", "pressure"), default="always")
    parser.add_argument("--every", type=int, help="bound of the tokens between later evictions")
    options = parser.parse_args(arguments)
    set_vllm_environment()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model")
        for running in options.running:
            rows += measure(model, eviction_settings(options.when, options.every), running)
    if options.json:
        write_report(options.json, "benchmarks.host_time", arguments, rows=rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
