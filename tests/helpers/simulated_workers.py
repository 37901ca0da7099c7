# SPDX-License-Identifier: Apache-2.0
"""Workers without a model: vLLM's bookkeeping, our whole device side, pages that hold labels.

A label stands for the K and V of one token: it is different for every sequence of tokens and
images that ends there, and, once a request was evicted, for every request and number of its
evictions. So whoever reads another's page, or one that was freed, reads a wrong label.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import InputBatch

from tests.helpers.pools import make_pool
from tests.helpers.schedulers import Setup
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import take_deferred, take_orders
from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.evictor import EvictionStep, Evictor
from vl_cache_vllm.worker.requests import RequestState
from vl_cache_vllm.worker.step import Batch, BatchRow
from vl_cache_vllm.worker.v1 import V1Adapter
from vl_cache_vllm.worker.v2 import V2Adapter

NUM_LAYERS = 4
NUM_HEADS = 2  # query heads, of one KV head
GROUP = 0  # the KV cache group that is evicted
FREE = -1.0  # label of pages that nobody holds


class Labels:
    """Gives equal numbers to equal histories."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def _number(self, key: Any) -> int:
        return self._numbers.setdefault(key, 1 + len(self._numbers))

    def __call__(
        self, request: Request, tokens: Sequence[int], private: Mapping[int, object] | None = None
    ) -> list[int]:
        """One label a token; from each position of ``private`` on they depend on its value."""
        images: dict[int, str] = {}
        for feature in request.mm_features:
            place = feature.mm_position
            images.update(
                dict.fromkeys(range(place.offset, place.offset + place.length), feature.identifier)
            )
        labels, last = [], 0
        for position, token in enumerate(tokens):
            if private is not None and position in private:
                last = self._number((last, private[position]))
            last = self._number((last, token, images.get(position)))
            labels.append(last)
        return labels


class _RecordingWorker(Evictor):
    """Keeps what was planned."""

    rows: Sequence[BatchRow] = ()
    step: EvictionStep | None = None

    def begin_step(self, batch: Batch, *tensors: Any) -> EvictionStep | None:
        self.rows = [batch.row(index) for index in range(len(batch.request_ids))]
        self.step = super().begin_step(batch, *tensors)
        return self.step


@dataclass
class Cached:
    """What a request's layers hold besides the tokens from ``evicted_tokens`` on."""

    evicted_tokens: int = 0  # E
    kept_blocks: int = 0  # M
    kept: list[list[float]] = field(default_factory=lambda: [[] for _ in range(NUM_LAYERS)])
    source: list[list[float]] | None = None  # of which `kept` is to be learnt; None: it is known
    private: dict[int, object] = field(default_factory=dict)  # for `Labels`


