# SPDX-License-Identifier: Apache-2.0
"""vLLM's real KV cache manager over our spec, without a model, and requests for it."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.core.block_manager import EvictionBlockManager
from vl_cache_vllm.core.scheduler import EvictionSchedulerMixin
from vl_cache_vllm.core.spec import EvictionAttentionSpec

IMAGE_TOKEN = 9
STOP_TOKEN = 3

init_none_hash(sha256)


def make_kv_cache_config(
    config: KVCompressConfig,
    num_blocks: int,
    block_size: int,
    num_layers: int = 3,
    others: Sequence[KVCacheGroupSpec] = (),
) -> KVCacheConfig:
    """One group of ours, and ``others`` behind it."""
    layer = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    ours = KVCacheGroupSpec(
        [f"layer.{index}" for index in range(num_layers)],
        EvictionAttentionSpec.wrap(layer, config),
    )
    return KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[ours, *others]
    )


def make_kv_cache_manager(
    config: KVCompressConfig,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    enable_caching: bool = True,
) -> KVCacheManager:
    return KVCacheManager(
        make_kv_cache_config(config, num_blocks, block_size),
        max_model_len=max_model_len,
        scheduler_block_size=block_size,
        hash_block_size=block_size,
        enable_caching=enable_caching,
    )


class _StubScheduler:
    """As much of vLLM's scheduler as `EvictionSchedulerMixin` extends."""

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        self.kv_cache_manager = kv_cache_manager
        self.vllm_config = SimpleNamespace(
            device_config=SimpleNamespace(device_type="cpu"), speculative_config=None
        )
        self.requests: dict[str, Request] = {}

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        blocks, num_tokens, boundary = self.kv_cache_manager.get_computed_blocks(request)
        return blocks, num_tokens, boundary, False


class EvictionHarness(EvictionSchedulerMixin, _StubScheduler):
    """Our scheduler's additions over a cache manager of its own."""

    kv_cache_manager: KVCacheManager
    requests: dict[str, Request]
    connector = None

    def __init__(self, kv_cache_manager: KVCacheManager) -> None:
        super().__init__(kv_cache_manager)
        self.block_pool = kv_cache_manager.block_pool

    @property
    def manager(self) -> EvictionBlockManager:
        return self._eviction_manager

    def prefix_hit(self, request: Request) -> tuple[KVCacheBlocks, int]:
        blocks, num_tokens, _, _ = self._get_local_prefix_cache_hit(request)
        return blocks, num_tokens

    def row(self, request: Request) -> list[int]:
        (ids,) = self.kv_cache_manager.get_block_ids(request.request_id)
        return ids


def make_request(
    request_id: str,
    prompt: Sequence[int],
    images: Sequence[tuple[int, int, str]] = (),
    *,
    block_size: int,
    max_tokens: int = 100,
    resumable: bool = False,
    modality: str = "image",
    extra_args: dict[str, Any] | None = None,
    priority: int = 0,
    arrival_time: float = 0.0,
) -> Request:
    """A request; ``images`` are (offset, length, identifier)."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling_params=SamplingParams(
            max_tokens=max_tokens, stop_token_ids=[STOP_TOKEN], extra_args=extra_args
        ),
        pooling_params=None,
        arrival_time=arrival_time,
        priority=priority,
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality=modality,
                identifier=identifier,
                mm_position=PlaceholderRange(offset=offset, length=length),
            )
            for offset, length, identifier in images
        ],
        block_hasher=get_request_block_hasher(block_size, sha256),
        resumable=resumable,
    )


def image_prompt(before: int, image: int, after: int, variant: int = 0) -> list[int]:
    """Text, one image, text; prompts of one variant share their prefixes."""
    text = [10 + 50 * variant + i for i in range(before + after)]
    return [*text[:before], *[IMAGE_TOKEN] * image, *text[before:]]
