# SPDX-License-Identifier: Apache-2.0
"""Call 3: why are the numbers as they are?"""

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.fast import NOT_COMPILED, SHAPE, _memory, _options
from benchmarks.gpu.report import say
from benchmarks.gpu.step import Step
from testing.cli import set_vllm_environment
from testing.results import Row


def cached_images(images: int, questions: int) -> Row:
    """Many short questions behind the same cached images: does the host keep up?"""
    from vllm import SamplingParams

    from benchmarks import offline, shape
    from testing.engine import num_evicted, running_llm

    set_vllm_environment()
    options = _options("--images", str(images), "--batch", str(questions), "--kv-cache-gib", "24")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        for name in ("stock", "ours"):
            arguments = offline.llm_arguments(model, options, name)
            arguments |= {
                "enable_prefix_caching": True,
                "max_model_len": images * shape.VISUAL_TOKENS + 512,
                "compilation_config": NOT_COMPILED,
            }
            with running_llm(**arguments) as llm:
                (first,) = offline.vllm_requests(images, 1)
                asked: list[Any] = [
                    {**first, "prompt": f"{first['prompt']} {number} and then?"}
                    for number in range(questions)
                ]
                # A request of one token would not be evicted.
                params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
                llm.generate(asked[:1], params, use_tqdm=False)  # fills the cache of prefixes
                llm.generate(asked[1:3], params, use_tqdm=False)
                began = time.perf_counter()
                llm.generate(asked[3:], params, use_tqdm=False)
                taken = 1000 * (time.perf_counter() - began) / (questions - 3)
                evicted = num_evicted(llm.llm_engine)
                assert evicted == (questions if name == "ours" else 0), f"{evicted} were evicted"
            rows.append({"engine": name, "milliseconds_each": taken, "evicted": evicted})
            say(f"question behind {images} cached images: {rows[-1]}")
    return {"rows": rows}


def profile(images: int) -> Row:
    """The kernels of a prefill that evicts and of some decode steps after it."""
    import torch
    from vllm import SamplingParams

    from benchmarks import offline, shape
    from testing.engine import running_llm

    set_vllm_environment()
    options = _options("--images", str(images), "--batch", "8", "--kv-cache-gib", "12")
    result: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        arguments = offline.llm_arguments(model, options, "ours")
        arguments |= {
            "max_model_len": images * shape.VISUAL_TOKENS + 512,
            "compilation_config": NOT_COMPILED,
        }
        with running_llm(**arguments) as llm:
            params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
            requests = offline.vllm_requests(images, 2)
            llm.generate(requests[:1], params, use_tqdm=False)
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as found:
                llm.generate(requests[1:], params, use_tqdm=False)
            table = found.key_averages().table(
                sort_by="cuda_time_total", row_limit=20, max_name_column_width=60
            )
            say(table)
            result["kernels"] = [
                {
                    "name": event.key[:80],
                    "calls": event.count,
                    "device_microseconds": event.device_time_total,
                }
                for event in sorted(
                    found.key_averages(), key=lambda e: e.device_time_total, reverse=True
                )[:20]
            ]
    return result


def start(images: int) -> Row:
    """The engine that users start: compiled, with vLLM's memory profile; then a full load."""
    from vllm import SamplingParams

    from benchmarks import offline, shape
    from testing.engine import running_llm

    set_vllm_environment()
    options = _options("--images", str(images), "--batch", "64")
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        arguments = offline.llm_arguments(model, options, "ours")
        del arguments["kv_cache_memory_bytes"]
        arguments |= {
            "gpu_memory_utilization": 0.9,
            "max_model_len": images * shape.VISUAL_TOKENS + 512,
        }
        began = time.perf_counter()
        with running_llm(**arguments) as llm:
            started = time.perf_counter() - began
            params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
            long, *_ = offline.vllm_requests(images, 1)
            llm.generate([long], params, use_tqdm=False)
            first = time.perf_counter() - began
            profiled = _memory()
            llm.generate(offline.vllm_requests(1, 64), params, use_tqdm=False)
    found = {
        "start_seconds": started,
        "first_answer_seconds": first,
        "gib_first": profiled,
        "gib_loaded": _memory(),
    }
    say(found)
    return found


STEPS = (
    Step(
        "cached-images",
        "questions of some tokens behind cached images: stock and ours",
        60,
        cached_images,
        {"images": 4, "questions": 35},
    ),
    Step(
        "profile", "which kernels and gaps fill a prefill and a step?", 40, profile, {"images": 2}
    ),
    Step(
        "start",
        "start to first answer, memory as profiled and under load",
        90,
        start,
        {"images": 8},
    ),
)
