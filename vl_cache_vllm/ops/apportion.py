# SPDX-License-Identifier: Apache-2.0
"""Layer weights to whole pages that add up exactly."""

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.rank import rank


@operation
def apportion(weights: torch.Tensor, total_pages: int, max_pages: int) -> torch.Tensor:
    """Deal ``total_pages`` out in proportion to ``weights``, 1 to ``max_pages`` to each layer.

    Where the floor or the cap binds, the remaining layers share what is left in proportion to
    their weights; fractions are settled by largest remainder, ties to the lower layer. Host
    values only enter as bounds, so the call never reads the device back.

    Args:
        weights: positive, float64 ``[num_layers]``.
        total_pages: ``num_layers <= total_pages <= num_layers * max_pages``.
        max_pages: the prompt's full pages.

    Returns:
        Pages per layer, int64 ``[num_layers]``, summing to ``total_pages``.

    Raises:
        ValueError: if no such division exists.

    Source: paper, Algorithm 1; exact sums are this project's (docs/adr/0003).
    """
    num_layers = weights.shape[0]
    # Only proportions count; within these no step of the arithmetic leaves float64.
    weights = weights.nan_to_num(nan=0.0, posinf=1e300)
    weights = (weights / weights.max().clamp(min=1e-300)).clamp(min=1e-100)
    check_deal(num_layers, total_pages, max_pages)
    quota = _scale_to_sum(weights, float(total_pages), float(max_pages))
    pages = quota.floor().to(torch.int64)
    missing = total_pages - pages.sum()
    # A layer at its cap has no claim to a rounded-up page, whatever its rounding noise.
    # Rounded, so that noise does not decide between equal remainders either.
    remainder = torch.where(pages < max_pages, (quota - pages).round(decimals=9), -1.0)
    return pages + (rank(remainder) < missing)


def check_deal(num_layers: int, total_pages: int, max_pages: int) -> None:
    """Raise ValueError if so many pages cannot be dealt."""
    if not num_layers <= total_pages <= num_layers * max_pages:
        raise ValueError(
            f"cannot deal {total_pages} pages to {num_layers} layers with 1 to {max_pages} each"
        )


def _scale_to_sum(weights: torch.Tensor, total: float, cap: float) -> torch.Tensor:
    """``clip(scale * weights, 1, cap)`` with the scale that makes it sum to ``total``.

    The sum is piecewise linear and increasing in the scale, with a kink wherever a layer leaves
    the floor or reaches the cap: evaluate it at all 2L kinks, then interpolate.
    """
    kinks = torch.cat((1.0 / weights, cap / weights)).sort().values  # [2L]
    sums = (kinks[:, None] * weights).clamp(1.0, cap).sum(1)  # [2L]
    right = torch.searchsorted(sums, torch.full_like(sums[:1], total)).clamp(1, len(kinks) - 1)
    left = right - 1
    slope = (kinks[right] - kinks[left]) / (sums[right] - sums[left]).clamp(min=1e-300)
    scale = kinks[left] + (total - sums[left]) * slope
    scale = torch.where(sums[right] > sums[left], scale, kinks[right])
    return (scale * weights).clamp(1.0, cap)
