# SPDX-License-Identifier: Apache-2.0
"""Latency of one static batch: prefill, decode step and end to end.

    python -m benchmarks.offline [--images 1 2 4] [--batch 1 8] [--output-len 64] [--json FILE]

Each engine runs in a process of its own:

    stock   vLLM without eviction (the baseline)
    ours    vLLM with --kv-compress POLICY and a budget
    whole   the same with budget 1.0: the overhead of the plugin when nothing is evicted
    hf      transformers with the same architecture and shape
    snapkv  transformers with SnapKV of kvpress at the same budget

All engines are loaded first. Every engine then measures each row in turn, while the others are
idle, so that compared measurements are seconds apart. This is repeated ``--repeats`` times; the
slow transformers engines take part in the first ``--peer-repeats`` only. With ``--one-at-a-time``
an engine measures all its rows and exits before the next one is loaded; use it on devices that
cannot hold all engines. The results contain all times and their medians.

The memory-bandwidth bound of a decode step is the ratio of the bytes that it reads without and
with eviction: all weights once and the KV cache of each sequence. Eviction does not reduce the
bytes that prefill reads, so its bound is 1. The KV cache pool is ample. The model is a LLaVA with
dummy weights (`benchmarks.shape`) and 1,024 tokens per image.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import shape
from testing import tiny_models
from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

TRANSFORMERS = ("hf", "snapkv")
ENGINES = ("stock", "ours", "whole", *TRANSFORMERS)
TIMES = ("prefill", "decode", "end_to_end")
SNAPKV_WINDOW = 64  # kvpress's default

Measure = Callable[[int, int], Row]  # (images per prompt, batch size) -> one row


def cells(options: argparse.Namespace) -> list[tuple[int, int]]:
    """The number of images per prompt and the batch size of each row."""
    pairs = itertools.product(options.images, options.batch)
    return [(images, batch) for images, batch in pairs if images * batch <= options.max_images]


def engine_order(options: argparse.Namespace, engines: Sequence[str]) -> Iterator[list[str]]:
    """The engines of each repeat, in the order in which they measure. It alternates."""
    for repeat in range(options.repeats):
        taking_part = [
            engine
            for engine in engines
            if engine not in TRANSFORMERS or repeat < options.peer_repeats
        ]
        yield taking_part[::-1] if repeat % 2 else taking_part


def prompts(images: int, batch: int) -> list[tuple[str, list[Any]]]:
    """Prompt and images of each sequence; no two images are equal."""
    text = tiny_models.prompt_for("llava", shape.QUESTION, num_images=images)
    size = (shape.IMAGE_SIZE, shape.IMAGE_SIZE)
    seeds = itertools.count()
    return [
        (text, [tiny_models.random_image(next(seeds), size) for _ in range(images)])
        for _ in range(batch)
    ]


def vllm_requests(images: int, batch: int) -> list[Any]:
    """`prompts` in the form that vLLM expects."""
    return [
        {"prompt": text, "multi_modal_data": {"image": pictures}}
        for text, pictures in prompts(images, batch)
    ]


def times(ends: Sequence[float]) -> dict[str, float]:
    """Milliseconds of the prefill, of a decode step (median) and of the whole batch.

    Args:
        ends: seconds; the start, then the end of each step.
    """
    steps = [1000 * (end - start) for start, end in itertools.pairwise(ends)]
    return {
        "prefill": steps[0],
        "decode": statistics.median(steps[1:]),
        "end_to_end": sum(steps),
    }


# --------------------------------------------------------------------------------------------------
# vLLM


def run_steps(core: Any) -> tuple[list[float], list[Any]]:
    """Run an engine until its requests have finished.

    With async scheduling, a call may schedule a step without returning outputs. It is counted
    with the call that returns them.

    Returns:
        The start time and the time of each call with outputs, in seconds; the last outputs.
    """
    ends: list[float] = [time.perf_counter()]
    last: list[Any] = []
    while core.has_unfinished_requests():
        if outputs := core.step():
            last = outputs
            ends.append(time.perf_counter())
    return ends, last


def llm_arguments(
    model: Path, options: argparse.Namespace, engine: str, **settings: Any
) -> dict[str, Any]:
    """Arguments of `vllm.LLM` that all compared engines share.

    Requests are evicted in the step that ends their prefill, whatever the policy, so that the
    timed steps contain the eviction.

    Args:
        engine: ``whole`` has budget 1.0, ``ours`` the budget of the options; other names stand for
            vLLM without eviction.
        settings: further settings of KV compression.
    """
    budgets = {"ours": options.budget, "whole": 1.0}
    own = {"policy": options.policy, "budget": budgets.get(engine), "evict_after": 0}
    return {
        "model": str(model),
        "load_format": "dummy",
        "block_size": 32,
        "enable_prefix_caching": False,
        "max_num_seqs": max(options.batch),
        "kv_cache_memory_bytes": options.kv_cache_gib << 30,
        "gpu_memory_utilization": 0.1,  # fraction of the memory; several engines share it
        "limit_mm_per_prompt": {"image": max(options.images)},
        "additional_config": {"kv_compress": own | settings} if engine in budgets else {},
    }


@contextlib.contextmanager
def vllm(model: Path, options: argparse.Namespace, engine: str) -> Iterator[Measure]:
    """Run one vLLM engine in this process."""
    from vllm import SamplingParams

    from testing.engine import read_trace, running_llm

    trace = model / f"{engine}.jsonl"
    max_batched_tokens = (options.max_images + max(options.batch)) * shape.VISUAL_TOKENS
    params = SamplingParams(temperature=0, max_tokens=options.output_len, ignore_eos=True)
    weight_bytes, token_bytes = step_bytes(model)
    with running_llm(
        **llm_arguments(model, options, engine, trace={"path": str(trace)}),
        max_model_len=options.max_model_len,
        max_num_batched_tokens=max_batched_tokens,
    ) as llm:
        core = llm.llm_engine

        def measure(images: int, batch: int) -> Row:
            for number, request in enumerate(vllm_requests(images, batch)):
                core.add_request(str(number), request, params)
            ends, outputs = run_steps(core)
            assert len(ends) == 1 + options.output_len, "the whole batch is prefilled in one step"
            prompt_tokens = len(outputs[0].prompt_token_ids or ())
            kept = float(prompt_tokens)
            if engine == "ours":
                kept = statistics.mean(list(read_trace(trace).values())[-1]["kept_tokens"])
            cache_tokens = batch * (kept + options.output_len / 2)
            return {
                "images": images,
                "batch": batch,
                "prompt_tokens": prompt_tokens,
                "kept_tokens": kept,
                "decode_bytes": weight_bytes + token_bytes * cache_tokens,
                **times(ends),
            }

        yield measure


def step_bytes(model: Path) -> tuple[int, int]:
    """Bytes of weights that a decode step reads, and of the keys and values of one token.

    Computed from the config, because vLLM's CPU kernels repack the parameters.
    """
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = LlavaForConditionalGeneration(config)
    text = config.text_config
    # A decode step reads one row per token of the embedding table, but the whole output layer.
    numbers = sum(p.numel() for p in network.model.language_model.layers.parameters())
    numbers += network.lm_head.weight.numel()
    head_size = text.hidden_size // text.num_attention_heads
    token_numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    size = config.dtype.itemsize
    return size * numbers, size * token_numbers


# --------------------------------------------------------------------------------------------------
# transformers


@contextlib.contextmanager
def transformers(model: Path, options: argparse.Namespace, engine: str) -> Iterator[Measure]:
    """Run transformers, with or without kvpress, in a plain greedy loop."""
    import torch
    from transformers import AutoConfig, AutoProcessor, DynamicCache, LlavaForConditionalGeneration

    press: Any = None
    if engine == "snapkv":
        from testing.presses import SnapKVPress

        press = SnapKVPress(compression_ratio=1 - options.budget, window_size=SNAPKV_WINDOW)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    network = LlavaForConditionalGeneration(AutoConfig.from_pretrained(model)).eval().to(device)
    torch.set_default_dtype(torch.float32)
    processor = AutoProcessor.from_pretrained(model)

    @torch.inference_mode()
    def measure(images: int, batch: int) -> Row:
        texts, pictures = zip(*prompts(images, batch), strict=True)
        features = processor(text=list(texts), images=list(pictures), return_tensors="pt")
        inputs = features.to(device, torch.bfloat16)
        prompt_tokens = inputs["input_ids"].shape[1]
        cache = DynamicCache()
        ends = [time.perf_counter()]
        for step in range(options.output_len):
            # kvpress needs the cache position. It evicts in the prefill only.
            first = prompt_tokens + step - 1 if step else 0
            position = torch.arange(first, prompt_tokens + step, device=device)
            inputs["position_ids"] = position.expand(batch, -1)
            with press(network) if press and not step else contextlib.nullcontext():
                logits = network(
                    **inputs, past_key_values=cache, cache_position=position, logits_to_keep=1
                ).logits
            inputs = {"input_ids": logits[:, -1].argmax(-1, keepdim=True)}
            inputs["input_ids"].tolist()  # synchronises with the device
            ends.append(time.perf_counter())
        return {
            "images": images,
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "kept_tokens": float(cache.layers[0].keys.shape[2] - (options.output_len - 1)),
            **times(ends),
        }

    yield measure


# --------------------------------------------------------------------------------------------------
# All engines


def serve(connection: Connection, model: Path, options: argparse.Namespace, engine: str) -> None:
    """Main function of an engine's process: measure each cell that arrives, until None does."""
    start: Callable[..., AbstractContextManager[Measure]] = (
        transformers if engine in TRANSFORMERS else vllm
    )
    with start(model, options, engine) as measure:
        measure(*cells(options)[0])  # warm-up
        connection.send("ready")
        while cell := connection.recv():
            connection.send(measure(*cell))


