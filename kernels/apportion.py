# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.apportion.apportion` as one launch, a program per request, in float64.

The torch function sorts the kinks of the sum of the quotas. The kernel needs no sort: it evaluates
the sum at every kink, in chunks, and keeps the two kinks around the total.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.apportion import check_totals
from vl_cache_vllm.ops.device import to_device

CHUNK = 16  # kinks, or layers, compared with all layers at once


@triton.jit
def _finite(
    weights,  # [num_layers] float64
    layer,  # [n] int32, indices to load
    exists,  # [n] bool, mask of the load
):
    """Weights with NaN replaced by 0 and infinity by a finite number, float64 ``[n]``."""
    weight = tl.load(weights + layer, mask=exists, other=0.0)
    return tl.where(weight != weight, 0.0, tl.minimum(weight, 1e300))


@triton.jit
def _weight(
    weights,  # [num_layers] float64
    layer,  # [n] int32, indices to load
    exists,  # [n] bool, mask of the load
    largest,  # scalar float64, largest finite weight
):
    """Weights scaled to at most 1 and bounded, so that float64 neither overflows nor underflows."""
    weight = _finite(weights, layer, exists)
    return tl.maximum(weight / tl.maximum(largest, 1e-300), 1e-100)


@triton.jit
def _quota(
    weight,  # [n] float64, scaled weights
    exists,  # [n] bool; quotas of other entries are 0
    scale,  # float64, scalar or broadcast with weight
    cap,  # [n] float64, pages
):
    """``clip(scale * weight, 1, cap)`` in pages, float64."""
    return tl.where(exists, tl.minimum(tl.maximum(scale * weight, 1.0), cap), 0.0)


@triton.jit
def _remainder(
    quota,  # [n] float64, pages
    max_pages,  # [n] float64, pages
):
    """Fractional part of a quota in units of 1e-9, rounded; -1 for a layer at its cap."""
    floor = tl.floor(quota)
    rounded = tl.floor((quota - floor) * 1e9 + 0.5)
    return tl.where(floor < max_pages, rounded, -1.0)


# Compiled once for all prompts.
@triton.jit(do_not_specialize_on_alignment=["weights", "max_pages", "pages", "totals"])
def apportion_kernel(
    weights,  # [R, num_layers] float64, positive
    pages,  # [R, num_layers] int64, output: pages of each layer
    totals,  # [R] int64, pages of all layers
    max_pages,  # [R, num_layers] int64, cap of each layer in pages
    num_layers,  # int
    LAYERS: tl.constexpr,  # num_layers rounded up to a power of 2
    CHUNK: tl.constexpr,  # kinks or layers per iteration
):
    """Grid ``(R,)``: one program holds all layers of a request."""
    request = tl.program_id(0)
    weights += request * num_layers
    pages += request * num_layers
    max_pages += request * num_layers
    layer = tl.arange(0, LAYERS)
    exists = layer < num_layers
    total = tl.load(totals + request).to(tl.float64)
    cap = tl.load(max_pages + layer, mask=exists, other=1).to(tl.float64)
    largest = tl.max(_finite(weights, layer, exists), 0)
    weight = _weight(weights, layer, exists, largest)

    # The sum of the quotas grows with the scale and is linear between kinks. A kink is a scale at
    # which a layer leaves the floor or reaches the cap. Find the last kink whose sum is below the
    # total (left) and the first one whose sum is not (right).
    left = tl.full((), -1.0, tl.float64)
    right = tl.full((), float("inf"), tl.float64)
    largest_kink = tl.full((), 0.0, tl.float64)
    for start in range(0, 2 * num_layers, CHUNK):
        index = start + tl.arange(0, CHUNK)  # first the floor kinks of all layers, then the caps
        is_kink = index < 2 * num_layers
        of_layer = _weight(weights, index % num_layers, is_kink, largest)
        own_cap = tl.load(max_pages + index % num_layers, mask=is_kink, other=1).to(tl.float64)
        kink = tl.where(index < num_layers, 1.0, own_cap) / of_layer
        quotas = _quota(weight[None, :], exists[None, :], kink[:, None], cap[None, :])
        is_below = tl.sum(quotas, 1) < total
        left = tl.maximum(left, tl.max(tl.where(is_kink & is_below, kink, -1.0), 0))
        right = tl.minimum(right, tl.min(tl.where(is_kink & ~is_below, kink, float("inf")), 0))
        largest_kink = tl.maximum(largest_kink, tl.max(tl.where(is_kink, kink, 0.0), 0))
    right = tl.minimum(right, largest_kink)  # rounding can leave every sum below the total
    left = tl.where(left < 0, right, left)
    at_left = tl.sum(_quota(weight, exists, left, cap), 0)
    at_right = tl.sum(_quota(weight, exists, right, cap), 0)
    slope = (right - left) / tl.maximum(at_right - at_left, 1e-300)
    scale = tl.where(at_right > at_left, left + (total - at_left) * slope, right)

    quota = _quota(weight, exists, scale, cap)
    floor = tl.floor(quota)
    missing = total - tl.sum(floor, 0)
    remainder = _remainder(quota, cap)
    # Rank of each layer's remainder: the number of layers that get a missing page before it.
    before = tl.zeros((LAYERS,), tl.int32)
    for start in range(0, num_layers, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_exists = other < num_layers
        other_weight = _weight(weights, other, other_exists, largest)
        other_cap = tl.load(max_pages + other, mask=other_exists, other=1).to(tl.float64)
        claim = _remainder(_quota(other_weight, other_exists, scale, other_cap), other_cap)
        is_higher = claim[:, None] > remainder[None, :]
        is_tie = (claim[:, None] == remainder[None, :]) & (other[:, None] < layer[None, :])
        counts = other_exists[:, None] & (is_higher | is_tie)
        before += tl.sum(counts.to(tl.int32), 0)
    result = floor + tl.where(before < missing, 1.0, 0.0)
    tl.store(pages + layer, result.to(tl.int64), mask=exists)


def apportion(
    weights: torch.Tensor,
    total_pages: Sequence[int],
    max_pages: torch.Tensor,
    capacities: Sequence[int],
) -> torch.Tensor:
    """Divide totals of pages among the layers; arguments as for the operation.

    Grid ``(R,)``: a few dozen layers fit one program, and a single launch needs no synchronisation
    between the steps.
    """
    num_reqs, num_layers = weights.shape
    check_totals(num_layers, total_pages, capacities)
    pages = torch.empty(num_reqs, num_layers, dtype=torch.int64, device=weights.device)
    apportion_kernel[num_reqs,](
        weights.double().contiguous(),
        pages,
        to_device(total_pages, weights.device),
        max_pages.contiguous(),
        num_layers,
        LAYERS=triton.next_power_of_2(num_layers),
        CHUNK=CHUNK,
    )
    return pages
