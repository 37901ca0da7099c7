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
from dataclasses import dataclass
from itertools import accumulate

import numpy
from vllm.utils.math_utils import cdiv
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
        outputs = []
        for request, output, held in holders:
            if request.priority > newcomer.priority:
                lasting -= held
            elif output is not None:
                lasting -= held
                outputs.append(self._expected_output(request, output))
            else:
                lasting += prefill_demand(request)
        return max(0, lasting) + peak_blocks(outputs) - used if outputs else 0

    def _expected_output(self, request: Request, output: EvictedOutput) -> tuple[int, int, int]:
        """Blocks of an evicted request now, blocks still expected, and the most to count."""
        generated = request.num_output_tokens
        coming = self.lengths.expected(generated, request.max_tokens) - generated
        beyond = max(0, request.num_tokens - output.evicted_tokens)
        now = cdiv(beyond, self._block_size)
        end = cdiv(beyond + max(0, coming), self._block_size)
        if output.bound is not None:
            # While it is evicted again, a request also holds the blocks that will be its kept ones.
            end = min(end, output.bound.most_blocks)
        return output.kept_blocks + now, max(0, end - now), output.prompt_blocks


def peak_blocks(outputs: Sequence[tuple[int, int, int]]) -> int:
    """The most blocks that running outputs hold at once, simulated to completion.

    Each output allocates one block per block interval and frees all its blocks at its end.

    Args:
        outputs: for each, the blocks that it holds, the blocks that it will still allocate, and
            the most that it is counted with.
    """
    if not outputs:
        return 0
    holds, growth, limit = numpy.array(outputs).T[:, :, None]
    ends = numpy.unique(growth)  # in between, nothing is freed
    sizes = numpy.minimum(holds + ends, numpy.maximum(holds, limit))
    return int((sizes * (growth >= ends)).sum(0).max())