class SimulatedWorker:
    """What all workers do with a step; subclasses keep books as one of vLLM's runners."""

    def __init__(
        self,
        setup: Setup,
        config: KVCompressConfig,
        num_blocks: int,
        labels: Labels,
        page_order: str,
        windows: Sequence[SlidingWindowSpec] = (),
    ) -> None:
        self.setup, self.labels, self.windows = setup, labels, windows
        self.pool = make_pool(
            page_order,
            num_layers=NUM_LAYERS,
            num_blocks=num_blocks,
            num_kv_heads=1,
            block_size=setup.block_size,
            head_size=2,
        )
        self.keys = self.pool.packing.key.unpack(self.pool.pages)  # [num_pages, 1, block_size, 2]
        self.values = self.pool.packing.value.unpack(self.pool.pages)
        self.free(range(num_blocks))
        self.evictor = _RecordingWorker(
            config,
            self.pool,
            num_heads=NUM_HEADS,
            max_num_reqs=setup.max_num_seqs,
            max_num_tokens=setup.max_num_tokens,
            max_table_width=setup.max_model_len // setup.block_size + 1,
            max_graph_reqs=max_graph_reqs(setup),
        )
        self.cached: dict[RequestState, Cached] = {}
        self._generator = torch.Generator().manual_seed(0)

    # Of a runner.

    def update(self, output: SchedulerOutput) -> tuple[list[BatchRow], list[list[list[int]]]]:
        """Keep books; the batch, and of every group the whole block rows."""
        raise NotImplementedError

    def sampled(self, request_id: str, tokens: list[int]) -> None:
        """A request has new tokens."""

    # Of a model.

    def free(self, block_ids: Sequence[int]) -> None:
        """Nobody will ever read these blocks."""
        pages = self._pages_of(block_ids)
        self.values[pages], self.keys[pages] = FREE, _keys(torch.tensor([FREE]))

    def contents(self) -> list[list[list[float]]]:
        """Labels in the cache, ``[num_blocks, num_layers, block_size]``."""
        blocks = torch.arange(len(self.pool.pages) // NUM_LAYERS)
        return self.values[self._pages_of(blocks), 0, :, 0].unflatten(0, (-1, NUM_LAYERS)).tolist()

    def execute(
        self,
        output: SchedulerOutput,
        requests: dict[str, Request],
        tokens_of: Callable[[str], list[int]],
    ) -> tuple[list[BatchRow], list[list[list[int]]]]:
        """Run a step.

        Args:
            output: of the scheduler.
            requests: the scheduler's.
            tokens_of: known and draft tokens of a request.
        """
        ended = output.finished_req_ids | (output.preempted_req_ids or set())
        orders, deferred = take_orders(output), take_deferred(output)
        self.evictor.begin_output(ended, None, orders, deferred)
        self.evictor.rows, self.evictor.step = (), None
        rows, tables = self.update(output)
        if not rows:
            return rows, tables
        labels = []
        for row in rows:
            state = row.state
            request = requests[state.request_id]
            tokens = tokens_of(state.request_id)[: row.num_computed + row.num_scheduled]
            assert len(tokens) == row.num_computed + row.num_scheduled
            cached = self.cached.setdefault(state, Cached())
            if cached.source is not None:  # evicted in its last step
                cached.private[row.num_computed] = (state, len(cached.private))
            labels.append(self.labels(request, tokens, cached.private))
        for window, table in zip(self.windows, tables[1:], strict=True):
            self._run_window(window, rows, table, labels)
        step = self.evictor.step
        for layer in range(NUM_LAYERS):
            self._write(layer, rows, tables[GROUP], of_layer(layer, labels), step)
        for layer in range(NUM_LAYERS):
            self._read(layer, rows, tables[GROUP], of_layer(layer, labels), step)
            if step is not None:
                num_tokens = sum(row.num_scheduled for row in rows)
                query = torch.randn(num_tokens, NUM_HEADS, 2, generator=self._generator)
                self.evictor.layer_done(step, layer, query, 0.5, 0.0)
        self._evicted(labels)
        return rows, tables

    def _evicted(self, labels: Sequence[Sequence[int]]) -> None:
        """Note what the evictions of a step chose from."""
        step = self.evictor.step
        for eviction in step.pending_evictions if step is not None else ():
            cached = self.cached[eviction.state]
            before, end = cached.evicted_tokens, eviction.order.evicted_tokens
            tail = [of_layer(n, [labels[eviction.row][before:end]])[0] for n in range(NUM_LAYERS)]
            cached.source = [kept + more for kept, more in zip(cached.kept, tail, strict=True)]
            cached.kept = [[] for _ in range(NUM_LAYERS)]
            cached.evicted_tokens = end
            cached.kept_blocks = len(eviction.order.kept_blocks)

    def _pages_of(self, block_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        blocks = torch.as_tensor(block_ids, dtype=torch.int64)[:, None]
        return self.pool.page_ids(torch.arange(NUM_LAYERS), blocks).flatten()

    def _store(self, pages: Sequence[int], offsets: Sequence[int], labels: Sequence[float]) -> None:
        page, offset = torch.tensor(pages), torch.tensor(offsets)
        value = torch.tensor(labels, dtype=torch.float32)[:, None]
        self.values[page, 0, offset] = value
        self.keys[page, 0, offset] = _keys(value)

    def _load(self, pages: Sequence[int], length: int) -> list[float]:
        page = torch.tensor(pages, dtype=torch.int64)
        values = self.values[page, 0].flatten(0, 1)[:length]
        keys = self.keys[page, 0].flatten(0, 1)[:length]
        assert torch.equal(keys, _keys(values))
        return values[:, 0].tolist()

    def _write(
        self,
        layer: int,
        rows: list[BatchRow],
        table: list[list[int]],
        labels: list[list[float]],
        step: EvictionStep | None,
    ) -> None:
        size = self.setup.block_size
        if step is not None and step.tables is not None:
            slots = step.tables.slot_mapping[layer].tolist()
            num_tokens = sum(row.num_scheduled for row in rows)
            assert set(slots[num_tokens:]) <= {-1}
            slots = slots[:num_tokens]
        else:
            slots = [
                self.pool.page_ids(layer, table[r][position // size]) * size + position % size
                for r, row in enumerate(rows)
                for position in range(row.num_computed, row.num_computed + row.num_scheduled)
            ]
        assert len(set(slots)) == len(slots)
        null = self.pool.page_ids(layer, 0)
        assert all(slot >= 0 and slot // size != null for slot in slots)
        written = chain.from_iterable(
            of_row[row.num_computed :] for row, of_row in zip(rows, labels, strict=True)
        )
        self._store([s // size for s in slots], [s % size for s in slots], list(written))

    def _read(
        self,
        layer: int,
        rows: list[BatchRow],
        table: list[list[int]],
        labels: list[list[float]],
        step: EvictionStep | None,
    ) -> None:
        """What attention sees is the request's own, all of it, in order."""
        size = self.setup.block_size
        tables = step.tables if step is not None else None
        for r, (row, of_row) in enumerate(zip(rows, labels, strict=True)):
            state = row.state
            if tables is None:
                length = len(of_row)
                pages = [self.pool.page_ids(layer, b) for b in table[r][: -(-length // size)]]
            else:
                length = int(tables.seq_lens[layer, r])
                pages = tables.block_table[layer, r, : -(-length // size)].tolist()
            seen = self._load(pages, length)
            cached = self.cached[state]
            num_kept = length - (len(of_row) - cached.evicted_tokens)
            if cached.source is not None:  # the first step after an eviction
                assert tables is not None, f"{state.request_id} was evicted, its tables forgotten"
                kept, source = seen[:num_kept], cached.source[layer]
                indices = [source.index(label) for label in kept]
                assert indices == sorted(set(indices))
                assert num_kept and num_kept % size == 0
                cached.kept[layer] = kept
                if layer == NUM_LAYERS - 1:
                    total = cached.kept_blocks * NUM_LAYERS * size
                    assert sum(map(len, cached.kept)) == total
                    cached.source = None
            assert seen == cached.kept[layer] + of_row[cached.evicted_tokens :], (
                f"layer {layer} of {state.request_id}"
            )

    def _run_window(
        self,
        spec: SlidingWindowSpec,
        rows: list[BatchRow],
        table: list[list[int]],
        labels: list[list[int]],
    ) -> None:
        """A group of vLLM's own in the same memory; its labels are negative."""
        size = spec.block_size
        for row, blocks, of_row in zip(rows, table, labels, strict=True):
            for position in range(row.num_computed, len(of_row)):
                pages = self._pages_of([blocks[position // size]]).tolist()
                offsets = [position % size] * NUM_LAYERS
                self._store(pages, offsets, [-1.0 - of_row[position]] * NUM_LAYERS)
        for row, blocks, of_row in zip(rows, table, labels, strict=True):
            first = max(0, row.num_computed - spec.sliding_window + 1)
            for page in self._pages_of(blocks).unflatten(0, (-1, NUM_LAYERS)).T.tolist():
                seen = self._load(page, len(of_row))
                assert seen[first:] == [-1.0 - label for label in of_row[first:]]


class V1Worker(SimulatedWorker):
    """vLLM's real `_update_states` and `InputBatch`, our real adapter.

    A runner of the first pipeline stage hears of sampled tokens from the scheduler, one of the
    last (or only) stage samples them itself.
    """

    def __init__(self, *args: Any, is_last_stage: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        setup = self.setup
        num_groups = 1 + len(self.windows)
        self.is_last_stage = is_last_stage
        self.runner: Any = SimpleNamespace(
            requests={},
            num_prompt_logprobs={},
            kv_caches=[],
            device=torch.device("cpu"),
            speculative_config=None,
            is_pooling_model=False,
            uses_mrope=False,
            use_async_scheduling=setup.is_async,
            use_async_spec_decode=False,
            model_config=SimpleNamespace(hf_config=SimpleNamespace()),
            late_interaction_runner=mock.Mock(),
            query_start_loc=SimpleNamespace(gpu=None),
            seq_lens=None,
            input_batch=InputBatch(
                max_num_reqs=setup.max_num_seqs,
                max_model_len=setup.max_model_len,
                max_num_batched_tokens=setup.max_num_tokens,
                device=torch.device("cpu"),
                vocab_size=1000,
                block_sizes=[setup.block_size] * num_groups,
                max_num_blocks_per_req=[setup.max_model_len // setup.block_size] * num_groups,
                num_spec_tokens=setup.num_drafts,
            ),
            _build_attention_metadata=lambda **_: ({}, None),
            _on_request_state_removed=lambda *_: None,
            _process_encoder_cache_scheduler_output=lambda _: None,
            _may_reorder_batch=lambda _: None,
        )
        real = gpu_model_runner.GPUModelRunner._update_streaming_request
        self.runner._update_streaming_request = lambda *args: real(self.runner, *args)
        self.adapter = V1Adapter(self.runner, self.evictor, EvictedGroup(GROUP, {}))

    def update(self, output: SchedulerOutput) -> tuple[list[BatchRow], list[list[list[int]]]]:
        runner = self.runner
        group = SimpleNamespace(is_last_rank=self.is_last_stage)
        with mock.patch.object(gpu_model_runner, "get_pp_group", lambda: group):
            gpu_model_runner.GPUModelRunner._update_states(runner, _sent(output))
        self.evictor.cached_requests = output.scheduled_cached_reqs
        batch = runner.input_batch
        if not output.total_num_scheduled_tokens:
            return [], []
        batch.block_table.commit_block_table(batch.num_reqs)
        scheduled = [output.num_scheduled_tokens[i] for i in batch.req_ids]
        computed = batch.num_computed_tokens_cpu[: batch.num_reqs].tolist()
        runner.query_start_loc.gpu = _starts(scheduled)
        runner.seq_lens = torch.tensor(computed, dtype=torch.int32) + torch.tensor(scheduled).int()
        self.adapter.build_attention_metadata(num_scheduled_tokens=output.num_scheduled_tokens)
        rows = list(self.evictor.rows)
        groups = range(1 + len(self.windows))
        tables = [[runner.requests[i].block_ids[g] for i in batch.req_ids] for g in groups]
        for group_table, of_rows in zip(batch.block_table.block_tables, tables, strict=True):
            for index, blocks in enumerate(of_rows):
                stored = group_table.get_device_tensor(batch.num_reqs)[index, : len(blocks)]
                assert stored.tolist() == blocks
        return rows, tables

    def sampled(self, request_id: str, tokens: list[int]) -> None:
        """As `_bookkeeping_sync`, which a stage that samples nothing never reaches."""
        if not self.is_last_stage:
            return
        if self.setup.is_async:
            tokens = [-1] * len(tokens)
        batch = self.runner.input_batch
        index = batch.req_id_to_index[request_id]
        start = batch.num_tokens_no_spec[index]
        batch.token_ids_cpu[index, start : start + len(tokens)] = tokens
        batch.is_token_ids[index, start : start + len(tokens)] = True
        batch.num_tokens_no_spec[index] = start + len(tokens)
        self.runner.requests[request_id].output_token_ids.extend(tokens)


class V2Worker(SimulatedWorker):
    """What V2 does in `add_requests` and its like, our real adapter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows_of: dict[str, tuple[list[int], ...]] = {}
        self.computed: dict[str, int] = {}
        self.index: dict[str, int] = {}  # of vLLM's request states
        self.free_indices = [*range(self.setup.max_num_seqs)]
        self.gathered: tuple[Any, int | None] = None, None
        runner: Any = SimpleNamespace(
            vllm_config=SimpleNamespace(
                compilation_config=SimpleNamespace(cudagraph_capture_sizes=[1, 2, 4]),
                parallel_config=SimpleNamespace(data_parallel_size=1),
            ),
            max_num_reqs=self.setup.max_num_seqs,
            model_config=SimpleNamespace(hf_config=SimpleNamespace()),
            model_state=SimpleNamespace(
                add_request=lambda *_: None,
                remove_request=lambda *_: None,
                prepare_attn=lambda *_, **__: {},
            ),
            gather_batch_req_state=lambda *_: self.gathered,
        )
        self.runner = runner
        self.adapter = V2Adapter(runner, self.evictor, EvictedGroup(GROUP, {}))

    def update(self, output: SchedulerOutput) -> tuple[list[BatchRow], list[list[list[int]]]]:
        for request_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self._remove(request_id)
        for new in output.scheduled_new_reqs:
            self._remove(new.req_id)
            self.index[new.req_id] = self.free_indices.pop()
            self.adapter.add_request(self.index[new.req_id], new)
            self.rows_of[new.req_id] = tuple(list(blocks) for blocks in new.block_ids)
            self.computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, computed, fresh in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            self.computed[request_id] = computed
            for blocks, more in zip(self.rows_of[request_id], fresh or (), strict=False):
                blocks.extend(more)
        ids = sorted(output.num_scheduled_tokens)  # V2 orders its batch by itself
        if not ids:
            return [], []
        tables = [[self.rows_of[i][g] for i in ids] for g in range(1 + len(self.windows))]
        scheduled = [output.num_scheduled_tokens[i] for i in ids]
        width = self.setup.max_model_len // self.setup.block_size
        block_tables = [
            torch.tensor([b + [0] * (width - len(b)) for b in table]).int() for table in tables
        ]
        computed = torch.tensor([self.computed[i] for i in ids]).int()
        seq_lens, starts = computed + torch.tensor(scheduled).int(), _starts(scheduled)
        mode, padding = CUDAGraphMode.NONE, 0
        indices = np.array([self.index[i] for i in ids])
        fits = len(ids) <= max_graph_reqs(self.setup)
        if fits and self.full_graph(output, indices, computed.numpy(), np.array(scheduled), ids):
            mode = CUDAGraphMode.FULL  # of which vLLM captures some sizes
            padding = min(max_graph_reqs(self.setup), 1 << (len(ids) - 1).bit_length()) - len(ids)
            seq_lens = torch.cat((seq_lens, torch.zeros(padding, dtype=torch.int32)))
            starts = torch.cat((starts, starts[-1:].expand(padding)))
            block_tables = [
                torch.cat((t, torch.zeros(padding, width, dtype=torch.int32))) for t in block_tables
            ]
        batch: Any = SimpleNamespace(
            req_ids=ids,
            num_reqs=len(ids),
            num_reqs_after_padding=len(ids) + padding,
            num_tokens_after_padding=sum(scheduled) + padding,
            idx_mapping_np=indices,
            num_computed_tokens_np=computed.numpy(),
            num_scheduled_tokens=np.array(scheduled),
            query_start_loc=starts,
            seq_lens=seq_lens,
        )
        self.adapter.prepare_attn(batch, mode, tuple(block_tables))
        return list(self.evictor.rows), tables

    def full_graph(
        self,
        output: SchedulerOutput,
        indices: np.ndarray,
        computed: np.ndarray,
        scheduled: np.ndarray,
        ids: Sequence[str],
    ) -> bool:
        """Whether a step runs in a full graph: vLLM's rule, and then ours."""
        states = [self.evictor.requests.get(i) for i in ids]
        prefill = np.array([0 if s is None else s.prefill_tokens for s in states])
        is_prefilling = computed < prefill
        is_uniform = (scheduled == 1).all() and not (is_prefilling & (computed == 0)).any()
        batch = SimpleNamespace(
            has_prefill=is_prefilling.any(),
            idx_mapping_np=indices,
            is_prefilling_np=is_prefilling,
            num_computed_prefill_tokens_np=np.minimum(computed, prefill),
            num_scheduled_tokens=scheduled,
            num_tokens=scheduled.sum(),
        )
        self.gathered = batch, 1 if is_uniform else None
        return self.adapter.gather_batch_req_state(output, False)[1] is not None

    def _remove(self, request_id: str) -> None:
        if self.rows_of.pop(request_id, None) is not None:
            self.free_indices.append(self.index.pop(request_id))
            self.adapter.remove_request(request_id)


def max_graph_reqs(setup: Setup) -> int:
    """Requests of the largest full graph; some steps have more."""
    return setup.max_num_seqs // 2


def of_layer(layer: int, labels: Sequence[Sequence[int]]) -> list[list[float]]:
    """What one layer stores."""
    return [[label + layer / NUM_LAYERS for label in row] for row in labels]


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Keys, ``[..., 2]``, that belong to values."""
    return torch.sin(values * torch.tensor([0.7, 1.3]))


def _sent(output: SchedulerOutput) -> SchedulerOutput:
    """With block ids of its own: V1 keeps the lists and extends them."""

    def copy(groups: tuple[list[int], ...] | None) -> tuple[list[int], ...] | None:
        return groups and tuple(map(list, groups))

    new = [replace(one, block_ids=copy(one.block_ids)) for one in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    cached = replace(cached, new_block_ids=[copy(groups) for groups in cached.new_block_ids])
    return replace(output, scheduled_new_reqs=new, scheduled_cached_reqs=cached)


def _starts(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
