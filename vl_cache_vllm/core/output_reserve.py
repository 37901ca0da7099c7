# SPDX-License-Identifier: Apache-2.0
"""How many blocks running answers will come to hold: what admission keeps free for them.

vLLM admits a prompt that fits now. A whole cache grows by a small share of itself while it is
answered; an evicted one by several times itself, so that prompts which fitted together with others'
answers' beginnings do not fit together with their ends, and every preemption costs a whole prefill.
"""

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import numpy


class OutputLengths:
    """Lengths of the latest answers as shares of their ``max_tokens``, which tell answers apart."""

    LATEST = 256
    ENOUGH = 8  # answers to expect anything but ``max_tokens`` from

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=self.LATEST)
        self._sorted: list[float] = []
        self._sums = [0.0]  # of the sorted ones before each place

    def add(self, length: int, max_tokens: int) -> None:
        """An answer has ended, by itself or because its client wanted no more."""
        if len(self._latest) == self.LATEST:
            self._sorted.remove(self._latest[0])
        self._latest.append(length / max_tokens)
        insort(self._sorted, self._latest[-1])
        self._sums = [0.0, *accumulate(self._sorted)]

    def expected(self, generated: int, max_tokens: int) -> int:
        """Length in tokens that a running answer will have: the mean of those that were longer.

        Args:
            generated: tokens that it has.
            max_tokens: the most that it may have, expected where few were longer.
        """
        shorter = bisect_right(self._sorted, generated / max_tokens)
        longer = len(self._sorted) - shorter
        if longer < self.ENOUGH:
            return max_tokens
        share = (self._sums[-1] - self._sums[shorter]) / longer
        return math.ceil(share * max_tokens - 1e-6)  # sums of shares are not exact


def peak_blocks(answers: Sequence[tuple[int, int, int]]) -> int:
    """The most blocks that answers hold at once.

    All take their blocks at the same pace and free what they hold at their end.

    Args:
        answers: of each, blocks that it holds, blocks that it will still take, and the most that
            it is counted with.
    """
    if not answers:
        return 0
    holds, growth, limit = numpy.array(answers).T[:, :, None]
    ends = numpy.unique(growth)  # in between nothing is freed
    sizes = numpy.minimum(holds + ends, numpy.maximum(holds, limit))
    return int((sizes * (growth >= ends)).sum(0).max())
