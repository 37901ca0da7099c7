# SPDX-License-Identifier: Apache-2.0
"""Eviction in the layers of a draft model: EAGLE-3 and multi-token prediction (MTP).

vLLM places these layers in the KV cache group of the model, so every block has a page for each of
them, too. They run after the model, in passes of their own:

- the first pass of a step has the tokens of the model's step. It observes its queries as the model
  does, and evicts after its last layer. The blocks that an eviction replaces are still whole then;
- each further pass has one token per request and reads what the first pass left.

The draft's layers share the kept blocks' pages for them by their own attention. What they keep can
change how many drafts the model accepts, but not what it generates.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.worker.evictor import EvictionStep, Evictor
from vl_cache_vllm.worker.requests import RequestState, columns_of
from vl_cache_vllm.worker.step import Batch


@dataclass(eq=False)
class _Request:
    """A request as the draft's layers see it."""

    model_state: RequestState  # of the model's evictor
    state: RequestState  # of the draft's evictor
    is_incomplete: bool = False  # the draft model did not see all of its tokens


class DraftEvictor:
    """Evicts the draft's layers.

    Args:
        evictor: of the draft's layers, over a pool of their own.
        layers: index in that pool by vLLM's layer name.
        num_drafts: tokens that are drafted in a step at most.
    """

    def __init__(self, evictor: Evictor, layers: dict[str, int], num_drafts: int) -> None:
        self.evictor = evictor
        self.layers = layers
        self._num_drafts = num_drafts
        self._requests: dict[str, _Request] = {}
        self._waiting: Batch | None = None  # the step's, until the first pass
        self._rows: list[_Request] = []  # of the step
        self._ends = np.zeros(0, np.int64)  # tokens of each row after the step's last pass

    def begin_output(
        self,
        ended: Iterable[str],
        admitted: Iterable[str] | None,
        orders: Mapping[str, EvictionOrder],
        deferred: Collection[str],
    ) -> None:
        """As `Evictor.begin_output`."""
        self.evictor.begin_output(ended, admitted, orders, deferred)
        for request_id in ended:
            self._requests.pop(request_id, None)

    def begin_step(self, batch: Batch) -> None:
        """Take in a step's batch, which the model's evictor has planned.

        Args:
            batch: its columns are not read: those of the draft's evictor replace them.
        """
        self._rows = [self._request(batch.state(row)) for row in range(len(batch.request_ids))]
        states = [one.state for one in self._rows]
        computed, scheduled = batch.num_computed.copy(), batch.num_scheduled.copy()
        self._ends = computed + scheduled + self._num_drafts
        self._waiting = Batch(
            batch.request_ids, computed, scheduled, columns_of(states), states.__getitem__
        )

    def _request(self, model_state: RequestState) -> _Request:
        request_id = model_state.request_id
        known = self._requests.get(request_id)
        if known is None or known.model_state is not model_state:  # it starts or restarts
            state = self.evictor.requests.start(
                request_id,
                model_state.config,
                model_state.vision_end,
                model_state.prefill_tokens,
                model_state.visual,
                model_state.grids,
            )
            known = self._requests[request_id] = _Request(model_state, state)
        return known

    def first_pass(self, metadata: dict[str, Any]) -> None:
        """Let the draft's layers see the first pass of a step.

        Args:
            metadata: their attention metadata by vLLM's layer name, not shared with the model's.
        """
        batch, self._waiting = self._waiting, None
        if batch is None:  # a dummy run
            self._rows = []
            return
        evictor, orders = self.evictor, self.evictor.orders
        given_up = {
            one.state.request_id: one
            for one in self._rows
            if one.is_incomplete and one.state.request_id in orders
        }
        evictor.orders = {key: order for key, order in orders.items() if key not in given_up}
        one = next(iter(metadata.values()))
        step = evictor.begin_step(batch, one.block_table, one.query_start_loc, one.seq_lens)
        if step is not None:
            step.attach(metadata, self.layers)
        for request_id, request in given_up.items():
            self._keep_nothing(request.state, orders[request_id])

    def further_pass(self, metadata: dict[str, Any]) -> None:
        """Let the draft's layers see a pass of one token per request.

        Args:
            metadata: as for `first_pass`.
        """
        columns = columns_of(one.state for one in self._rows)
        if not any(columns[1].tolist()):
            return
        evictor, one = self.evictor, next(iter(metadata.values()))
        num_reqs = len(self._rows)
        slots = one.slot_mapping[:num_reqs]
        block_table = one.block_table[:num_reqs]
        tables = evictor.tables.fill(
            columns[1:],
            num_reqs,
            evictor.table_width(columns, self._ends),
            block_table,
            one.query_start_loc[: num_reqs + 1],
            one.seq_lens[:num_reqs],
            None,
        )
        # vLLM gives no slot to drafts beyond the model's maximum length, and they have length 1.
        tables.slot_mapping[:, slots < 0] = -1
        tables.seq_lens.clamp_(min=1)
        EvictionStep(evictor, [], None, [], block_table, tables).attach(metadata, self.layers)

    def end_step(self) -> None:
        """End a step, in which the draft model may not have run.

        vLLM leaves it out near the draft model's maximum length, for all requests of the step. A
        prompt that the draft's layers have not seen is a gap in their cache: they keep nothing of
        such a request when it is evicted.
        """
        if (batch := self._waiting) is not None:
            self._waiting = None
            for one, computed in zip(self._rows, batch.num_computed.tolist(), strict=True):
                if computed < one.state.prefill_tokens:
                    one.is_incomplete, one.state.attention_stats = True, None
                if (order := self.evictor.orders.get(one.state.request_id)) is not None:
                    self._keep_nothing(one.state, order)
        self.evictor.take_reports()  # the model's reports stand for the request

    def _keep_nothing(self, state: RequestState, order: EvictionOrder) -> None:
        """Replace tokens by pages of zeros, as many for each layer."""
        evictor, pool = self.evictor, self.evictor.pool
        state.evicted_tokens = order.evicted_tokens
        state.kept_blocks = len(order.kept_blocks)
        state.num_evictions += 1
        state.attention_stats, state.is_deferred = None, False
        evictor.requests.note(state)
        row = to_device(order.kept_blocks, pool.device)
        pool.pages[pool.block_pages(row).long()] = 0
        pages = torch.full((pool.num_layers,), len(row), device=pool.device)
        evictor.tables.set_kept(state.slot, pages, row, evictor.requests.evicted_slots())
