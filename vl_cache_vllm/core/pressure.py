# SPDX-License-Identifier: Apache-2.0
"""Whether blocks are scarce enough to evict: ``--kv-compress-when pressure``.

Load is what running requests hold and waiting ones will ask for, as a share of the block pool.
"""

from collections.abc import Iterable


class PressureGauge:
    """A switch with hysteresis: on from ``high`` upwards, off again only at ``low`` or below."""

    def __init__(self, high: float, low: float) -> None:
        self._high, self._low = high, low
        self.is_on = False

    def update(self, used: int, demands: Iterable[int], total: int) -> None:
        """Look at the pool once a step, before anything is decided in it.

        Args:
            used: blocks that requests hold.
            demands: blocks that unfinished prefills still ask for, one request each; read only as
                far as the answer depends on them.
            total: blocks of the pool.
        """
        high, low = self._high * total, self._low * total
        load = used
        for demand in demands:
            if (load > low) if self.is_on else (load >= high):
                break
            load += demand
        self.is_on = load > low if self.is_on else load >= high
