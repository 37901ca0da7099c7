# SPDX-License-Identifier: Apache-2.0
"""Layers that read the KV cache of an earlier layer (Gemma 4 E2B and E4B)."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import testing.random_weights  # noqa: F401  registers the load format
from checks import matrix
from testing import engine as harness
from testing import model_zoo
from testing.attention_recorder import owners, recording
from testing.engine import read_trace
from testing.tiny_models import random_image

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="heads of 512 in float32 do not fit every GPU's kernels"
)

KIND, BLOCK = "gemma4-shared-kv", 32
READERS = {1: 1, 3: 1, 5: 4}  # number of layers that read the cache of a layer of full attention


def request(question: str, seed: int) -> dict[str, Any]:
    return {
        "prompt": model_zoo.prompt_for(KIND, question, 2),
        "multi_modal_data": {"image": [random_image(seed), random_image(seed + 1)]},
    }


def start(models_dir: Path, settings: dict[str, Any] | None, **kwargs: Any) -> Any:
    model = model_zoo.build(KIND, models_dir / KIND)
    kwargs = {"max_model_len": 1024, "kv_cache_memory_bytes": 256 << 20} | kwargs
    return harness.engine(model, settings, load_format="random", block_size=BLOCK, **kwargs)


@pytest.mark.both_runners
@pytest.mark.parametrize("chunk", [2048, 96], ids=["whole", "chunks"])
def test_exact(models_dir: Path, tmp_path: Path, chunk: int) -> None:
    trace = tmp_path / "trace"
    settings = {"policy": "vlcache", "budget": matrix.BUDGET}
    settings |= {"trace": {"path": str(trace), "positions": True}}
    options = {"max_num_batched_tokens": chunk, "enable_prefix_caching": False}
    with start(models_dir, settings, **options) as llm:
        for seed in range(0, 100, 10):
            with recording(llm) as layers:
                (output,) = llm.generate(
                    [request(matrix.QUESTION, seed)],
                    harness.greedy(matrix.NUM_TOKENS),
                    use_tqdm=False,
                )
            pairs = zip(owners(layers), layers, strict=True)
            assert Counter(owner for owner, layer in pairs if layer.window is None) == READERS
            record = list(read_trace(trace).values())[-1]
            tokens = len(output.prompt_token_ids)
            if matrix.compare(layers, tokens, record["vision_end"], record) is not None:
                return
        pytest.fail("every seed gives a near tie")


@pytest.mark.both_runners
def test_evicted_again_and_again(models_dir: Path) -> None:
    """Answers end, later evictions included, with the pool whole; a second question hits."""
    settings = {"policy": "vlcache-plus", "budget": 0.25, "every": BLOCK}
    with start(models_dir, settings) as llm:
        params = harness.greedy(4 * BLOCK)
        prompts = [request(f"{n} times. {matrix.QUESTION}", 2 * n) for n in range(6)]
        first = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(harness.token_ids(one)) == 4 * BLOCK for one in first)
        assert all(one.num_cached_tokens for one in again)
        stats = harness.eviction_stats(llm)
        assert stats.evicted == 12
        pool = harness.scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
