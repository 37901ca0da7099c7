# SPDX-License-Identifier: Apache-2.0
"""Small engines: all must evict alike, attend rightly, and equal vLLM where nothing is evicted.

The first engine runs the torch operations and is the reference for what is kept. Every engine
without CUDA graphs compares the output of each attention layer with attention computed in float32
from the tables and pages that vLLM's kernel got. Engines with graphs are compared with those
without, by the log-probabilities of what they generate.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vl_cache_vllm.config import ADDITIONAL_CONFIG_KEY, REQUEST_BUDGET, REQUEST_OPTIONS
from vl_cache_vllm.hooks import GPU_BACKENDS
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.self_check.model import LOAD_FORMAT, ModelSize, request, write_model
from vl_cache_vllm.self_check.rows import Row

BUDGET = 0.25
LATER: dict[str, Any] = {REQUEST_BUDGET: 0.5, REQUEST_OPTIONS: {"evict_after": 1}}
"""A request that is evicted while it decodes, to another budget."""
SETTINGS: dict[str, Any] = {
    "policy": "vlcache-plus",
    "uniform_mix": 0.0,  # layer budgets by density
    "min_kept_tokens": 16,
    "budget": BUDGET,
    "evict_after": 0,
}
ATTENTION_LIMIT = 0.02  # relative error of a request's output in a layer; 16-bit types: 0.005
MOVED_LIMIT = 0.05  # fraction of the kept tokens that 16-bit rounding may exchange
LOGPROB_LIMIT = 0.15  # between engines whose attention splits its work differently
NUM_LOGPROBS = 5
BLOCK_SIZE = 16


@dataclass(frozen=True)
class EngineSetup:
    """One of the compared engines."""

    backend: str | None
    """vLLM's name of the attention backend; None: vLLM's choice."""
    graphs: bool = False
    """Full CUDA graphs for decode steps."""
    evicts: bool = True
    """False: vLLM without eviction."""
    operations: dispatch.Implementation = "triton"

    def __str__(self) -> str:
        parts = [self.backend or "attention", "graphs" if self.graphs else "eager"]
        if not self.evicts:
            parts.append("without eviction")
        elif self.operations != "triton":
            parts.append(f"{self.operations} operations")
        return ", ".join(parts)


@dataclass(frozen=True)
class Scale:
    """Sizes of the check; tests on a CPU have smaller ones."""

    model: ModelSize = field(default_factory=ModelSize)
    dtype: str = "bfloat16"
    output_len: int = 24
    """Tokens generated for each request."""
    arguments: tuple[tuple[str, Any], ...] = ()
    """Further arguments of `vllm.LLM`."""


@dataclass(frozen=True)
class Step:
    """A generated token, the most likely one, with others."""

    token: int
    logprobs: dict[int, float]


Output = list[Step]


@dataclass(frozen=True)
class EngineRun:
    """What an engine did."""

    kept: dict[int, list[list[list[int]]]]
    """Kept positions by request of the mixed batch, layer and KV head, of evicted requests."""
    mixed: list[Output]
    """Outputs of a batch in which some requests are evicted."""
    whole: list[Output]
    """Outputs of a batch in which none is."""
    attention_error: float
    """Largest relative error of an attention layer; NaN with CUDA graphs, which hide the calls."""
    attention_calls: int


def supported_backends() -> list[str]:
    """The GPU attention backends of ours that this device can run."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.fa_utils import is_flash_attn_varlen_func_available
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    capability = current_platform.get_device_capability()
    assert capability is not None
    found = []
    for name in GPU_BACKENDS:
        if name == "FLASH_ATTN" and not is_flash_attn_varlen_func_available():
            continue
        if AttentionBackendEnum[name].get_class().supports_compute_capability(capability):
            found.append(name)
    return found


def number_type() -> str:
    """The type of numbers of the engines: bfloat16, where this GPU has it."""
    from vllm.platforms import current_platform

    return "bfloat16" if current_platform.has_device_capability(80) else "float16"


def setups(backends: Sequence[str | None], graphs: bool = True) -> list[EngineSetup]:
    """The engines to compare; the first one is the reference.

    Args:
        backends: attention backends.
        graphs: compare engines with CUDA graphs too.
    """
    found = [EngineSetup(backends[0], operations="torch")]
    for backend in backends:
        for with_graphs in (False, True)[: 1 + graphs]:
            found.append(EngineSetup(backend, with_graphs, evicts=False))
            found.append(EngineSetup(backend, with_graphs))
    return found


