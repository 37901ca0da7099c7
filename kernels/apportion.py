# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.apportion.apportion` in one launch of one program, in float64."""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.apportion import check_deal

CHUNK = 16  # kinks, or layers, that are compared with all layers at once


@triton.jit
def _finite(weights, layer, exists):
    weight = tl.load(weights + layer, mask=exists, other=0.0)
    return tl.where(weight != weight, 0.0, tl.minimum(weight, 1e300))


@triton.jit
def _weight(weights, layer, exists, largest):
    """Weights within the bounds that keep the arithmetic in float64."""
    weight = _finite(weights, layer, exists)
    return tl.maximum(weight / tl.maximum(largest, 1e-300), 1e-100)


@triton.jit
def _quota(weight, exists, scale, cap):
    return tl.where(exists, tl.minimum(tl.maximum(scale * weight, 1.0), cap), 0.0)


@triton.jit
def _remainder(quota, max_pages):
    """What a layer lacks to its next page, to nine decimals; -1 at the cap."""
    floor = tl.floor(quota)
    rounded = tl.floor((quota - floor) * 1e9 + 0.5)
    return tl.where(floor < max_pages, rounded, -1.0)


# One compilation serves all prompts.
@triton.jit(do_not_specialize=["total", "max_pages"], do_not_specialize_on_alignment=["weights"])
def apportion_kernel(
    weights,
    pages,
    total,
    max_pages,
    num_layers,
    LAYERS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid ``(1,)``."""
    layer = tl.arange(0, LAYERS)
    exists = layer < num_layers
    total = tl.full((), total, tl.float64)
    cap = tl.full((), max_pages, tl.float64)
    largest = tl.max(_finite(weights, layer, exists), 0)
    weight = _weight(weights, layer, exists, largest)

    # The sum of the quotas grows with the scale, linearly between kinks, where a layer leaves the
    # floor or reaches the cap: find the kinks next to the scale at which the sum is the total.
    left = tl.full((), -1.0, tl.float64)
    right = tl.full((), float("inf"), tl.float64)
    largest_kink = tl.full((), 0.0, tl.float64)
    for start in range(0, 2 * num_layers, CHUNK):
        place = start + tl.arange(0, CHUNK)
        is_kink = place < 2 * num_layers
        of_layer = _weight(weights, place % num_layers, is_kink, largest)
        kink = tl.where(place < num_layers, 1.0, cap) / of_layer
        quotas = _quota(weight[None, :], exists[None, :], kink[:, None], cap)
        is_below = tl.sum(quotas, 1) < total
        left = tl.maximum(left, tl.max(tl.where(is_kink & is_below, kink, -1.0), 0))
        right = tl.minimum(right, tl.min(tl.where(is_kink & ~is_below, kink, float("inf")), 0))
        largest_kink = tl.maximum(largest_kink, tl.max(tl.where(is_kink, kink, 0.0), 0))
    right = tl.minimum(right, largest_kink)  # rounding may leave all sums below the total
    left = tl.where(left < 0, right, left)
    at_left = tl.sum(_quota(weight, exists, left, cap), 0)
    at_right = tl.sum(_quota(weight, exists, right, cap), 0)
    slope = (right - left) / tl.maximum(at_right - at_left, 1e-300)
    scale = tl.where(at_right > at_left, left + (total - at_left) * slope, right)

    quota = _quota(weight, exists, scale, cap)
    floor = tl.floor(quota)
    missing = total - tl.sum(floor, 0)
    remainder = _remainder(quota, cap)
    before = tl.zeros((LAYERS,), tl.int32)  # layers whose claim to a page comes before
    for start in range(0, num_layers, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_exists = other < num_layers
        other_weight = _weight(weights, other, other_exists, largest)
        claim = _remainder(_quota(other_weight, other_exists, scale, cap), cap)
        is_higher = claim[:, None] > remainder[None, :]
        is_tie = (claim[:, None] == remainder[None, :]) & (other[:, None] < layer[None, :])
        counts = other_exists[:, None] & (is_higher | is_tie)
        before += tl.sum(counts.to(tl.int32), 0)
    dealt = floor + tl.where(before < missing, 1.0, 0.0)
    tl.store(pages + layer, dealt.to(tl.int64), mask=exists)


def apportion(weights: torch.Tensor, total_pages: int, max_pages: int) -> torch.Tensor:
    """See the operation."""
    num_layers = weights.shape[0]
    check_deal(num_layers, total_pages, max_pages)
    pages = torch.empty(num_layers, dtype=torch.int64, device=weights.device)
    apportion_kernel[1,](
        weights.double().contiguous(),
        pages,
        total_pages,
        max_pages,
        num_layers,
        LAYERS=triton.next_power_of_2(num_layers),
        CHUNK=CHUNK,
    )
    return pages
