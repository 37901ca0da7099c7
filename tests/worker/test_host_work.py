# SPDX-License-Identifier: Apache-2.0
"""Python work of a decode step does not grow with the requests that only decode."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.config import CUDAGraphMode

from testing.v2_runner import v2_runner
from tests.helpers.calls import calls_during
from tests.helpers.pools import make_pool
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.policy.snapkv import SnapKVPolicy
from vl_cache_vllm.worker.build import EvictedGroup
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.v2 import V2Adapter

BLOCK_SIZE, NUM_LAYERS, PROMPT, MAX_REQS = 8, 3, 64, 200


class Decoding:
    """Some requests on V2's adapter, of which some were evicted."""

    def __init__(self, num_reqs: int, num_evicted: int) -> None:
        pool = make_pool(num_layers=NUM_LAYERS, num_blocks=4, block_size=BLOCK_SIZE)
        config = KVCompressConfig(SnapKVPolicy(), text=True, min_prompt_tokens=1)
        self.evictor = Evictor(
            config,
            pool,
            num_heads=2,
            max_num_reqs=MAX_REQS,
            max_num_tokens=MAX_REQS * PROMPT,
            max_table_width=20,
            max_graph_reqs=MAX_REQS,
        )
        runner, _ = v2_runner(MAX_REQS, [MAX_REQS], lambda *_: (self.gathered, 1))
        self.adapter = V2Adapter(runner, self.evictor, EvictedGroup(0, {"layer": 0}))
        self.ids = [f"request-{index}" for index in range(num_reqs)]
        for index, request_id in enumerate(self.ids):
            new: Any = SimpleNamespace(
                req_id=request_id,
                prefill_token_ids=range(PROMPT),
                sampling_params=SamplingParams(max_tokens=50),
                mm_features=[],
            )
            self.adapter.add_request(index, new)
        orders = {name: EvictionOrder(PROMPT, (1, 2)) for name in self.ids[:num_evicted]}
        self.evictor.begin_output((), None, orders)
        self.step(0, PROMPT)
        for name in self.ids[:num_evicted]:
            state = self.evictor.requests.get(name)
            assert state is not None and state.evicted_tokens == PROMPT
            pages = torch.full((NUM_LAYERS,), 2)
            live = self.evictor.requests.evicted_slots()
            self.evictor.tables.set_kept(state.slot, pages, torch.tensor([1, 2]), live)
        self.evictor.begin_output((), None, {})

    def step(self, computed: int, scheduled: int, mode: Any = CUDAGraphMode.NONE) -> None:
        num = len(self.ids)
        batch: Any = SimpleNamespace(
            req_ids=self.ids,
            num_reqs=num,
            num_reqs_after_padding=num,
            num_tokens_after_padding=num * scheduled,
            idx_mapping_np=np.arange(num),
            num_computed_tokens_np=np.full(num, computed),
            num_scheduled_tokens=np.full(num, scheduled),
            query_start_loc=torch.arange(num + 1, dtype=torch.int32) * scheduled,
            seq_lens=torch.full((num,), computed + scheduled, dtype=torch.int32),
        )
        self.gathered = SimpleNamespace(has_prefill=False, num_tokens=num * scheduled)
        output: Any = None
        self.adapter.gather_batch_req_state(output, False)
        self.adapter.prepare_attn(batch, mode, (torch.zeros(num, 20, dtype=torch.int32),))


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL], ids=["eager", "graph"])
@pytest.mark.parametrize("evicted", [False, True], ids=["whole", "evicted"])
def test_rows_that_decode_cost_no_calls(mode: Any, evicted: bool) -> None:
    counts = []
    for num_reqs in (4, MAX_REQS):
        batch = Decoding(num_reqs, num_reqs if evicted else 0)
        batch.step(PROMPT, 1, mode)  # the batch has changed
        counts.append([calls_during(lambda b=batch: b.step(PROMPT + 1, 1, mode)) for _ in range(2)])
    assert counts[0] == counts[1]
