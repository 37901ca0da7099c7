# SPDX-License-Identifier: Apache-2.0
"""KV events of a real engine, as a router receives them from vLLM's ZeroMQ publisher."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher
from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash
from vllm.v1.request import Request

from testing import tiny_models
from testing.engine import engine, eviction_stats, greedy, image_request, scheduler

KIND = "llava"
BLOCK, NUM_TOKENS = 32, 8
# Its last full block is in the observed part of the prompt.
QUESTION = "What is in the picture? Tell all that you see, from the left to the right."


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build(KIND, models_dir / KIND)


def published_in(folder: Path) -> tuple[KVEventsConfig, str]:
    """vLLM's publisher with sockets in a folder, and the endpoint of `received`."""
    replay = f"ipc://{folder}/replay"
    events = KVEventsConfig(
        enable_kv_cache_events=True, endpoint=f"ipc://{folder}/events", replay_endpoint=replay
    )
    return events, replay


def received(endpoint: str) -> Iterator[Any]:
    """All events since the engine's start: vLLM's publisher sends them again to who asks."""
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.RCVTIMEO, 20_000)
        socket.connect(endpoint)
        socket.send_multipart([b"", (0).to_bytes(8, "big")])
        while True:
            _, _, sequence, payload = socket.recv_multipart()
            if sequence == ZmqEventPublisher.END_SEQ:
                return
            yield from decoder.decode(payload).events


@pytest.mark.parametrize("policy", [None, "vlcache", "snapkv"])
def test_a_router_learns_what_is_cached_and_nothing_twice(
    model: Path, tmp_path: Path, policy: str | None
) -> None:
    """Three equal prompts, then others that push them out; unmodified vLLM beside ours."""
    events, replay = published_in(tmp_path)
    config = policy and {"policy": policy, "budget": 0.25}
    small = {"max_model_len": 1024, "kv_cache_memory_bytes": 4 << 20}
    with engine(model, config, kv_events_config=events, **small) as llm:
        for seed in [0, 0, 0, *range(1, 12), 0]:
            request = image_request(KIND, QUESTION, [seed])
            (output,) = llm.generate([request], greedy(NUM_TOKENS), use_tqdm=False)
        if policy is not None:
            assert eviction_stats(llm).evicted == 15
        publisher = scheduler(llm).kv_event_publisher
        publisher._event_queue.join()  # published by a thread
        known: set[Any] = set()
        repeated = removed = 0
        for event in received(replay):
            if isinstance(event, BlockStored):
                repeated += len(known.intersection(event.block_hashes))
                known.update(event.block_hashes)
            else:
                assert isinstance(event, BlockRemoved)
                removed += len(event.block_hashes)
                known.difference_update(event.block_hashes)
        cached = scheduler(llm).kv_cache_manager.block_pool.cached_block_hash_to_block._cache
        assert known == {maybe_convert_block_hash(get_block_hash(key)) for key in cached}
        assert removed, "the pool never forgot a prompt"
        # vLLM computes the last token of an equal prompt and its equal answer again, and with them
        # blocks that it has; answers of evicted requests are never cached.
        assert output.prompt_token_ids is not None
        num_tokens = len(output.prompt_token_ids)
        again = (num_tokens + NUM_TOKENS - 1) // BLOCK - (num_tokens - 1) // BLOCK
        assert repeated == (0 if policy else 2 * again)


@pytest.mark.parametrize("policy", [None, "vlcache"])
def test_an_index_predicts_the_hit_of_the_next_request(
    model: Path, tmp_path: Path, policy: str | None
) -> None:
    """The longest prefix in the index, up to where the observed part of the prompt begins."""
    events, replay = published_in(tmp_path)
    config = policy and {"policy": policy, "budget": 0.25}
    sent: list[Request] = []
    with engine(model, config, kv_events_config=events, max_model_len=1024) as llm:
        for seed in range(3):
            llm.generate([image_request(KIND, QUESTION, [seed])], greedy(2), use_tqdm=False)
        scheduler(llm).kv_event_publisher._event_queue.join()
        stored = [event for event in received(replay) if isinstance(event, BlockStored)]
        known = {block for event in stored for block in event.block_hashes}
        add_request = scheduler(llm).add_request
        scheduler(llm).add_request = lambda request: (sent.append(request), add_request(request))
        cached = []
        for question, seed in [(QUESTION, 1), ("What else is there?", 2), (QUESTION, 7)]:
            request = image_request(KIND, question, [seed])
            (output,) = llm.generate([request], greedy(NUM_TOKENS), use_tqdm=False)
            cached.append(output.num_cached_tokens)
    predicted = []
    for request in sent:
        (image,) = request.mm_features
        end = image.mm_position.offset + image.mm_position.length
        observed_from = end if policy else request.num_prompt_tokens - 1
        hits = itertools.takewhile(
            lambda key: maybe_convert_block_hash(key) in known, request.block_hashes
        )
        predicted.append(min(len(list(hits)), observed_from // BLOCK) * BLOCK)
    assert cached == predicted
    assert cached[0] and cached[1] and not cached[2]