def run(setup: EngineSetup, scale: Scale, folder: Path) -> EngineRun:
    """Start an engine in this process and run both batches.

    Args:
        setup: which engine.
        scale: its sizes.
        folder: empty; receives the model and the trace.
    """
    from vllm import LLM, SamplingParams

    from vl_cache_vllm.inspector.engine import running
    from vl_cache_vllm.plugin import register

    register()  # also if VLLM_PLUGINS lists only other plugins
    write_model(folder / "model", scale.model)
    trace = folder / "trace.jsonl"
    arguments: dict[str, Any] = {
        "model": str(folder / "model"),
        "load_format": LOAD_FORMAT,
        "dtype": scale.dtype,
        "block_size": BLOCK_SIZE,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.02,  # others may use this GPU
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 2},
        "enforce_eager": not setup.graphs,
        "seed": 0,
        **dict(scale.arguments),
    }
    if setup.graphs:
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if setup.backend is not None:
        arguments["attention_backend"] = setup.backend
    if setup.evicts:
        settings = {**SETTINGS, "trace": {"path": str(trace), "positions": True}}
        arguments["additional_config"] = {ADDITIONAL_CONFIG_KEY: settings}

    def sampling(own: dict[str, Any]) -> SamplingParams:
        extra = own if own and setup.evicts else None
        return SamplingParams(
            temperature=0,
            max_tokens=scale.output_len,
            ignore_eos=True,
            logprobs=NUM_LOGPROBS,
            extra_args=extra,
        )

    def generate(llm: LLM, requests: list[Any], settings: list[dict]) -> list[Output]:
        outputs = llm.generate(requests, [*map(sampling, settings)], use_tqdm=False)
        return [[*map(step_of, output.outputs[0].logprobs or ())] for output in outputs]

    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.use(setup.operations))
        errors: list[float] = []
        if not setup.graphs:
            errors = stack.enter_context(attention_checked(setup.backend))
        llm = stack.enter_context(running(lambda: LLM(**arguments)))
        whole = generate(llm, _whole(scale), [{REQUEST_BUDGET: 1.0}] * len(_whole(scale)))
        mixed = []
        if setup.evicts:
            requests = [one for one, _ in _mixed(scale)]
            mixed = generate(llm, requests, [own for _, own in _mixed(scale)])
    kept = {}
    if setup.evicts:
        for line in trace.read_text().splitlines():
            record = json.loads(line)
            number = int(record["request_id"].partition("-")[0])  # of all requests of the engine
            kept[number - len(whole)] = record["kept_positions"]
    return EngineRun(kept, mixed, whole, max(errors, default=math.nan), len(errors))


def step_of(logprobs: Any) -> Step:
    """From vLLM's log-probabilities of one position."""
    token = next(token for token, one in logprobs.items() if one.rank == 1)
    return Step(token, {token: one.logprob for token, one in logprobs.items()})


def _whole(scale: Scale) -> list[dict[str, Any]]:
    return [request(scale.model, 10 + i, 1, 9 + i) for i in range(3)]


