# SPDX-License-Identifier: Apache-2.0
"""Python work of the block manager for requests that decode, against vLLM's own manager."""

from typing import Any

import torch
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from tests.helpers.blocks import EvictionHarness, image_prompt, make_kv_cache_manager, make_request
from tests.helpers.calls import calls_during
from vl_cache_vllm.config import KVCompressConfig

BLOCK_SIZE, NUM_BLOCKS, PROMPT, MAX_MODEL_LEN = 8, 2000, 66, 400


def stock_manager() -> KVCacheManager:
    spec = FullAttentionSpec(BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
    config = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer.0"], spec)])
    return KVCacheManager(
        config,
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
    )


def decoding(manager: KVCacheManager, harness: EvictionHarness | None, number: int) -> Request:
    """A request whose prefill, and with a harness its eviction, has been processed."""
    request = make_request(
        f"request-{number}",
        image_prompt(2, PROMPT - 12, 10, variant=number),
        [(2, PROMPT - 12, f"image-{number}")],
        block_size=BLOCK_SIZE,
    )
    if harness is not None:
        harness.requests[request.request_id] = request
    assert manager.allocate_slots(request, PROMPT) is not None
    request.status = RequestStatus.RUNNING
    request.num_computed_tokens = PROMPT
    for token in range(3):  # the first of these steps frees the prompt
        step(manager, request, token)
    return request


def step(manager: KVCacheManager, request: Request, token: int) -> None:
    request.append_output_token_ids(token)
    assert manager.allocate_slots(request, 1) is not None
    request.num_computed_tokens += 1


def calls_per_step(budget: float | None) -> list[int]:
    """Calls of steps of one request, which need a new block in some of them."""
    harness = None
    if budget is None:
        manager = stock_manager()
    else:
        config = KVCompressConfig(budget=budget, min_prompt_tokens=1)
        manager = make_kv_cache_manager(config, NUM_BLOCKS, BLOCK_SIZE, MAX_MODEL_LEN)
        harness = EvictionHarness(manager)
    request = decoding(manager, harness, 0)
    if harness is not None:
        assert len(harness.manager._evicted) == (budget < 1)
    steps: list[Any] = [lambda n=n: step(manager, request, n) for n in range(2 * BLOCK_SIZE)]
    return [calls_during(work) for work in steps]


def test_steps_of_settled_requests_cost_hardly_more_than_vllms() -> None:
    stock = calls_per_step(None)
    for budget in (0.25, 1.0):
        ours = calls_per_step(budget)
        # Where the request needs no new block, and where it does.
        assert sorted(ours)[0] <= sorted(stock)[0] + 4
        assert sum(ours) <= sum(stock) + 8 * len(stock)