def run(
    model: Path, options: argparse.Namespace, names: Sequence[str]
) -> dict[str, list[list[Row]]]:
    """Load the named engines together and measure all rows.

    Returns:
        For each engine a list of repeats, each a list of rows.

    Raises:
        EOFError: if the process of an engine died; its output gives the reason.
    """
    context = multiprocessing.get_context("spawn")
    engines: dict[str, Connection] = {}
    processes = []
    try:
        for engine in names:
            engines[engine], theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, model, options, engine))
            process.start()
            processes.append(process)
            theirs.close()
            assert engines[engine].recv() == "ready"
        runs: dict[str, list[list[Row]]] = {engine: [] for engine in engines}
        for order in engine_order(options, names):
            for engine in order:
                runs[engine].append([])
            for cell in cells(options):
                for engine in order:
                    engines[engine].send(cell)
                    row = engines[engine].recv()
                    runs[engine][-1].append(row)
                    print(line(engine, row), flush=True)
        for connection in engines.values():
            connection.send(None)
        return runs
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def merge(runs: list[list[Row]]) -> list[Row]:
    """One row for the same cell of all repeats: the medians and all times of the repeats."""
    merged = []
    for rows in zip(*runs, strict=True):
        every = {key: [round(row[key], 3) for row in rows] for key in TIMES}
        medians = {key: round(statistics.median(values), 3) for key, values in every.items()}
        merged.append({**rows[0], **medians, "repeats": every})
    return merged