def _mixed(scale: Scale) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Requests with their own settings: evicted ones beside others, of different lengths."""
    return [
        (request(scale.model, 1, 1, 12), {}),
        (request(scale.model, 2, 2, 30), {}),
        (request(scale.model, 3, 1, 5), {REQUEST_BUDGET: 1.0}),
        (request(scale.model, 4, 1, 70), LATER),
        (request(scale.model, 5, 0, 40), {}),
    ]


NUM_EVICTED = 3
"""Evicted requests of a mixed batch."""

# --------------------------------------------------------------------------------------------------
# Attention in float32


@contextlib.contextmanager
def attention_checked(backend: str | None) -> Iterator[list[float]]:
    """Compare vLLM's attention with `attention` in every call; yields the relative errors.

    Args:
        backend: whose implementation is compared; None: those of all GPU backends.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    errors: list[float] = []

    def checked(original: Any) -> Any:
        def forward(
            self: Any,
            layer: Any,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_cache: torch.Tensor,
            attn_metadata: Any,
            output: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            arguments = layer, query, key, value, kv_cache, attn_metadata, output
            result = original(self, *arguments, *args, **kwargs)
            if attn_metadata is not None:
                errors.extend(_errors(query, kv_cache, attn_metadata, self.scale, output))
            return result

        return forward

    with contextlib.ExitStack() as stack:
        for name in [backend] if backend else GPU_BACKENDS:
            # The path of vLLM's own class, whatever is registered in its place.
            module, _, backend_class = AttentionBackendEnum[name].value.rpartition(".")
            cls = getattr(importlib.import_module(module), backend_class).get_impl_cls()
            stack.enter_context(mock.patch.object(cls, "forward", checked(cls.forward)))
        yield errors


def _errors(
    query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any, scale: float, output: torch.Tensor
) -> Iterator[float]:
    """Relative error of the output of each request of a step."""
    starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        if start == end or lengths[row] == 0:
            continue
        if not end - start <= lengths[row] <= metadata.block_table.shape[1] * kv_cache.shape[2]:
            yield math.inf  # more tokens than the table has pages for
            continue
        expected = attention(
            query[start:end], kv_cache, metadata.block_table[row], lengths[row], scale
        )
        found = output[start:end].float().view_as(expected)
        yield float((found - expected).norm() / expected.norm())


def attention(
    query: torch.Tensor, kv_cache: torch.Tensor, pages: torch.Tensor, length: int, scale: float
) -> torch.Tensor:
    """Causal attention of a request's last tokens over its pages, float32.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        kv_cache: ``[num_pages, num_kv_heads, block_size, 2 * head_size]``, key beside value.
        pages: page ids in the order of the tokens.
        length: stored tokens, the queries' own included.
        scale: softmax scale.

    Returns:
        ``[num_queries, num_heads, head_size]``.
    """
    num_queries, num_heads, head_size = query.shape
    num_kv_heads, block_size = kv_cache.shape[1:3]
    used = pages[: -(-length // block_size)].long()
    cells = kv_cache[used].transpose(0, 1).flatten(1, 2)[:, :length].float()
    key, value = cells.split(head_size, -1)  # [num_kv_heads, length, head_size]
    grouped = query.float().view(num_queries, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
    logits = scale * grouped @ key[:, None].transpose(2, 3)  # [kv_heads, group, queries, length]
    position = torch.arange(length, device=query.device)
    future = position > position[length - num_queries :, None]
    weights = logits.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ value[:, None]).permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_size)


# --------------------------------------------------------------------------------------------------
# Comparisons


def compare(runs: dict[EngineSetup, EngineRun]) -> Iterator[Row]:
    """The rows of all engines that ran; an engine that did not is the caller's failing row.

    Args:
        runs: by engine; the first of `setups` is the reference, if it ran.
    """
    reference = next((one for setup, one in runs.items() if setup.operations == "torch"), None)
    for setup, found in runs.items():
        case = str(setup)
        if not setup.graphs:
            yield Row(
                "attention against float32",
                case,
                found.attention_error,
                ATTENTION_LIMIT,
                f"of {found.attention_calls} outputs",
            )
        if not setup.evicts:
            continue
        yield Row("requests not evicted", case, abs(NUM_EVICTED - len(found.kept)), 0)
        if reference is not None and found is not reference:
            pages, moved = kept_difference(found, reference)
            yield Row("pages moved between layers", case, pages, 1, "of a layer")
            yield Row("kept tokens that differ", case, moved, MOVED_LIMIT, "fraction of a request")
            error = logprob_difference(*kept_alike(found, reference))
            yield Row(
                "log-probabilities of the same cache",
                case,
                error,
                LOGPROB_LIMIT,
                "where the same tokens were kept",
            )
        eager = runs.get(EngineSetup(setup.backend))
        if setup.graphs and eager is not None:
            error = logprob_difference(found.mixed, eager.mixed)
            yield Row("log-probabilities against eager", case, error, LOGPROB_LIMIT)
        plain = runs.get(EngineSetup(setup.backend, setup.graphs, evicts=False))
        if plain is not None and setup.operations == "triton":
            error = logprob_difference(found.whole, plain.whole)
            yield Row("nothing evicted, against vLLM", case, error, 0.0, "log-probabilities")


def kept_alike(found: EngineRun, expected: EngineRun) -> tuple[list[Output], list[Output]]:
    """The outputs of both engines for requests of which they kept the same tokens, or all."""
    alike = [i for i in range(len(found.mixed)) if found.kept.get(i) == expected.kept.get(i)]
    return [found.mixed[i] for i in alike], [expected.mixed[i] for i in alike]


def kept_difference(
    found: EngineRun, expected: EngineRun, block_size: int = BLOCK_SIZE
) -> tuple[int, float]:
    """How far two engines differ in what they kept.

    Returns:
        The largest difference between the pages of a layer, and the largest fraction of a request's
        kept tokens that only one of the engines kept. Where a layer has different numbers of
        tokens, the fraction is of the smaller number.
    """
    pages, moved = 0, 0.0
    for request_id, layers in expected.kept.items():
        others = found.kept.get(request_id)
        if others is None:
            return pages, 1.0
        both = total = 0
        for layer, other in zip(layers, others, strict=True):
            for head, positions in zip(layer, other, strict=True):
                pages = max(pages, abs(len(head) - len(positions)) // block_size)
                both += len(set(head) & set(positions))
                total += min(len(head), len(positions))
        moved = max(moved, 1 - both / total)
    return pages, moved


def logprob_difference(found: list[Output], expected: list[Output]) -> float:
    """Largest difference of log-probabilities, up to the first token that differs.

    At that token both engines have the same context, so their distributions are still compared. A
    token that one of them does not list has there at most the smallest probability that is listed.
    """
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            floor = min(other.logprobs.values())
            for token, logprob in one.logprobs.items():
                difference = abs(logprob - other.logprobs.get(token, min(floor, logprob)))
                worst = max(worst, difference) if difference == difference else math.nan
            if one.token != other.token:
                break
    return worst
