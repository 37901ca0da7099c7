# SPDX-License-Identifier: Apache-2.0
"""Divide a total of pages among the layers, in proportion to their weights."""

from collections.abc import Sequence

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.rank import torch_rank


@operation
def apportion(
    weights: torch.Tensor,
    total_pages: Sequence[int],
    max_pages: torch.Tensor,
    capacities: Sequence[int],
) -> torch.Tensor:
    """Give each layer of R requests a whole number of pages, which sum to the request's total.

    The rest describes one request. Layer l gets from 1 to ``max_pages[l]`` pages.

    First compute fractional quotas: ``quota[l] = clip(scale * weights[l], 1, max_pages[l])``, with
    the one ``scale`` for which they sum to ``total_pages``. Then round every quota down. The pages
    that are still missing go one each to the layers with the largest remainders; of equal
    remainders the lower layer comes first.

    Example: weights 0.5, 0.3, 0.2 and 8 pages give the quotas 4.0, 2.4, 1.6, so the layers get
    4, 2 and 2 pages.

    All values that the host needs are arguments, so the call does not synchronise with the device.

    Args:
        weights: positive, float64 ``[R, num_layers]``; only the proportions in a row matter.
        total_pages: of each request, ``num_layers <= total_pages <= capacity``.
        max_pages: full pages that each layer has, at least 1, int64 ``[R, num_layers]``.
        capacities: sum of each row of ``max_pages``, which the host knows.

    Returns:
        Pages of each layer, int64 ``[R, num_layers]``.

    Raises:
        ValueError: if a total is outside its bounds.

    Source: docs/method.md, Layer budgets; docs/adr/0003 explains the exact sum.
    """
    check_totals(weights.shape[1], total_pages, capacities)
    rows = zip(weights, total_pages, max_pages, strict=True)
    return torch.stack([_of_request(*row) for row in rows])


def _of_request(weights: torch.Tensor, total_pages: int, max_pages: torch.Tensor) -> torch.Tensor:
    """`apportion` for one request."""
    # Scale the weights to at most 1, and bound them so that no intermediate result overflows or
    # underflows float64.
    weights = weights.nan_to_num(nan=0.0, posinf=1e300)
    weights = (weights / weights.max().clamp(min=1e-300)).clamp(min=1e-100)
    quota = _scale_to_sum(weights, float(total_pages), max_pages.double())
    pages = quota.floor().to(torch.int64)
    missing = total_pages - pages.sum()
    # A layer at its cap must not get another page because of rounding noise. Nine decimals, so
    # that noise does not decide between equal remainders either.
    remainder = torch.where(pages < max_pages, (quota - pages).round(decimals=9), -1.0)
    return pages + (torch_rank(remainder) < missing)


def check_totals(num_layers: int, total_pages: Sequence[int], capacities: Sequence[int]) -> None:
    """Raise ValueError if every layer cannot get at least one page, and all together the total."""
    for total, capacity in zip(total_pages, capacities, strict=True):
        if not num_layers <= total <= capacity:
            raise ValueError(
                f"cannot distribute {total} pages over {num_layers} layers, which need a page "
                f"each and have {capacity} in all"
            )


def _scale_to_sum(weights: torch.Tensor, total: float, cap: torch.Tensor) -> torch.Tensor:
    """``clip(scale * weights, 1, cap)`` with the scale for which it sums to ``total``.

    The sum is piecewise linear in the scale and never decreases. It has a kink wherever a layer
    leaves the floor (``scale = 1 / weight``) or reaches the cap (``scale = cap / weight``).
    Evaluate it at all 2L kinks, then interpolate between the two kinks around ``total``.
    """
    kinks = torch.cat((1.0 / weights, cap / weights)).sort().values  # [2L]
    sums = (kinks[:, None] * weights).clamp(min=1.0).minimum(cap).sum(1)  # [2L]
    right = torch.searchsorted(sums, torch.full_like(sums[:1], total)).clamp(1, len(kinks) - 1)
    left = right - 1
    slope = (kinks[right] - kinks[left]) / (sums[right] - sums[left]).clamp(min=1e-300)
    scale = kinks[left] + (total - sums[left]) * slope
    scale = torch.where(sums[right] > sums[left], scale, kinks[right])
    return (scale * weights).clamp(min=1.0).minimum(cap)
