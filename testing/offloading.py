# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV offloading to host memory on a CPU build, with copies that run as late as they may.

vLLM's `OffloadingConnector` and `SimpleCPUOffloadConnector` and their managers of host memory are
used as they are. Only the copies, which vLLM has for GPUs alone, are ours. A copy runs when it has
been asked for its result several times, or when vLLM waits for it: a block that was freed too early
is then copied with the contents of its next owner.
"""

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.simple_kv_offload import worker as simple

if TYPE_CHECKING:  # benchmarks import this module, and may do without pytest
    import pytest

POLLS = 4  # of `get_finished` before a copy runs, unless the configuration says otherwise


def config(num_bytes: int, **extra: Any) -> KVTransferConfig:
    """Offloading of a block each to so much host memory."""
    return KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config={
            "spec_name": "LateSpec",
            "spec_module_path": __name__,
            "cpu_bytes_to_use": num_bytes,
            **extra,
        },
    )


class LateSpec(CPUOffloadingSpec):
    """vLLM's specification of host memory, with our copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        assert self.blocks_per_chunk == 1
        return LateCopies(kv_caches, self.num_chunks, self.extra_config.get("polls", POLLS))


class LateCopies(OffloadingWorker):
    def __init__(self, caches: CanonicalKVCaches, num_chunks: int, polls: int) -> None:
        self._polls = polls
        self._pool = [tensor.tensor for tensor in caches.tensors]
        self._host = [torch.zeros(num_chunks, t.shape[1], dtype=t.dtype) for t in self._pool]
        self._groups = [
            [(ref.tensor_idx, ref.page_size_bytes) for ref in refs]
            for refs in caches.group_data_refs
        ]
        self._waiting: dict[int, tuple[int, LoadStoreSpec, LoadStoreSpec]] = {}
        self._finished: list[TransferResult] = []

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        self._waiting[job_id] = (self._polls, src_spec, dst_spec)
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        self._waiting[job_id] = (self._polls, src_spec, dst_spec)
        return True

    def get_finished(self) -> list[TransferResult]:
        for job_id, (polls, source, target) in list(self._waiting.items()):
            self._waiting[job_id] = (polls - 1, source, target)
            if polls == 1:
                self._run(job_id)
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self._waiting.keys():
            self._run(job_id)

    def _run(self, job_id: int) -> None:
        _, source, target = self._waiting.pop(job_id)
        assert isinstance(source, BlockIDsLoadStoreSpec)
        assert isinstance(target, BlockIDsLoadStoreSpec)
        in_pool = source if isinstance(source, GPULoadStoreSpec) else target
        assert isinstance(in_pool, GPULoadStoreSpec)
        stores = in_pool is source
        from_, to = (self._pool, self._host) if stores else (self._host, self._pool)
        start, first, num_bytes = time.perf_counter(), 0, 0
        for layers, count in zip(self._groups, in_pool.group_sizes, strict=True):
            blocks = slice(first, first + count)
            for index, size in layers:
                to[index][target.block_ids[blocks], :size] = from_[index][
                    source.block_ids[blocks], :size
                ]
                num_bytes += count * size
            first += count
        assert first == len(source.block_ids) == len(target.block_ids)
        self._finished.append(TransferResult(job_id, True, num_bytes, time.perf_counter() - start))


def simple_config(num_bytes: int, **extra: Any) -> KVTransferConfig:
    """`SimpleCPUOffloadConnector` with so much host memory; call `use_late_copies` before."""
    return KVTransferConfig(
        kv_connector="SimpleCPUOffloadConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": num_bytes, **extra},
    )


class _Stream:
    def __init__(self, priority: int) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


class _Torch:
    """torch, as the worker's part of `SimpleCPUOffloadConnector` sees it."""

    cuda = SimpleNamespace(Stream=_Stream, current_stream=lambda: None)

    def __getattr__(self, name: str) -> Any:
        return _LateCopy if name == "Event" else getattr(torch, name)


class LateBackend:
    """Copies of `SimpleCPUOffloadConnector`, in the order in which they were asked for."""

    blocks: ClassVar[list[int]] = [0, 0]  # that were loaded and stored

    def init(
        self, pool: dict[str, torch.Tensor], host: dict[str, torch.Tensor], *streams: object
    ) -> None:
        self._pool, self._host = list(pool.values()), list(host.values())

    def launch_copy(
        self,
        source: list[int],
        target: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: object = None,
    ) -> None:
        events_list.append((event_idx, _LateCopy(self, source, target, is_store)))

    def copy(self, source: list[int], target: list[int], is_store: bool) -> None:
        from_, to = (self._pool, self._host) if is_store else (self._host, self._pool)
        for one, other in zip(from_, to, strict=True):
            other[target] = one[source]
        LateBackend.blocks[is_store] += len(source)


class _LateCopy:
    """The event that a copy has been done; without arguments, one of a step."""

    def __init__(self, backend: LateBackend | None = None, *copy: Any) -> None:
        self._backend, self._copy, self._polls = backend, copy, POLLS

    def record(self, stream: object) -> None:
        pass

    def query(self) -> bool:
        self._polls -= 1
        if self._polls <= 0:
            self.synchronize()
        return self._backend is None

    def synchronize(self) -> None:
        if self._backend is not None:
            self._backend.copy(*self._copy)
            self._backend = None


def use_late_copies(monkeypatch: "pytest.MonkeyPatch") -> None:
    """Let `SimpleCPUOffloadConnector` copy with `LateBackend`, without streams of a GPU."""
    monkeypatch.setattr(LateBackend, "blocks", [0, 0])
    monkeypatch.setattr(simple, "DmaCopyBackend", LateBackend)
    monkeypatch.setattr(simple, "torch", _Torch())
