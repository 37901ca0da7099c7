# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: one cached vector for each token, which all heads read (Kimi-K2.5).

vLLM's CPU platform serves it in blocks of 16 tokens, without chunked prefill and prefix caching.
"""

from contextlib import AbstractContextManager
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput

import testing.random_weights  # noqa: F401  registers the load format
from checks import matrix
from testing import engine as harness
from testing import model_zoo
from testing.attention_recorder import recording
from testing.engine import read_trace
from testing.tiny_models import random_image
from vl_cache_vllm.attention.latent import LatentQueries

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="refused on GPUs")

KIND, BLOCK = "kimi-k2.5", 16
SETTINGS = {"policy": "vlcache", "budget": matrix.BUDGET}


def start(
    models_dir: Path, settings: dict[str, Any] | None, **kwargs: Any
) -> AbstractContextManager[LLM]:
    harness.let_numba_be_searched()
    model = model_zoo.build(KIND, models_dir / KIND)
    kwargs = {"max_model_len": 1024, "kv_cache_memory_bytes": 128 << 20} | kwargs
    kwargs |= model_zoo.options(KIND)
    return harness.engine(model, settings, load_format="random", **kwargs)


def request(question: str, seed: int, num_images: int = 2) -> dict[str, Any]:
    images = [random_image(seed + number) for number in range(num_images)]
    return {
        "prompt": model_zoo.prompt_for(KIND, question, num_images),
        "multi_modal_data": model_zoo.image_data(KIND, images),
    }


def ask(llm: LLM, prompts: list[dict[str, Any]], num_tokens: int) -> list[RequestOutput]:
    return llm.generate(prompts, harness.greedy(num_tokens), use_tqdm=False)


@pytest.mark.both_runners
@pytest.mark.parametrize("num_images", [1, 2])
def test_exact(models_dir: Path, tmp_path: Path, num_images: int) -> None:
    """One selection for each layer, by all of its query heads."""
    trace = tmp_path / "trace"
    settings = SETTINGS | {"trace": {"path": str(trace), "positions": True}}
    with start(models_dir, settings) as llm:
        for seed in range(0, 100, 10):
            with recording(llm) as layers:
                (output,) = ask(llm, [request(matrix.QUESTION, seed, num_images)], 8)
            assert all(layer.is_latent for layer in layers)
            record = list(read_trace(trace).values())[-1]
            assert output.prompt_token_ids is not None
            tokens = len(output.prompt_token_ids)
            assert all(len(of_layer) == 1 for of_layer in record["kept_positions"])
            if matrix.compare(layers, tokens, record["vision_end"], record) is not None:
                return
        pytest.fail("every seed gives a near tie")


def test_requests_side_by_side(models_dir: Path) -> None:
    """Steps with prefills, parts of them, and evicted requests: as one request at a time.

    Later tokens may differ by rounding; their evictions leave the pool whole.
    """
    settings = SETTINGS | {"policy": "vlcache-plus", "every": 2 * BLOCK}
    with start(models_dir, settings, max_num_batched_tokens=1024) as llm:
        prompts = [request(f"{n} times. {matrix.QUESTION}", 2 * n) for n in range(6)]
        alone = [one for prompt in prompts for one in ask(llm, [prompt], 50)]
        together = ask(llm, prompts, 50)
        assert harness.eviction_stats(llm).evicted == 12
        for one, other in zip(alone, together, strict=True):
            assert harness.token_ids(one)[:12] == harness.token_ids(other)[:12]
        pool = harness.scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_blocks_of_a_request(models_dir: Path) -> None:
    with start(models_dir, SETTINGS) as llm:
        engine, pool = llm.llm_engine, harness.scheduler(llm).kv_cache_manager.block_pool
        engine.add_request("0", request(matrix.QUESTION, 1), harness.greedy(20))
        while harness.eviction_stats(llm).evicted == 0:
            engine.step()
        (held,) = harness.scheduler(llm).requests.values()
        prompt = held.num_prompt_tokens
        kept = ceil(ceil(prompt / BLOCK) * matrix.BUDGET)
        for _ in range(4):
            engine.step()
        tail = ceil((held.num_computed_tokens - prompt // BLOCK * BLOCK) / BLOCK)
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        assert used == kept + tail
        assert used < ceil(prompt / BLOCK) / 2
        while engine.has_unfinished_requests():
            engine.step()


def test_preemption(models_dir: Path) -> None:
    """Too few blocks for all answers: preempted requests are prefilled again, and end."""
    with start(models_dir, SETTINGS | {"output_reserve": False}, max_model_len=800) as llm:
        size = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        assert size is not None
    block_bytes = 128 * 2**20 // size
    kwargs = {"max_model_len": 800, "kv_cache_memory_bytes": 100 * block_bytes}
    with start(models_dir, SETTINGS | {"output_reserve": False}, **kwargs) as llm:
        prompts = [request(matrix.QUESTION, n, 1) for n in range(6)]
        outputs = ask(llm, prompts, 200)
        assert all(len(harness.token_ids(one)) == 200 for one in outputs)
        assert harness.eviction_stats(llm).evicted > 6
        pool = harness.scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_drafts_are_refused(models_dir: Path) -> None:
    drafts = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with (
        pytest.raises(ValueError, match="latent attention: remove --speculative-config"),
        start(models_dir, SETTINGS, speculative_config=drafts),
    ):
        pass


def test_projected_queries_have_the_logits_of_the_layers_own() -> None:
    class Layer:
        qk_nope_head_dim, qk_rope_head_dim = 6, 4
        W_UK_T = torch.randn(3, 6, 8)  # [heads, own, latent]

    query = torch.randn(5, 3, 10)
    latent, rotary = torch.randn(7, 8), torch.randn(7, 4)
    key = torch.cat(
        (torch.einsum("hpl,kl->khp", Layer.W_UK_T, latent), rotary[:, None].expand(-1, 3, -1)), -1
    )
    expected = torch.einsum("qhd,khd->hqk", query[1:4], key)
    projected = LatentQueries(Layer(), query)[1:4]
    logits = torch.einsum("qhd,kd->hqk", projected, torch.cat((latent, rotary), -1))
    assert torch.allclose(logits, expected, atol=1e-4)
