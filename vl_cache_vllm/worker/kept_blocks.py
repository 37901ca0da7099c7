# SPDX-License-Identifier: Apache-2.0
"""The blocks that evicted requests keep, on the device."""

from collections.abc import Iterable

import numpy as np
import torch

_FIRST_SIZE = 1024  # of the buffer


class KeptBlocks:
    """Ids of the blocks of each request, one request after another in one buffer.

    Requests keep different blocks of one pool, so the buffer is small: it has room for at most
    twice the blocks that requests have kept at any one time. A table with a row for each request
    would have to be as wide as the longest request.

    Args:
        device: of the ids.
    """

    def __init__(self, device: torch.device) -> None:
        self._ids = torch.zeros(_FIRST_SIZE, dtype=torch.int32, device=device)
        self._end = 0  # of what is used
        self._places: dict[int, tuple[int, int]] = {}  # first index and number, by slot

    def store(self, slot: int, ids: torch.Tensor, live: Iterable[int]) -> None:
        """Replace the blocks of a request.

        Args:
            slot: of the request.
            ids: of its blocks, int64 ``[M]``.
            live: slots whose blocks are still needed; those of others may be forgotten.
        """
        self._places.pop(slot, None)
        if self._end + len(ids) > len(self._ids):
            self._move(live, len(ids))
        end = self._end + len(ids)
        self._ids[self._end : end] = ids
        self._places[slot] = self._end, len(ids)
        self._end = end

    def _move(self, live: Iterable[int], room: int) -> None:
        """Move what is still needed to a buffer with room for as much again."""
        places = {slot: self._places[slot] for slot in live if slot in self._places}
        parts = [self._ids[first : first + number] for first, number in places.values()]
        self._places, self._end = {}, 0
        for slot, (_, number) in places.items():
            self._places[slot] = self._end, number
            self._end += number
        ids = self._ids.new_zeros(max(_FIRST_SIZE, 2 * (self._end + room)))
        if parts:
            torch.cat(parts, out=ids[: self._end])
        self._ids = ids

    def first(self, slots: np.ndarray) -> list[int]:
        """Where the blocks of each slot begin, for `rows`; 0 for slots without blocks."""
        nowhere = 0, 0
        return [self._places.get(slot, nowhere)[0] for slot in slots.tolist()]

    def rows(self, first: torch.Tensor, most: int) -> torch.Tensor:
        """Ids of blocks from each of some indices on.

        Args:
            first: result of `first`, int64 ``[R]`` on the device.
            most: blocks of a row.

        Returns:
            int64 ``[R, most]``; what follows the blocks of a slot has no meaning.
        """
        index = first[:, None].int() + torch.arange(most, dtype=torch.int32, device=first.device)
        index.clamp_(max=len(self._ids) - 1)
        return self._ids.index_select(0, index.flatten()).view_as(index).long()
