# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.rank` as one launch, a program per layer and KV head.

A stable radix sort from the lowest digit to the highest, four bits per pass. An item is a key and
the position that it comes from; the sorted order of the items is the rank. A pass counts the items
of each digit, which gives the place of the digit's first item, then moves each item behind the
items of its digit that came before it.

Example of a pass with two-bit digits::

    digit of the items      2  0  3  0  2
    items of digits 0 to 3  2  0  2  1
    first place of each     0  2  2  4
    new place               2  0  4  1  3

Both buffers of a pass lie in global memory. A barrier of the program stands between the stores of
one pass and the loads of the next.
"""

import torch
import triton
import triton.language as tl

BLOCK = 256  # items per iteration; with more, registers do not hold the counts


@triton.jit
def ordered_bits(
    score,  # [n] float32, not NaN
):
    """Unsigned integers in the order of the scores, uint32 ``[n]``."""
    score = tl.where(score == 0, 0.0, score)  # 0.0 and -0.0 are equal
    bits = score.to(tl.int32, bitcast=True)
    # With the sign bit flipped, or all bits of a negative number, the patterns of floats have the
    # order of unsigned integers.
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _pass(
    source,  # [num_tokens] int64, items
    target,  # [num_tokens] int64, output: items in the order of the digit
    shift,  # scalar int32, bits below the digit
    num_tokens,  # int
    BITS: tl.constexpr,  # bits of a digit
    BLOCK: tl.constexpr,  # items per iteration
):
    """One pass of the sort."""
    DIGITS: tl.constexpr = 1 << BITS
    digits, steps = tl.arange(0, DIGITS), tl.arange(0, BLOCK)
    counts = tl.zeros((DIGITS,), tl.int32)
    for start in range(0, num_tokens, BLOCK):
        exists = start + steps < num_tokens
        item = tl.load(source + start + steps, mask=exists, other=0)
        digit = ((item >> shift) & (DIGITS - 1)).to(tl.int32)
        counts += tl.histogram(digit, DIGITS, mask=exists)
    first = tl.cumsum(counts, 0) - counts
    for start in range(0, num_tokens, BLOCK):
        exists = start + steps < num_tokens
        item = tl.load(source + start + steps, mask=exists, other=0)
        digit = ((item >> shift) & (DIGITS - 1)).to(tl.int32)
        is_digit = (exists[:, None] & (digit[:, None] == digits[None, :])).to(tl.int32)
        number = tl.cumsum(is_digit, 0)  # from 1, of the digit's items in this block
        place = tl.sum(is_digit * (number + (first - 1)[None, :]), 1)
        tl.store(target + place, item, mask=exists)
        first += tl.sum(is_digit, 0)
    tl.debug_barrier()


# Compiled once for all prompts.
@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=["scores", "ranks", "merged", "share"],
)
def rank_kernel(
    scores,  # [rows, num_tokens] float32, not NaN
    items,  # [rows, 2, num_tokens] int64, buffers
    ranks,  # [rows, num_tokens] int64, output; not written with MERGES
    merged,  # [rows, num_tokens] float32, raised; not used without MERGES
    share,  # [] float32, of this ranking; not read without MERGES
    num_tokens,  # int
    MERGES: tl.constexpr,  # bool
    BITS: tl.constexpr,  # bits of a digit
    BLOCK: tl.constexpr,  # items per iteration
):
    """Sort one row, and write the ranks or what they raise. Grid ``(rows,)``."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * num_tokens
    items += 2 * row * num_tokens
    ranks += row * num_tokens
    merged += row * num_tokens
    steps = tl.arange(0, BLOCK)
    for start in range(0, num_tokens, BLOCK):
        token = start + steps
        exists = token < num_tokens
        key = ~ordered_bits(tl.load(scores + token, mask=exists, other=0.0))
        tl.store(items + token, (key.to(tl.int64) << 32) | token.to(tl.int64), mask=exists)
    tl.debug_barrier()
    for shift in range(32, 64, 2 * BITS):
        _pass(items, items + num_tokens, shift, num_tokens, BITS, BLOCK)
        _pass(items + num_tokens, items, shift + BITS, num_tokens, BITS, BLOCK)
    if MERGES:
        fraction = tl.load(share)
    for start in range(0, num_tokens, BLOCK):
        place = start + steps
        exists = place < num_tokens
        position = tl.load(items + place, mask=exists, other=0) & 0xFFFFFFFF
        if MERGES:
            value = tl.div_rn(1.0, tl.div_rn((place + 1).to(tl.float32), fraction))
            before = tl.load(merged + position, mask=exists, other=0.0)
            tl.store(merged + position, tl.maximum(before, value), mask=exists)
        else:
            tl.store(ranks + position, place.to(tl.int64), mask=exists)


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Rank the tokens; arguments as for the operation. Scores must not be NaN."""
    ranks = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    _sort(scores, ranks, None, None)
    return ranks


def merge_ranking(merged: torch.Tensor, scores: torch.Tensor, share: torch.Tensor) -> None:
    """Raise entries by rank; arguments as for the operation. Scores must not be NaN."""
    assert merged.is_contiguous() and merged.dtype == share.dtype == torch.float32
    _sort(scores, None, merged, share)


def _sort(
    scores: torch.Tensor,
    ranks: torch.Tensor | None,
    merged: torch.Tensor | None,
    share: torch.Tensor | None,
) -> None:
    """One launch with the grid ``(rows,)``: a program sorts a layer and KV head.

    The buffers take 16 bytes for each score.
    """
    num_tokens = scores.shape[-1]
    rows = scores.numel() // num_tokens
    scores = scores.float().contiguous()
    items = torch.empty(rows, 2, num_tokens, dtype=torch.int64, device=scores.device)
    # Any tensor will do for those that the kernel does not use.
    rank_kernel[(rows,)](
        scores,
        items,
        items if ranks is None else ranks,
        scores if merged is None else merged,
        scores if share is None else share,
        num_tokens,
        MERGES=merged is not None,
        BITS=4,
        BLOCK=BLOCK,
    )
