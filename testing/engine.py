# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines for tests: in this process, one at a time, everything reachable."""

import atexit
import contextlib
import gc
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import VllmConfig
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from testing import tiny_models
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.inspector.cli import running
from vl_cache_vllm.worker.evictor import Evictor

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 2},
}
if torch.cuda.is_available():  # FlashAttention has no float32, in which tests compare exactly
    DEFAULTS["attention_backend"] = "TRITON_ATTN"


@contextlib.contextmanager
def engine(
    model: Path,
    kv_compress: dict[str, Any] | None = None,
    async_scheduling: bool = False,
    **kwargs: Any,
) -> Iterator[LLM]:
    """An engine that is gone afterwards; ``kv_compress`` None is stock vLLM."""
    if kv_compress is not None:
        kwargs["additional_config"] = {"kv_compress": kv_compress}
    if not async_scheduling:
        kwargs["async_scheduling"] = False  # GPUs have it by default
    with contextlib.ExitStack() as stack:
        with _allow_async_scheduling() if async_scheduling else contextlib.nullcontext():
            llm = stack.enter_context(running_llm(model=str(model), **{**DEFAULTS, **kwargs}))
        assert isinstance(scheduler(llm), AsyncScheduler) == async_scheduling
        yield llm


@contextlib.contextmanager
def _allow_async_scheduling() -> Iterator[None]:
    """vLLM's CPU platform turns async scheduling off, although its runners can do it."""
    original = CpuPlatform.__dict__["check_and_update_config"]

    def check_and_update_config(cls: type[CpuPlatform], vllm_config: VllmConfig) -> None:
        original.__func__(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    try:
        yield
    finally:
        CpuPlatform.check_and_update_config = original


def scheduler(llm: LLM) -> Scheduler:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: LLM) -> EvictionBlockManager:
    return scheduler(llm)._eviction_manager  # type: ignore[attr-defined]


def eviction_worker(llm: LLM) -> Evictor:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.evictor


def greedy(max_tokens: int, logprobs: int | None = 1, **kwargs: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True, **kwargs
    )


def image_request(
    kind: str, question: str, image_seeds: Sequence[int] = (0,), size: tuple[int, int] = (448, 336)
) -> dict[str, Any]:
    """A request with one image per seed."""
    images = [tiny_models.random_image(seed, size) for seed in image_seeds]
    return {
        "prompt": tiny_models.prompt_for(kind, question, num_images=len(images)),
        "multi_modal_data": {"image": images if len(images) > 1 else images[0]},
    }


def token_ids(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def logprobs(output: RequestOutput) -> list[float]:
    """Log-probability of each generated token."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    return [
        step[token].logprob
        for step, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]


@contextlib.contextmanager
def running_llm(**arguments: Any) -> Iterator[LLM]:
    """``LLM(**arguments)``, gone afterwards; one at a time in a process."""
    with cheap_collections(), running(lambda: LLM(**arguments)) as llm:
        yield llm


atexit.register(gc.unfreeze)  # nanobind reports objects that the last collection does not reach


@contextlib.contextmanager
def cheap_collections() -> Iterator[None]:
    """Garbage is sought among objects younger than this context only.

    vLLM unfreezes the heap and runs a full collection about nine times for each engine. Each takes
    a fifth of a second or more once this process has imported vLLM, more than all else that an
    engine of a tiny model does to start.
    """
    gc.collect()  # what an earlier engine left: nobody looks for it once it is frozen
    gc.freeze()

    def leave() -> None:
        pass

    with mock.patch.object(gc, "freeze", leave), mock.patch.object(gc, "unfreeze", leave):
        yield


def read_trace(path: Path) -> dict[str, dict[str, Any]]:
    """Evictions by request id; the engine appends a random suffix to the ids of `LLM`."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["request_id"]: record for record in records}
