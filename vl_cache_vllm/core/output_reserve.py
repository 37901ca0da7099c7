# SPDX-License-Identifier: Apache-2.0
"""How many blocks admission keeps free so that running evicted requests can finish (ADR 11).

vLLM admits a prompt that fits now. A full cache grows by a small fraction of itself while the
output is generated, but an evicted one grows by several times itself. Prompts that fit now need not
fit later, and every preemption repeats a whole prefill.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import numpy
from vllm.v1.request import Request

from vl_cache_vllm.core.later_evictions import AnswerBound


class OutputLengths:
    """Lengths of recent outputs as fractions of their ``max_tokens``."""

    LATEST = 256
    ENOUGH = 8  # outputs needed to expect anything but ``max_tokens``

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=self.LATEST)
        self._sorted: list[float] = []
        self._sums = numpy.zeros(1)  # prefix sums of the sorted fractions

    def add(self, length: int, max_tokens: int) -> None:
        """Record an output that ended by itself or because its client wanted no more."""
        if len(self._latest) == self.LATEST:
            self._sorted.remove(self._latest[0])
        self._latest.append(length / max_tokens)
        insort(self._sorted, self._latest[-1])
        self._sums = numpy.array([0.0, *accumulate(self._sorted)])

    def expected(self, generated: numpy.ndarray, max_tokens: numpy.ndarray) -> numpy.ndarray:
        """Expected lengths of running outputs in tokens: the mean of those that were longer.

        Args:
            generated: tokens that each request has generated so far, int64 ``[R]``.
            max_tokens: the requests' limits, which are expected where few outputs were longer,
                int64 ``[R]``.

        Returns:
            int64 ``[R]``.
        """
        shorter = numpy.searchsorted(self._sorted, generated / max_tokens, side="right")
        longer = len(self._sorted) - shorter
        fraction = (self._sums[-1] - self._sums[shorter]) / numpy.maximum(longer, 1)
        expected = numpy.ceil(fraction * max_tokens - 1e-6)  # sums of fractions are not exact
        return numpy.where(longer < self.ENOUGH, max_tokens, expected.astype(numpy.int64))


@dataclass(frozen=True)
class EvictedOutput:
    """What the growth of an evicted request depends on, apart from its generated tokens."""

    evicted_tokens: int  # E, of its last or coming eviction
    kept_blocks: int  # M
    prompt_blocks: int  # N: no request is counted with more, whatever is expected
    bound: AnswerBound | None = None
    blocks_before: int = 0  # that it holds before an eviction that waits; 0: none does


class _Column(IntEnum):
    """Rows of the array of `EvictedOutputs`."""

    EVICTED_TOKENS = 0
    KEPT_BLOCKS = 1  # of the last or any later eviction, whichever keeps more
    KEPT_AGAIN = 2  # of later evictions; 0: there are none
    PERIOD = 3  # tokens between later evictions; 0: there are none
    PROMPT_BLOCKS = 4
    BLOCKS_BEFORE = 5
    HELD = 6
    PRIORITY = 7
    PROMPT_TOKENS = 8  # without generated ones
    MAX_TOKENS = 9


class EvictedOutputs:
    """The outputs of evicted requests as columns of one array, which vectorised code reads.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._requests: list[Request] = []  # by index
        self._index: dict[str, int] = {}  # by id
        self._array = numpy.zeros((len(_Column), 16), numpy.int64)
        self.blocks_held = 0
        """Blocks that all of them hold; a counter, because every step reads it."""

    def put(self, request: Request, output: EvictedOutput, held: int) -> None:
        """Add a request, or replace what is known of it.

        Args:
            request: vLLM's, whose tokens are counted when the array is read.
            output: how it grows.
            held: blocks that it holds, without null blocks.
        """
        index = self._index.setdefault(request.request_id, len(self._requests))
        if index == len(self._requests):
            self._requests.append(request)
            if index == self._array.shape[1]:
                self._array = numpy.concatenate((self._array, numpy.zeros_like(self._array)), 1)
            self._array[_Column.HELD, index] = 0
        self.set_held(request.request_id, held)
        bound = output.bound
        kept_again = bound.kept_blocks if bound is not None else 0
        self._requests[index] = request
        self._array[:, index] = (
            output.evicted_tokens,
            max(output.kept_blocks, kept_again),
            kept_again,
            bound.growth * self._block_size if bound is not None else 0,
            output.prompt_blocks,
            output.blocks_before,
            held,
            request.priority,
            request.num_tokens - request.num_output_tokens,
            request.max_tokens,
        )

    def set_held(self, request_id: str, held: int) -> None:
        """Change the number of blocks that a request holds."""
        index = self._index[request_id]
        self.blocks_held += held - int(self._array[_Column.HELD, index])
        self._array[_Column.HELD, index] = held

    def discard(self, request_id: str) -> None:
        """Forget a request; unknown ids are fine."""
        index = self._index.pop(request_id, None)
        if index is None:
            return
        self.blocks_held -= int(self._array[_Column.HELD, index])
        last = self._requests.pop()
        if index < len(self._requests):  # the last one takes its place
            self._requests[index] = last
            self._index[last.request_id] = index
            self._array[:, index] = self._array[:, len(self._requests)]

    def columns(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """A view of the array, ``[10, R]``, and the tokens that each request has, ``[R]``."""
        num = len(self._requests)
        tokens = (request.num_tokens for request in self._requests)
        return self._array[:, :num], numpy.fromiter(tokens, numpy.int64, num)


class OutputReserve:
    """The free blocks that admission asks for.

    Args:
        block_size: tokens per block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.lengths = OutputLengths()

    def free_blocks_for(
        self,
        newcomer: Request,
        evicted: EvictedOutputs,
        others: Iterable[tuple[Request, EvictedOutput | None, int]],
        prefill_demand: Callable[[Request], int],
        used: int,
    ) -> int:
        """Free blocks with which the pool should not run out if one more request is admitted.

        Less urgent requests (``--scheduling-policy priority``) are not counted, because they make
        room by being preempted.

        Args:
            newcomer: the request to admit.
            evicted: the requests that have been evicted.
            others: every other request that holds blocks, and the newcomer: the request, how it
                grows if it will be evicted, and the blocks that it holds without null blocks.
            prefill_demand: blocks that a request which is not evicted still needs.
            used: blocks of the pool in use.

        Returns:
            0 where none of the requests is evicted: admission is then vLLM's alone.
        """
        lasting = used - evicted.blocks_held
        to_come = EvictedOutputs(self._block_size)
        for request, output, held in others:
            if request.priority > newcomer.priority:
                lasting -= held
            elif output is not None:
                lasting -= held
                to_come.put(request, output, held)
            else:
                lasting += prefill_demand(request)
        (array, tokens), (more, more_tokens) = evicted.columns(), to_come.columns()
        counted = array[_Column.PRIORITY] <= newcomer.priority
        array = numpy.concatenate((array[:, counted], more), 1)
        tokens = numpy.concatenate((tokens[counted], more_tokens))
        if not len(tokens):
            return 0
        # Evictions that wait for answers to begin may all be still to come.
        present = numpy.maximum(array[_Column.HELD], array[_Column.BLOCKS_BEFORE]).sum()
        # While one is evicted again, it also holds what will be its kept blocks.
        kept_again = array[_Column.KEPT_AGAIN].max()
        peak = peak_blocks(self._growth(array, tokens), self._block_size) + kept_again
        return max(0, lasting) + int(max(peak, present)) - used

    def _growth(self, array: numpy.ndarray, tokens: numpy.ndarray) -> Growth:
        """How outputs grow; arguments as returned by `EvictedOutputs.columns`."""
        generated = tokens - array[_Column.PROMPT_TOKENS]
        expected = self.lengths.expected(generated, array[_Column.MAX_TOKENS])
        return Growth(
            kept_blocks=array[_Column.KEPT_BLOCKS],
            tokens=numpy.maximum(0, tokens - array[_Column.EVICTED_TOKENS]),
            coming=numpy.maximum(0, expected - generated),
            most_blocks=array[_Column.PROMPT_BLOCKS],
            period=array[_Column.PERIOD],
        )


class Growth(NamedTuple):
    """How R running outputs grow; each field is int64 ``[R]``."""

    kept_blocks: numpy.ndarray
    tokens: numpy.ndarray  # beside the kept blocks
    coming: numpy.ndarray  # tokens, until the output ends
    most_blocks: numpy.ndarray  # it is not counted with more, unless it holds more now
    period: numpy.ndarray  # tokens between later evictions; 0: there are none


def peak_blocks(growth: Growth, block_size: int) -> int:
    """The most blocks that running outputs hold at once, simulated to completion.

    Each output frees all its blocks at its end. The moments that are looked at are the ends, and
    the next two later evictions of each output: in between, blocks are only allocated.

    Args:
        growth: of at least one output.
        block_size: tokens per block.
    """
    # Unsigned 32-bit numbers divide several times faster than signed ones of 64 bits.
    kept, tokens, coming, most, period = (field.astype(numpy.uint32) for field in growth)
    is_bounded = period > 0
    again = -growth.tokens[is_bounded] % growth.period[is_bounded]
    again = numpy.concatenate((again, again + growth.period[is_bounded]))
    moments = numpy.unique(numpy.concatenate((growth.coming, again))).astype(numpy.uint32)

    def blocks(moments: numpy.ndarray) -> numpy.ndarray:
        """Of each output at each moment, ``[moments, outputs]``."""
        left = moments[:, None] + tokens
        if len(again):
            # What it has at an eviction counts; before it, there were none.
            left -= (numpy.maximum(left, 1) - 1) // numpy.maximum(period, 1) * period
        left += numpy.uint32(block_size - 1)
        left //= numpy.uint32(block_size)
        left += kept
        return left

    limit = numpy.maximum(blocks(numpy.zeros(1, numpy.uint32)), most)
    sizes = blocks(moments)
    numpy.minimum(sizes, limit, out=sizes)
    sizes *= coming >= moments[:, None]
    return int(sizes.sum(1).max())
