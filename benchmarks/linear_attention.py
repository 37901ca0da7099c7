# SPDX-License-Identifier: Apache-2.0
"""Blocks and running requests of a model with linear attention, with and without eviction.

    python -m benchmarks.linear_attention [--images 60] [--requests 8] [--json OUT]

The model has the layers of Qwen3.5 in small: one in four has full attention, and vLLM divides the
layers into four groups. A page holds a state of its linear attention, so blocks have 544 tokens.
One request shows what each group holds before and after the eviction; then requests that arrive at
once share a pool that holds the full cache of three. Weights are random, so only blocks, requests
and times mean something.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

KIND, BUDGET, FULL_REQUESTS = "qwen3.5", 0.1, 3
IMAGE_SIZE = 512  # pixels a side; 256 tokens
POLICY = {"policy": "vlcache-plus", "budget": BUDGET, "evict_after": 0}


def build(folder: Path) -> Path:
    """Write the model: 16 layers with states as large as 544 tokens of a layer's cache."""
    from testing import model_zoo

    path = model_zoo.build(KIND, folder / "model")
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {
        "num_hidden_layers": 16,
        "num_key_value_heads": 1,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 1 << 17,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def requests(images: int, number: int) -> list[dict[str, Any]]:
    """Prompts of different images."""
    from testing import model_zoo
    from testing.tiny_models import random_image

    prompt = model_zoo.prompt_for(KIND, "Describe everything that you can see.", images)
    size = IMAGE_SIZE, IMAGE_SIZE
    return [
        {
            "prompt": prompt,
            "multi_modal_data": {
                "image": [random_image(100 * one + i).resize(size) for i in range(images)]
            },
        }
        for one in range(number)
    ]


def engine_arguments(model: Path, images: int, evicts: bool, **changed: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    return {
        "model": str(model),
        "load_format": "dummy",
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_size": 32,  # vLLM enlarges it
        "max_model_len": 300 * images + 2048,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1 << 30,
        "limit_mm_per_prompt": {"image": images},
        "async_scheduling": False,
        "additional_config": {"kv_compress": POLICY} if evicts else {},
    } | changed


def held(llm: Any) -> list[int]:
    """Blocks that all requests hold in each group; null blocks do not count.

    Kept blocks of evicted requests are among those of full attention.
    """
    from testing.engine import scheduler
    from vl_cache_vllm.core.block_manager import EvictionBlockManager

    found = []
    for manager in scheduler(llm).kv_cache_manager.coordinator.single_type_managers:
        rows = manager.req_to_blocks
        if isinstance(manager, EvictionBlockManager):
            found.append(sum(map(manager._num_held, rows)))
        else:
            found.append(sum(not block.is_null for row in rows.values() for block in row))
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert sum(found) == pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    return found


def one_request(model: Path, images: int) -> Row:
    """What a request with eviction holds in its prefill's last step, and while it decodes."""
    from testing.engine import greedy, num_evicted, running_llm, scheduler

    with running_llm(**engine_arguments(model, images, True)) as llm:
        engine = llm.llm_engine
        engine.add_request("0", requests(images, 1)[0], greedy(8))
        engine.step()
        (request,) = scheduler(llm).requests.values()
        while num_evicted(engine) == 0:
            before = held(llm)
            engine.step()
        for _ in range(4):
            engine.step()
        return {
            "block_size": engine.vllm_config.cache_config.block_size,
            "prompt_tokens": request.num_prompt_tokens,
            "before": before,
            "after": held(llm),
        }


def load(model: Path, images: int, number: int, evicts: bool, blocks: int) -> Row:
    """Requests that arrive at once, in a pool of so many blocks."""
    from testing.engine import greedy, running_llm, scheduler

    arguments = engine_arguments(model, images, evicts, num_gpu_blocks_override=blocks)
    with running_llm(**arguments) as llm:
        engine, output_len = llm.llm_engine, 256
        for name, request in enumerate(requests(images, number)):
            engine.add_request(str(name), request, greedy(output_len, logprobs=None))
        running, began = [], time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
            running.append(len(scheduler(llm).running))
        seconds = time.perf_counter() - began
    return {
        "engine": "ours" if evicts else "stock",
        "most_running": max(running),
        "mean_running": round(statistics.mean(running), 2),
        "steps": len(running),
        "seconds": round(seconds, 1),
        "output_tokens_per_second": round(number * output_len / seconds, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=60, help="of a prompt")
    parser.add_argument("--requests", type=int, default=8, help="that arrive at once")
    options = parser.parse_args(arguments)
    set_vllm_environment(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder))
        single = one_request(model, options.images)
        print(single, flush=True)
        full = -(-single["prompt_tokens"] // single["block_size"]) + 1 + 2 * 3
        blocks = FULL_REQUESTS * full + 1
        rows = []
        for evicts in (False, True):
            rows.append(load(model, options.images, options.requests, evicts, blocks))
            print(rows[-1], flush=True)
    if options.json:
        write_report(
            options.json,
            "benchmarks.linear_attention",
            arguments,
            budget=BUDGET,
            blocks=blocks,
            one_request=single,
            rows=rows,
        )


if __name__ == "__main__":
    main()