def line(engine: str, row: Row) -> str:
    """A printed line of one row."""
    return (
        f"{engine:<8}{row['prompt_tokens']:>8}{row['batch']:>6}{row['kept_tokens']:>8.0f}"
        f"{row['prefill']:>10.0f}{row['decode']:>10.2f}{row['end_to_end']:>11.0f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--images", type=int, nargs="+", default=[1, 2, 4], help="images per prompt")
    add("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    add("--max-images", type=int, default=16, help="skip batches with more images")
    add("--output-len", type=int, default=64, help="output tokens, at least 2")
    add("--one-at-a-time", action="store_true", help="do not load all engines at once")
    add("--repeats", type=int, default=5, help="of the vLLM engines")
    add("--peer-repeats", type=int, default=1, help="of hf and snapkv")
    add("--shape", choices=shape.TEXT_CONFIGS, default="0.5b", help="shape of the language model")
    add("--max-model-len", type=int, default=16384)
    add("--kv-cache-gib", type=int, default=1)
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.output_len < 2 or not cells(options):
        parser.error("--output-len must be at least 2 and --max-images at least --images")
    if not 1 <= options.peer_repeats <= options.repeats:
        parser.error("--repeats must be at least 1 and --peer-repeats between 1 and --repeats")
    set_vllm_environment()
    print(
        f"{'':<8}{'prompt':>8}{'batch':>6}{'kept':>8}{'prefill':>10}{'decode':>10}{'total, ms':>11}"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model", options.shape)
        groups = (
            [[name] for name in options.engines] if options.one_at_a_time else [options.engines]
        )
        runs = {name: rows for group in groups for name, rows in run(model, options, group).items()}
    results = {engine: merge(found) for engine, found in runs.items()}
    if options.json:
        settings = {
            name: getattr(options, name)
            for name in ("policy", "budget", "output_len", "repeats", "peer_repeats")
        }
        write_report(options.json, "benchmarks.offline", arguments, **settings, results=results)


if __name__ == "__main__":
    main()
