# SPDX-License-Identifier: Apache-2.0
"""Call 2: what does eviction cost, and what does it gain?

Engines do not compile the model, which would take 30 seconds each: decode steps run in full CUDA
graphs as always, prefills are a few per cent slower for all engines alike.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import say
from benchmarks.gpu.step import Step
from testing.cli import set_vllm_environment
from testing.results import Row

SHAPE = "7b-mha"
NOT_COMPILED = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def _options(*arguments: str) -> Any:
    from benchmarks import turns

    return turns._parser().parse_args(["--shape", SHAPE, "--policy", "vlcache-plus", *arguments])


def _memory() -> float:
    """Largest memory that torch held so far, in GiB."""
    import torch

    return torch.cuda.max_memory_allocated() / (1 << 30) if torch.cuda.is_available() else 0.0


def interleaved(images: tuple[int, ...], prefills: int, decode_steps: int) -> Row:
    """Steps of three engines in turns, each step of one engine beside the same of another."""
    from benchmarks import offline, shape, turns

    set_vllm_environment()
    options = _options(
        *("--images", *map(str, images), "--batch", "1", "8", "--max-images", "16"),
        *("--prefills", str(prefills), "--decode-steps", str(decode_steps)),
        *("--kv-cache-gib", "12"),
    )
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        engines = {}
        for name in ("stock", "whole", "ours"):
            began = time.perf_counter()
            engines[name] = turns.start(model, options, name, compilation_config=NOT_COMPILED)
            say(f"{name}: started in {time.perf_counter() - began:.1f} s")
        started = _memory()
        interleaving = turns.InterleavedEngines(engines)
        rows: list[Row] = []
        failing = []
        for cell in offline.cells(options):
            options.images, options.batch = ([number] for number in cell)
            try:
                rows += turns.measure(interleaving, options)
            except AssertionError as error:  # the other cells count all the same
                failing.append(f"{cell[0]} images, batch {cell[1]}: {error}")
                for engine in engines.values():
                    engine.abort_request([str(number) for number in range(cell[1])])
    for row in rows:
        saved = row["stock_milliseconds"] - row["milliseconds"]
        say(
            f"{row['step']:<8}{row['visual_tokens']:>6} visual tokens, batch {row['batch']}: "
            f"{row['engine']:<6} {row['milliseconds']:.3f} ms, stock/{row['engine']} "
            f"{row['ratio']:.4f} {row['interval']}, {-saved:+.3f} ms"
        )
    say(f"memory: {started:.1f} GiB after the start, {_memory():.1f} GiB at the end")
    return {
        "rows": rows,
        "failing": failing,
        "gib_started": started,
        "gib_at_the_end": _memory(),
    }


def asynchronous(images: int, batch: int, decode_steps: int, blocks: int) -> Row:
    """Decode steps with async scheduling, the product's default, in alternating blocks."""
    from vllm import SamplingParams

    from benchmarks import offline, shape, turns

    set_vllm_environment()
    options = _options("--images", str(images), "--batch", str(batch), "--kv-cache-gib", "12")
    options.decode_steps = (decode_steps + 8) * blocks
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        engines = {
            name: turns.start(
                model,
                options,
                name,
                compilation_config=NOT_COMPILED,
                async_scheduling=True,
            )
            for name in ("stock", "whole", "ours")
        }
        params = SamplingParams(temperature=0, max_tokens=options.decode_steps, ignore_eos=True)
        for engine in engines.values():
            for number, request in enumerate(offline.vllm_requests(images, batch)):
                engine.add_request(str(number), request, params)
            for _ in range(batch + 4):
                engine.step()
        medians: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(blocks):
            for name, engine in engines.items():
                engine.step()  # what was scheduled before the pause
                ends = [time.perf_counter()]
                for _ in range(decode_steps):
                    engine.step()
                    ends.append(time.perf_counter())
                medians[name].append(1000 * (ends[-1] - ends[0]) / decode_steps)
    rows = []
    for name, found in medians.items():
        ratios = [stock / ours for stock, ours in zip(medians["stock"], found, strict=True)]
        row = {
            "engine": name,
            "milliseconds": statistics.median(found),
            "ratio": statistics.median(ratios),
            "blocks": found,
        }
        rows.append(row)
        say(
            f"async decode, batch {batch}: {name:<6}{row['milliseconds']:.3f} ms "
            f"stock/{name} {row['ratio']:.4f}"
        )
    return {"rows": rows}


def pool(prompts: int, images: int, output_len: int, held: int) -> Row:
    """Throughput through a pool that holds a dozen full prompts, without and with eviction.

    Args:
        prompts: requests, all at once.
        images: of each.
        output_len: tokens of each output.
        held: whole requests that the pool holds.
    """
    from vllm import SamplingParams

    from benchmarks import offline, shape
    from testing.engine import running_llm

    set_vllm_environment()
    options = _options("--images", str(images), "--batch", str(min(prompts, 64)))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", SHAPE)
        _, token_bytes = offline.step_bytes(model)
        longest = images * shape.VISUAL_TOKENS + output_len + 256
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
        for name in ("stock", "ours"):
            arguments = offline.llm_arguments(model, options, name)
            arguments |= {
                "kv_cache_memory_bytes": held * longest * token_bytes,
                "max_model_len": longest,
                "max_num_batched_tokens": 8192,
                "compilation_config": NOT_COMPILED,
            }
            with running_llm(**arguments) as llm:
                core = llm.llm_engine
                requests = offline.vllm_requests(images, prompts)
                llm.generate(requests[:1], SamplingParams(max_tokens=2), use_tqdm=False)
                for number, request in enumerate(requests):
                    core.add_request(str(number), request, params)
                began, running = time.perf_counter(), []
                scheduler = core.engine_core.engine_core.scheduler
                while core.has_unfinished_requests():
                    core.step()
                    running.append(len(scheduler.running))
                taken = time.perf_counter() - began
            row = {
                "engine": name,
                "seconds": taken,
                "output_tokens_per_second": prompts * output_len / taken,
                "most_running": max(running),
                "mean_running": statistics.mean(running),
            }
            rows.append(row)
            say(f"pool of {held}: {row}")
    gain = rows[1]["output_tokens_per_second"] / rows[0]["output_tokens_per_second"]
    more = rows[1]["most_running"] / rows[0]["most_running"]
    say(f"throughput x{gain:.2f}, running sequences x{more:.2f}")
    return {"rows": rows, "throughput_gain": gain, "running_gain": more}


STEPS = (
    Step(
        "interleaved",
        "prefills and decode steps beside vLLM's: nothing evicted, and a budget of 10%",
        120,
        interleaved,
        {"images": (2, 8), "prefills": 20, "decode_steps": 200},
    ),
    Step(
        "pool",
        "running sequences and throughput through a pool that limits vLLM",
        70,
        pool,
        {"prompts": 48, "images": 3, "output_len": 128, "held": 12},
    ),
    Step(
        "async",
        "decode steps with async scheduling, the default of a server",
        60,
        asynchronous,
        {"images": 2, "batch": 8, "decode_steps": 100, "blocks": 4},
    ),
)
