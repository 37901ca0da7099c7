# SPDX-License-Identifier: Apache-2.0
"""Requests whose blocks are loaded between steps, in pools with sliding-window groups.

They hold blocks while they wait and cannot be preempted, so each must be able to go on.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import SupportsHMA
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput

from tests.helpers.blocks import make_kv_cache_config, make_request
from tests.helpers.schedulers import Scheduler, Setup, make_scheduler
from vl_cache_vllm.config import KVCompressConfig

BLOCK, WINDOW, PROMPT, HIT, IMAGE_END = 16, 64, 1000, 400, 400


class OffloadingConnector(SupportsHMA):
    """Finds the start of each prompt outside, and says which requests load."""

    supports_divergent_local_hybrid_hits = False
    requires_kv_delivery = False

    def __init__(self, num_groups: int) -> None:
        self.num_groups, self.loads = num_groups, set[str]()
        self.connector_scheduler = SimpleNamespace(
            _req_status={}, _current_batch_allocated_block_ids=set()
        )

    def on_new_request(self, request: Any) -> None:
        self.connector_scheduler._req_status[request.request_id] = SimpleNamespace(
            max_load_tokens=None, max_offload_tokens=None, transfer_jobs=set()
        )

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        bound = self.connector_scheduler._req_status[request.request_id].max_load_tokens
        hit = max(0, HIT - computed)
        if bound is not None:  # as vLLM's does beside other layers
            hit = min(hit, (computed + bound - 1) // BLOCK * BLOCK - computed)
        return hit, hit > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external: int) -> None:
        if num_external:
            self.loads.add(request.request_id)

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return tuple(range(self.num_groups))

    def request_finished_all_groups(self, request: Any, blocks: Any) -> tuple[bool, None]:
        return False, None

    def take_events(self) -> tuple[()]:
        return ()

    def has_pending_push_work(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def scheduler_with_windows(num_windows: int, num_blocks: int) -> Scheduler:
    spec = SlidingWindowSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float32,
        sliding_window=WINDOW,
    )
    others = [
        KVCacheGroupSpec([f"{group}.{layer}" for layer in range(3)], spec)
        for group in range(num_windows)
    ]
    config = make_kv_cache_config(KVCompressConfig(budget=0.25), num_blocks, BLOCK, others=others)
    setup = Setup(
        block_size=BLOCK,
        max_model_len=1024,
        max_num_tokens=512,
        must_fit=True,
        encoder_tokens=100_000,
    )
    scheduler: Any = make_scheduler(setup, config)
    scheduler.connector = connector = OffloadingConnector(num_windows + 1)
    manager = scheduler._eviction_manager
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    others_of = [one for one in managers if one is not manager]
    manager.bind(scheduler.requests.get, others_of, connector=connector)
    scheduler._connector_guard, scheduler._decisions = manager.connector, manager.decisions
    return scheduler


@pytest.mark.parametrize("has_images", [True, False], ids=["evicted", "text"])
@pytest.mark.parametrize(
    ("num_windows", "num_blocks"), [(5, 255), (5, 260), (5, 275), (5, 290), (1, 120), (1, 140)]
)
@pytest.mark.parametrize("count", [2, 6])
def test_all_requests_end(num_windows: int, num_blocks: int, count: int, has_images: bool) -> None:
    scheduler: Any = scheduler_with_windows(num_windows, num_blocks)
    for number in range(count):
        tokens = [100 * number + 7 + i % 50 for i in range(PROMPT)]
        images = [(20, IMAGE_END - 20, f"image-{number}")] if has_images else []
        name = f"r{number}"
        scheduler.add_request(make_request(name, tokens, images, block_size=BLOCK, max_tokens=20))
    loaded: set[str] = set()
    for _ in range(60 * count):
        output = scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        ends = [
            scheduler.requests[name].num_computed_tokens >= scheduler.requests[name].num_tokens
            for name in names
        ]
        scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[7] if end else [] for end in ends],
            ),
        )
        loaded |= scheduler.connector.loads
        scheduler.finished_recving_kv_req_ids |= scheduler.connector.loads
        scheduler.connector.loads.clear()
    assert not scheduler.requests
    assert len(loaded) == count
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
