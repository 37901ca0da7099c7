# SPDX-License-Identifier: Apache-2.0
"""Latency of one batch: prefill, decode step, end to end, with the bound by bytes beside it.

    python -m benchmarks.offline [--images 1 2 4] [--batch 1 8] [--output-len 64] [--json FILE]

The engines, each in a process of its own, in turn, ``--repeats`` times; medians are reported:

    stock   vLLM
    ours    vLLM with --kv-compress POLICY and a budget
    whole   the same with budget 1.0: what the plugin costs where nothing is evicted
    hf      transformers, same architecture and shape
    snapkv  transformers with kvpress's SnapKV, which keeps as large a share

A decode step reads every weight once, and every sequence's KV cache: the bound is the ratio of
those bytes without and with eviction. Prefill reads no less with eviction: its bound is 1. The pool
is ample. Without --model: a LLaVA of the 0.5B class without weights, 1,024 tokens an image.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, shape, tiny_models

ENGINES = ("stock", "ours", "whole", "hf", "snapkv")
QUESTION = "Describe everything that you can see in the pictures, from left to right."
TIMES = ("prefill", "decode", "end_to_end")
SNAPKV_WINDOW = 64  # kvpress's default


def cells(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Number of images and batch size of each row."""
    pairs = itertools.product(options.images, options.batch)
    return [(images, batch) for images, batch in pairs if images * batch <= options.max_images]


def prompts(images: int, batch: int) -> list[tuple[str, list[Any]]]:
    """Of each sequence: prompt and images, no two alike."""
    text = tiny_models.prompt_for("llava", QUESTION, num_images=images)
    size = (shape.IMAGE_SIZE, shape.IMAGE_SIZE)
    seeds = itertools.count()
    return [
        (text, [tiny_models.random_image(next(seeds), size) for _ in range(images)])
        for _ in range(batch)
    ]


def times(ends: Sequence[float]) -> dict[str, float]:
    """Milliseconds of a batch's prefill, of a decode step and of all, from when steps ended."""
    steps = [1000 * (end - start) for start, end in itertools.pairwise(ends)]
    return {
        "prefill": steps[0],
        "decode": statistics.median(steps[1:]),
        "end_to_end": sum(steps),
    }


# --------------------------------------------------------------------------------------------------
# vLLM


