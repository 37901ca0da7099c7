# SPDX-License-Identifier: Apache-2.0
"""The draft's layers in steps in which the draft model runs, and in others.

tests/e2e/test_draft_models.py compares what these layers attend to with an oracle.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.pools import PAGE_ORDERS, make_pool
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder, take_step
from vl_cache_vllm.worker.drafts import DraftEvictor
from vl_cache_vllm.worker.evictor import Evictor
from vl_cache_vllm.worker.requests import RequestState
from vl_cache_vllm.worker.step import Batch, BatchRow

NUM_LAYERS, BLOCK_SIZE, HEADS, HEAD_SIZE, COLUMNS = 3, 4, 2, 8, 20  # the last layer is the draft's
PROMPT, VISION_END, EVICTED, NUM_DRAFTS = 30, 20, 28, 2
ROW, KEPT = [3, 5, 7, 9, 11, 13, 15, 17], (20, 21)


class World:
    """An engine's pool, its evictors, and the steps of one request."""

    def __init__(self, page_order: str = "layer-outermost") -> None:
        self.pool = make_pool(
            page_order, num_layers=NUM_LAYERS, num_blocks=40, block_size=BLOCK_SIZE
        )
        config = KVCompressConfig.from_dict({"policy": "vlcache", "budget": 0.25})
        assert config is not None
        sizes: Any = dict(
            num_heads=HEADS, max_num_reqs=3, max_num_tokens=100, max_table_width=COLUMNS
        )
        model = replace(self.pool, num_layers=2)
        draft = replace(self.pool, pages=self.pool.pages[2 * model.layer_stride :], num_layers=1)
        self.model = Evictor(config, model, **sizes)
        self.drafts = DraftEvictor(Evictor(config, draft, **sizes), {"draft": 0}, NUM_DRAFTS)
        self.state = self.start()

    def start(self) -> RequestState:
        return self.model.requests.start("a", self.model.config, VISION_END, PROMPT)

    def begin(
        self,
        computed: int,
        scheduled: int,
        order: EvictionOrder | None = None,
        deferred: Sequence[str] = (),
    ) -> None:
        messages = (), None, {"a": order} if order else {}, deferred
        self.model.begin_output(*messages)
        self.drafts.begin_output(*messages)
        self.drafts.begin_step(Batch.of([BatchRow(self.state, computed, scheduled)]))

    def metadata(self, tokens: int, end: int, slots: Sequence[int] | None = None) -> Any:
        table = torch.zeros(1, COLUMNS, dtype=torch.int32)
        row = [*ROW, 30, 31, 32, 33]
        table[0, : len(row)] = torch.tensor(row)
        return SimpleNamespace(
            block_table=table,
            query_start_loc=torch.tensor([0, tokens], dtype=torch.int32),
            seq_lens=torch.tensor([end], dtype=torch.int32),
            slot_mapping=torch.tensor(slots or [0] * tokens),
        )

    def first_pass(self, tokens: int, end: int) -> Any:
        """Run the draft's layer; its step, or None where vLLM's own path serves it."""
        metadata = self.metadata(tokens, end)
        self.drafts.first_pass({"draft": metadata})
        if (step := take_step(metadata)) is not None:
            query = torch.randn(tokens, HEADS, HEAD_SIZE, generator=torch.Generator())
            step.layer_done(step.layer_index["draft"], query, 0.3, 0.0)
        return step

    def further_pass(self, end: int, slot: int = 0) -> Any:
        metadata = self.metadata(1, end, [slot])
        self.drafts.further_pass({"draft": metadata})
        return take_step(metadata)

    def page(self, block: int) -> torch.Tensor:
        """The draft's page of a block."""
        return self.pool.pages[int(self.pool.page_ids(2, torch.tensor(block)))]

    def read(self, step: Any) -> list[torch.Tensor]:
        """The pages that the draft's layer reads."""
        count = -(-int(step.tables.seq_lens[0, 0]) // BLOCK_SIZE)
        return [step.pages[page] for page in step.tables.block_table[0, 0, :count].tolist()]


ORDER = EvictionOrder(EVICTED, KEPT)


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_the_passes_of_a_step_that_evicts(page_order: str) -> None:
    world = World(page_order)
    before = world.pool.pages.clone()
    world.begin(0, PROMPT, ORDER)
    step = world.first_pass(PROMPT, PROMPT)
    assert step.tables is None  # the whole prompt, through vLLM's own table
    step = world.further_pass(PROMPT + 1)
    assert step.tables.seq_lens.tolist() == [[2 * BLOCK_SIZE + 3]]
    for page, block in zip(world.read(step), (*KEPT, ROW[7]), strict=True):
        assert torch.equal(page, world.page(block))
    column = int(step.tables.slot_mapping[0, 0])
    assert torch.equal(step.pages[column // BLOCK_SIZE], world.page(ROW[7]))
    assert column % BLOCK_SIZE == PROMPT % BLOCK_SIZE
    changed = {i for i, page in enumerate(world.pool.pages) if not torch.equal(page, before[i])}
    assert changed == {int(world.pool.page_ids(2, torch.tensor(block))) for block in KEPT}
    assert step.layer_index == {"draft": 0}
    world.drafts.end_step()

    # Two drafts are verified; then the next ones are drafted.
    world.begin(PROMPT, 3)
    step = world.first_pass(3, PROMPT + 3)
    assert step.tables.seq_lens.tolist() == [[2 * BLOCK_SIZE + 5]]
    assert len(step.tables.slot_mapping[0]) == 3


def test_requests_with_their_whole_cache_take_vllms_own_path() -> None:
    world = World()
    world.begin(0, PROMPT)
    assert world.first_pass(PROMPT, PROMPT) is None
    assert world.further_pass(PROMPT + 1) is None


def test_drafts_beyond_the_maximum_length_are_not_stored() -> None:
    world = World()
    world.begin(0, PROMPT, ORDER)
    world.first_pass(PROMPT, PROMPT)
    step = world.further_pass(1, slot=-1)
    assert step.tables.slot_mapping.tolist() == [[-1]]
    assert step.tables.seq_lens.tolist() == [[1]]


def test_a_dummy_run_between_steps_changes_nothing() -> None:
    world = World()
    world.begin(0, PROMPT, ORDER)
    world.first_pass(PROMPT, PROMPT)
    world.drafts.end_step()
    before = world.pool.pages.clone()
    assert world.first_pass(5, 5) is None
    assert world.further_pass(6) is None
    assert torch.equal(world.pool.pages, before)
    world.begin(PROMPT, 1)
    assert world.first_pass(1, PROMPT + 1).tables is not None


def test_nothing_is_kept_where_the_draft_model_did_not_run() -> None:
    world = World()
    world.begin(0, PROMPT, ORDER)
    world.drafts.end_step()
    world.begin(PROMPT, 1)
    step = world.first_pass(1, PROMPT + 1)
    *kept, tail = world.read(step)
    assert len(kept) == 2 and all(not page.any() for page in kept)
    assert torch.equal(tail, world.page(ROW[7]))


def test_a_prompt_that_the_draft_model_saw_in_part_is_given_up() -> None:
    """Also by an eviction that comes later, in a step with the draft model."""
    world = World()
    world.begin(0, 16)
    world.drafts.end_step()  # without the draft model
    world.begin(16, PROMPT - 16, deferred=["a"])
    world.first_pass(PROMPT - 16, PROMPT)
    world.drafts.end_step()
    world.begin(PROMPT, 1, ORDER)
    assert world.first_pass(1, PROMPT + 1) is None
    assert not any(world.page(block).any() for block in KEPT)
    step = world.further_pass(PROMPT + 2)
    assert step.tables.seq_lens.tolist() == [[2 * BLOCK_SIZE + 4]]


def test_a_request_that_starts_again_is_a_new_one() -> None:
    """V1 announces no restart: the model's state is another one."""
    world = World()
    world.begin(0, PROMPT, ORDER)
    world.first_pass(PROMPT, PROMPT)
    world.drafts.end_step()
    world.state = world.start()
    world.begin(0, PROMPT)
    assert world.first_pass(PROMPT, PROMPT) is None
    assert world.drafts.evictor.requests.evicted_slots() == []


def test_requests_that_ended_are_forgotten() -> None:
    world = World()
    world.begin(0, PROMPT, ORDER)
    world.drafts.begin_output({"a"}, None, {}, ())
    assert len(world.drafts.evictor.requests) == 0
    assert not world.drafts._requests
