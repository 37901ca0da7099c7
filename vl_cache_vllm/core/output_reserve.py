# SPDX-License-Identifier: Apache-2.0
"""How many blocks admission keeps free so that running evicted requests can finish (ADR 11).

vLLM admits a prompt that fits now. A full cache grows by a small fraction of itself while the
output is generated, but an evicted one grows by several times itself. Prompts that fit now need not
fit later, and every preemption repeats a whole prefill.
"""

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate

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
        self._sums = [0.0]  # prefix sums of the sorted fractions

    def add(self, length: int, max_tokens: int) -> None:
        """Record an output that ended by itself or because its client wanted no more."""
        if len(self._latest) == self.LATEST:
            self._sorted.remove(self._latest[0])
        self._latest.append(length / max_tokens)
        insort(self._sorted, self._latest[-1])
        self._sums = [0.0, *accumulate(self._sorted)]

    def expected(self, generated: int, max_tokens: int) -> int:
        """Expected length of a running output in tokens: the mean of those that were longer.

        Args:
            generated: tokens generated so far.
            max_tokens: the request's limit, which is expected where few outputs were longer.
        """
        shorter = bisect_right(self._sorted, generated / max_tokens)
        longer = len(self._sorted) - shorter
        if longer < self.ENOUGH:
            return max_tokens
        fraction = (self._sums[-1] - self._sums[shorter]) / longer
        return math.ceil(fraction * max_tokens - 1e-6)  # sums of fractions are not exact


@dataclass(frozen=True)
class EvictedOutput:
    """What the growth of an evicted request depends on."""

    evicted_tokens: int  # E, of its last or coming eviction
    kept_blocks: int  # M
    prompt_blocks: int  # N: no request is counted with more, whatever is expected
    bound: AnswerBound | None = None
    blocks_before: int = 0  # that it holds before an eviction that waits; 0: none does


@dataclass(frozen=True)
class Growth:
    """How a running output grows."""

    kept_blocks: int
    tokens: int  # beside the kept blocks
    coming: int  # tokens, until the output ends
    most_blocks: int  # it is not counted with more, unless it holds more now
    period: int = 0  # tokens between later evictions; 0: there are none


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
        holders: Iterable[tuple[Request, EvictedOutput | None, int]],
        prefill_demand: Callable[[Request], int],
        used: int,
    ) -> int:
        """Free blocks with which the pool should not run out if one more request is admitted.

        Less urgent requests (``--scheduling-policy priority``) are not counted, because they make
        room by being preempted.

        Args:
            newcomer: the request to admit.
            holders: every request that holds blocks and the newcomer: the request, how it grows
                if it is or will be evicted, and the blocks that it holds without null blocks.
            prefill_demand: blocks that a request which is not evicted still needs.
            used: blocks of the pool in use.

        Returns:
            0 where none of the requests is evicted: admission is then vLLM's alone.
        """
        lasting = used
        outputs: list[Growth] = []
        kept_again = present = 0
        for request, output, held in holders:
            if request.priority > newcomer.priority:
                lasting -= held
            elif output is not None:
                lasting -= held
                outputs.append(self._expected_output(request, output))
                # Evictions that wait for answers to begin may all be still to come.
                present += max(held, output.blocks_before)
                if output.bound is not None:
                    # While one is evicted again, it also holds what will be its kept blocks.
                    kept_again = max(kept_again, output.bound.kept_blocks)
            else:
                lasting += prefill_demand(request)
        peak = max(peak_blocks(outputs, self._block_size) + kept_again, present)
        return max(0, lasting) + peak - used if outputs else 0

    def _expected_output(self, request: Request, output: EvictedOutput) -> Growth:
        generated = request.num_output_tokens
        coming = self.lengths.expected(generated, request.max_tokens) - generated
        tokens = max(0, request.num_tokens - output.evicted_tokens)
        kept, period = output.kept_blocks, 0
        if output.bound is not None:
            kept = max(kept, output.bound.kept_blocks)
            period = output.bound.growth * self._block_size
        return Growth(kept, tokens, max(0, coming), output.prompt_blocks, period)


def peak_blocks(outputs: Sequence[Growth], block_size: int) -> int:
    """The most blocks that running outputs hold at once, simulated to completion.

    Each output frees all its blocks at its end. The moments that are looked at are the ends, and
    the next two later evictions of each output: in between, blocks are only allocated.
    """
    if not outputs:
        return 0
    kept, tokens, coming, most, period = numpy.array([astuple(output) for output in outputs]).T
    is_bounded = period > 0
    until = -tokens[is_bounded] % period[is_bounded]
    again = until + period[is_bounded]
    moments = numpy.unique(numpy.concatenate((coming, until, again)))

    def blocks(moments: numpy.ndarray) -> numpy.ndarray:
        """Of each output at each moment, ``[outputs, moments]``."""
        grown = tokens[:, None] + moments
        # What it has at an eviction counts; before it, there were none.
        evictions = numpy.maximum(0, -(-grown // numpy.maximum(1, period)[:, None]) - 1)
        left = grown - evictions * period[:, None]
        return kept[:, None] + -(-left // block_size)

    limit = numpy.maximum(blocks(numpy.zeros(1, int)), most[:, None])
    sizes = numpy.minimum(blocks(moments), limit)
    return int((sizes * (coming[:, None] >= moments)).sum(0).max())
