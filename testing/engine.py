# SPDX-License-Identifier: Apache-2.0
"""vLLM engines in this process, one at a time, with access to their scheduler and worker."""

import atexit
import contextlib
import functools
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
from vllm.v1.engine.llm_engine import LLMEngine

from testing import tiny_models
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.stats import EvictionStats
from vl_cache_vllm.inspector.engine import running
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
if torch.cuda.is_available():  # exact comparisons need float32, which FlashAttention lacks
    DEFAULTS["attention_backend"] = "TRITON_ATTN"


@contextlib.contextmanager
def engine(
    model: Path,
    kv_compress: dict[str, Any] | None = None,
    async_scheduling: bool = False,
    **kwargs: Any,
) -> Iterator[LLM]:
    """Run an engine and shut it down on exit.

    Args:
        model: path of the checkpoint.
        kv_compress: settings of KV compression; None stands for vLLM without eviction.
        async_scheduling: also on CPU, where vLLM's platform disables it.
        kwargs: arguments of `vllm.LLM`; they replace `DEFAULTS`.
    """
    if kv_compress is not None:
        kwargs["additional_config"] = {"kv_compress": kv_compress}
    if not async_scheduling:
        kwargs["async_scheduling"] = False  # the default on GPUs
    with contextlib.ExitStack() as stack:
        with _allow_async_scheduling() if async_scheduling else contextlib.nullcontext():
            llm = stack.enter_context(running_llm(model=str(model), **{**DEFAULTS, **kwargs}))
        assert isinstance(scheduler(llm), AsyncScheduler) == async_scheduling
        yield llm


@contextlib.contextmanager
def _allow_async_scheduling() -> Iterator[None]:
    """Undo that vLLM's CPU platform disables async scheduling; its runners support it."""
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
    """The block manager of an engine with eviction."""
    return scheduler(llm)._eviction_manager  # type: ignore[attr-defined]


def num_evicted(engine: LLMEngine) -> int:
    """Evictions that an engine has decided since it started; 0 without KV compression."""
    stats = getattr(engine.engine_core.engine_core.scheduler, "eviction_stats", None)
    return stats.evicted if stats else 0


def eviction_stats(llm: LLM) -> EvictionStats:
    """Counts since the engine's start."""
    return scheduler(llm).eviction_stats  # type: ignore[attr-defined]


def eviction_worker(llm: LLM) -> Evictor:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.evictor


def greedy(max_tokens: int, logprobs: int | None = 1, **kwargs: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=max_tokens, logprobs=logprobs, ignore_eos=True, **kwargs
    )


def image_request(
    kind: str, question: str, image_seeds: Sequence[int] = (0,), size: tuple[int, int] = (448, 336)
) -> dict[str, Any]:
    """A request with one random image per seed.

    Args:
        kind: of `testing.tiny_models.KINDS`.
        question: the text after the images.
        image_seeds: one for each image.
        size: width and height in pixels.
    """
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
    """Run ``LLM(**arguments)`` and shut it down on exit; one at a time in a process."""
    with cheap_collections(), running(lambda: LLM(**arguments)) as llm:
        yield llm


atexit.register(gc.unfreeze)  # nanobind reports objects that the last collection does not reach


@contextlib.contextmanager
def cheap_collections() -> Iterator[None]:
    """Limit garbage collection to objects that are younger than this context.

    vLLM unfreezes the heap and runs a full collection about nine times per engine. Each takes a
    fifth of a second or more once this process has imported vLLM, which is more than everything
    else that the start of a tiny model's engine takes.
    """
    gc.collect()  # what an earlier engine left; after the freeze it would stay for good
    gc.freeze()

    def leave() -> None:
        pass

    with mock.patch.object(gc, "freeze", leave), mock.patch.object(gc, "unfreeze", leave):
        yield


def read_trace_lines(path: Path) -> list[dict[str, Any]]:
    """Trace records in their order."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_trace(path: Path) -> dict[str, dict[str, Any]]:
    """The last trace record of each request. vLLM appends a random suffix to the ids of `LLM`."""
    return {record["request_id"]: record for record in read_trace_lines(path)}


def held_positions(record: dict[str, Any]) -> list[list[list[int]]]:
    """Positions that each layer and KV head has after a first eviction, with the tail."""
    tail = range(record["evicted_tokens"], record["tokens"])
    return [[[*head, *tail] for head in layer] for layer in record["kept_positions"]]


def settle(llm: LLM) -> None:
    """Run steps until a connector has released the blocks of requests that have ended."""
    while scheduler(llm).has_requests():
        llm.llm_engine.engine_core.get_output()


@functools.cache
def let_numba_be_searched() -> None:
    """Call it before an engine starts in a process that has imported numba.

    LMCache and the image processor of Kimi-K2.5 do so. vLLM's CPU worker asks every object of every
    module for its ``__dict__``. The C library of numba takes that for the name of a function.
    """
    from llvmlite.binding import ffi

    lookup = ffi._lib_wrapper.__getattr__

    def known(self: Any, name: str) -> Any:
        if name == "__dict__":
            raise AttributeError(name)
        return lookup(self, name)

    ffi._lib_wrapper.__getattr__ = known
