# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV offloading to host memory on a CPU build, with copies that run as late as they may.

vLLM's `OffloadingConnector` and its manager of host memory are used as they are. Only the copies,
which vLLM has for GPUs alone, are ours. A copy runs when it has been asked for its result several
times, or when vLLM waits for it: a block that was freed too early is then copied with the contents
of its next owner.
"""

import time
from typing import Any

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
        (refs,) = caches.group_data_refs  # one group
        self._pool = [tensor.tensor for tensor in caches.tensors]
        self._host = [torch.zeros(num_chunks, t.shape[1], dtype=t.dtype) for t in self._pool]
        self._layers = [(ref.tensor_idx, ref.page_size_bytes) for ref in refs]
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
        stores = isinstance(source, GPULoadStoreSpec)
        from_, to = (self._pool, self._host) if stores else (self._host, self._pool)
        start = time.perf_counter()
        for index, size in self._layers:
            to[index][target.block_ids, :size] = from_[index][source.block_ids, :size]
        size = len(source.block_ids) * sum(size for _, size in self._layers)
        self._finished.append(TransferResult(job_id, True, size, time.perf_counter() - start))