def run_vllm(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one vLLM engine, in this process."""
    from vllm import SamplingParams

    from benchmarks.engine import read_trace, running_llm

    trace = model / "trace.jsonl"
    settings = {
        "policy": options.policy,
        "budget": 1.0 if options.engine == "whole" else options.budget,
        "trace_path": str(trace),
    }
    most_tokens = (options.max_images + max(options.batch)) * shape.VISUAL_TOKENS
    params = SamplingParams(temperature=0, max_tokens=options.output_len, ignore_eos=True)
    rows = []
    with running_llm(
        model=str(model),
        load_format="dummy",
        block_size=32,
        enable_prefix_caching=False,
        max_model_len=16384,
        max_num_batched_tokens=most_tokens,
        max_num_seqs=max(options.batch),
        kv_cache_memory_bytes=options.kv_cache_gib << 30,
        limit_mm_per_prompt={"image": max(options.images)},
        additional_config={} if options.engine == "stock" else {"kv_compress": settings},
    ) as llm:
        engine = llm.llm_engine
        weight_bytes, token_bytes = step_bytes(model)
        for images, batch in [cells(options)[0], *cells(options)]:  # the first once more: warm-up
            for number, (text, pictures) in enumerate(prompts(images, batch)):
                request: Any = {"prompt": text, "multi_modal_data": {"image": pictures}}
                engine.add_request(str(number), request, params)
            ends = [time.perf_counter()]
            while engine.has_unfinished_requests():
                outputs = engine.step()
                ends.append(time.perf_counter())
            assert len(ends) == 1 + options.output_len, "the whole batch is prefilled in one step"
            prompt_tokens = len(outputs[0].prompt_token_ids or ())
            kept = float(prompt_tokens)
            if options.engine == "ours":
                kept = statistics.mean(list(read_trace(trace).values())[-1]["kept_tokens"])
            cache_tokens = batch * (kept + options.output_len / 2)
            rows.append(
                {
                    "images": images,
                    "batch": batch,
                    "prompt_tokens": prompt_tokens,
                    "kept_tokens": kept,
                    "decode_bytes": weight_bytes + token_bytes * cache_tokens,
                    **times(ends),
                }
            )
    return rows[1:]


def step_bytes(model: Path) -> tuple[int, int]:
    """Bytes of the weights that a decode step reads, and of a token's keys and values.

    Of the checkpoint's shape, not of vLLM's parameters: its CPU kernels pack those away.
    """
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        network = LlavaForConditionalGeneration(config)
    text = config.text_config
    # A step reads one row of the table of embeddings, but all of the output layer.
    numbers = sum(p.numel() for p in network.model.language_model.layers.parameters())
    numbers += network.lm_head.weight.numel()
    head_size = text.hidden_size // text.num_attention_heads
    token_numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * head_size
    size = config.dtype.itemsize
    return size * numbers, size * token_numbers


# --------------------------------------------------------------------------------------------------
# transformers


def run_transformers(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of transformers, with or without kvpress: a plain greedy loop."""
    import torch
    from transformers import AutoConfig, AutoProcessor, DynamicCache, LlavaForConditionalGeneration

    press: Any = None
    if options.engine == "snapkv":
        from tests.presses import SnapKVPress

        press = SnapKVPress(compression_ratio=1 - options.budget, window_size=SNAPKV_WINDOW)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(model)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    network = LlavaForConditionalGeneration(config).eval().to(device)
    torch.set_default_dtype(torch.float32)
    processor = AutoProcessor.from_pretrained(model)
    rows = []
    for images, batch in [cells(options)[0], *cells(options)]:  # the first once more: warm-up
        texts, pictures = zip(*prompts(images, batch), strict=True)
        features = processor(text=list(texts), images=list(pictures), return_tensors="pt")
        inputs = features.to(device, torch.bfloat16)
        prompt_tokens = inputs["input_ids"].shape[1]
        cache = DynamicCache()
        ends = [time.perf_counter()]
        with torch.inference_mode():
            for step in range(options.output_len):
                # kvpress asks for the cache position, and evicts only from the prompt.
                first = prompt_tokens + step - 1 if step else 0
                position = torch.arange(first, prompt_tokens + step, device=device)
                inputs["position_ids"] = position.expand(batch, -1)
                with press(network) if press and not step else contextlib.nullcontext():
                    logits = network(
                        **inputs, past_key_values=cache, cache_position=position, logits_to_keep=1
                    ).logits
                inputs = {"input_ids": logits[:, -1].argmax(-1, keepdim=True)}
                inputs["input_ids"].tolist()  # waits for the device
                ends.append(time.perf_counter())
        kept = cache.layers[0].keys.shape[2] - (options.output_len - 1)
        rows.append(
            {
                "images": images,
                "batch": batch,
                "prompt_tokens": prompt_tokens,
                "kept_tokens": float(kept),
                **times(ends),
            }
        )
    return rows[1:]


# --------------------------------------------------------------------------------------------------
# All of them


def run_apart(model: Path, options: argparse.Namespace, engine: str) -> list[dict[str, Any]]:
    """The rows of an engine in a process of its own.

    Raises:
        subprocess.CalledProcessError: if it failed; it has said why.
    """
    result = model / "rows.json"
    arguments = [*options.arguments, "--engine", engine, "--rows", str(result)]
    command = [sys.executable, "-m", "benchmarks.offline", *arguments, "--model-dir", str(model)]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(command, env=environment, check=True)
    return json.loads(result.read_text())


def merge(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians of the times over repeats; what else a row says is the same in all."""
    merged = []
    for rows in zip(*runs, strict=True):
        row = dict(rows[0])
        for key in TIMES:
            row[key] = round(statistics.median(other[key] for other in rows), 3)
        merged.append(row)
    return merged


def line(engine: str, row: dict[str, Any]) -> str:
    return (
        f"{engine:<8}{row['prompt_tokens']:>8}{row['batch']:>6}{row['kept_tokens']:>8.0f}"
        f"{row['prefill']:>10.0f}{row['decode']:>10.2f}{row['end_to_end']:>11.0f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--images", type=int, nargs="+", default=[1, 2, 4], help="of a prompt")
    add("--batch", type=int, nargs="+", default=[1, 8])
    add("--max-images", type=int, default=16, help="of a batch: larger ones are left out")
    add("--output-len", type=int, default=64, help="at least 2")
    add("--repeats", type=int, default=3)
    add("--kv-cache-gib", type=int, default=2)
    add("--policy", default="vlcache")
    add("--budget", type=float, default=0.1)
    add("--json", type=Path, metavar="FILE", help="write the results here")
    add("--engine", help=argparse.SUPPRESS)
    add("--rows", type=Path, help=argparse.SUPPRESS)
    add("--model-dir", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    options.arguments = arguments
    if options.output_len < 2 or not cells(options):
        parser.error("--output-len must be at least 2, and --max-images not below --images")
    if options.engine:
        run = run_transformers if options.engine in ("hf", "snapkv") else run_vllm
        options.rows.write_text(json.dumps(run(options.model_dir, options)))
        return
    print(
        f"{'':<8}{'prompt':>8}{'batch':>6}{'kept':>8}{'prefill':>10}{'decode':>10}{'all, ms':>11}"
    )
    runs: dict[str, list[list[dict[str, Any]]]] = {engine: [] for engine in options.engines}
    with tempfile.TemporaryDirectory() as folder:
        model = shape.build(Path(folder) / "model")
        for _, engine in itertools.product(range(options.repeats), options.engines):
            runs[engine].append(run_apart(model, options, engine))
            for row in runs[engine][-1]:
                print(line(engine, row), flush=True)
    results = {engine: merge(found) for engine, found in runs.items()}
    if options.json:
        settings = {
            name: getattr(options, name) for name in ("policy", "budget", "output_len", "repeats")
        }
        machine.write_report(
            options.json, "benchmarks.offline", arguments, **settings, results=results
        )


if __name__ == "__main__":
    main()
