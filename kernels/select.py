# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.select.select_all`, a program per layer and KV head.

One launch selects from all candidates without precedences, and one from those with them.

Each token gets an unsigned key whose order is the order of selection. A radix select finds the key
of the last kept token, eight bits per pass, without sorting. One more pass writes the positions of
the kept tokens in increasing order. The number of kept tokens is read on the device.

Example with 4-bit keys, two bits per pass, and 3 kept tokens::

    position           0     1     2     3     4     5
    key              0111  1010  0110  1001  0110  0011
    pass 1, first two bits: 10 twice, 01 three times, 00 once
        two keys are above 01, so the third key begins with 01 and is the first of those
    pass 2, last two bits of the keys 01..: 11 once, 10 twice
        the key of the last kept token is 0111
    kept: keys above 0111, then keys equal to it, until 3 are kept: positions 0, 1, 3
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vl_cache_vllm.kernels.rank import ordered_bits

from vl_cache_vllm.ops.device import to_device
from vl_cache_vllm.ops.select import Candidates

BLOCK = 1024  # tokens per iteration


@triton.jit
def _keys(
    scores,  # [num_tokens] float32, of one layer and KV head
    precedence,  # [num_tokens] int64, 32 bits used; not read without HAS_PRECEDENCE
    token,  # [BLOCK] int32, positions to load
    first_recent,  # scalar int32, position of the first recent token
    num_tokens,  # scalar int32, tokens that can be selected
    HAS_PRECEDENCE: tl.constexpr,  # bool
):
    """Unsigned keys in the order of selection, uint64 ``[BLOCK]``: the largest is kept first.

    The low 32 bits order by score, the high ones by precedence. Recent tokens get the largest key.
    """
    exists = token < num_tokens
    score = tl.load(scores + token, mask=exists, other=0.0)
    key = ordered_bits(score).to(tl.uint64)
    if HAS_PRECEDENCE:
        before = tl.load(precedence + token, mask=exists, other=0).to(tl.int32)
        key |= (before ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        highest = tl.full(key.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64)
    else:
        highest = tl.full(key.shape, 0xFFFFFFFF, tl.uint64)
    return tl.where(token >= first_recent, highest, key)


# Compiled once for all prompts and ratios.
@triton.jit(do_not_specialize_on_alignment=["candidates"])
def select_kernel(
    candidates,  # [requests, 9] int64, of _describe
    HAS_PRECEDENCE: tl.constexpr,  # bool, of all candidates
    BLOCK: tl.constexpr,  # tokens per iteration
):
    """Select the tokens of one KV head. Grid ``(most layers, num_kv_heads, requests)``.

    Of each request there are scores float32 ``[layers, num_kv_heads, width]``, int64 ``[layers]``
    the tokens of each layer that can be selected and those that are kept, precedences int64
    ``[width]``, and the output, kept positions int32 ``[layers, num_kv_heads, max_kept]``.
    """
    request = candidates + tl.program_id(2) * 9
    layer = tl.program_id(0).to(tl.int64)
    if layer >= tl.load(request):
        return
    row = layer * tl.num_programs(1) + tl.program_id(1)
    width = tl.load(request + 1)
    max_kept = tl.load(request + 2).to(tl.int32)
    scores = tl.load(request + 4).to(tl.pointer_type(tl.float32)) + row * width
    num_tokens = tl.load(tl.load(request + 5).to(tl.pointer_type(tl.int64)) + layer).to(tl.int32)
    precedence = tl.load(request + 7).to(tl.pointer_type(tl.int64))
    positions = tl.load(request + 8).to(tl.pointer_type(tl.int32)) + row * max_kept
    kept = tl.load(tl.load(request + 6).to(tl.pointer_type(tl.int64)) + layer).to(tl.int32)
    recent_ratio = tl.load(request + 3).to(tl.float64, bitcast=True)
    # As in the specification: round to nine decimals, then up.
    recent = tl.floor(kept.to(tl.float64) * recent_ratio * 1e9 + 0.5) / 1e9
    first_recent = num_tokens - tl.ceil(recent).to(tl.int32)
    steps = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    last = tl.zeros((), tl.uint64)  # leading digits of the last kept token's key
    wanted = kept  # tokens still to keep among those whose keys begin with these digits
    DIGITS: tl.constexpr = 8 if HAS_PRECEDENCE else 4
    for digit in tl.static_range(DIGITS):
        shift = 8 * (DIGITS - 1 - digit)
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, num_tokens, BLOCK):
            token = start + steps
            key = _keys(scores, precedence, token, first_recent, num_tokens, HAS_PRECEDENCE)
            leads = (token < num_tokens) & (((key >> shift) >> 8) == last)
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=leads)
        above = tl.sum(counts) - tl.cumsum(counts, 0)
        is_last = (above < wanted) & (wanted <= above + counts)
        last = (last << 8) | tl.sum(tl.where(is_last, bins, 0)).to(tl.uint64)
        wanted -= tl.sum(tl.where(is_last, above, 0))

    num_equal = tl.zeros((), tl.int32)
    num_kept = tl.zeros((), tl.int32)
    for start in range(0, tl.where(kept > 0, num_tokens, 0), BLOCK):
        token = start + steps
        key = _keys(scores, precedence, token, first_recent, num_tokens, HAS_PRECEDENCE)
        exists = token < num_tokens
        equal = exists & (key == last)
        number = num_equal + tl.cumsum(equal.to(tl.int32), 0)  # from 1
        is_kept = (exists & (key > last)) | (equal & (number <= wanted))
        entry = num_kept + tl.cumsum(is_kept.to(tl.int32), 0) - 1
        tl.store(positions + entry, token.to(tl.int32), mask=is_kept & (entry < max_kept))
        num_equal += tl.sum(equal.to(tl.int32))
        num_kept += tl.sum(is_kept.to(tl.int32))


def _describe(one: Candidates, positions: torch.Tensor) -> tuple[list[int], list[torch.Tensor]]:
    """Candidates as the kernel reads them, 9 integers, and the tensors that these point to.

    Args:
        one: the candidates.
        positions: the output.
    """
    tensors = [
        one.scores.float().contiguous(),
        one.num_tokens.long().contiguous(),
        one.kept_tokens.long().contiguous(),
        one.scores if one.precedence is None else one.precedence.long().contiguous(),
        positions,
    ]
    assert all(tensor.device == positions.device for tensor in tensors)
    num_layers, _, width = one.scores.shape
    ratio_bits = struct.unpack("q", struct.pack("d", one.recent_ratio))[0]
    numbers = [num_layers, width, one.max_kept, ratio_bits, *(t.data_ptr() for t in tensors)]
    return numbers, tensors


def select_all(candidates: Sequence[Candidates]) -> list[torch.Tensor]:
    """Select tokens by score; arguments as for the operation.

    Grid ``(most layers, num_kv_heads, requests)``: a program selects the tokens of one KV head.
    Integers and addresses go to the device in one copy.

    Scores must not be NaN, and precedences must fit 32 bits. Candidates with precedences and those
    without take a launch each.
    """
    result = [
        torch.empty(
            *one.scores.shape[:2], one.max_kept, dtype=torch.int32, device=one.scores.device
        )
        for one in candidates
    ]
    for has_precedence in (False, True):
        pairs = [
            pair
            for pair in zip(candidates, result, strict=True)
            if (pair[0].precedence is not None) == has_precedence
        ]
        if not pairs:
            continue
        described = [_describe(*pair) for pair in pairs]
        device = pairs[0][1].device
        num_layers = max(len(positions) for _, positions in pairs)
        select_kernel[num_layers, pairs[0][1].shape[1], len(pairs)](
            to_device([number for numbers, _ in described for number in numbers], device),
            HAS_PRECEDENCE=has_precedence,
            BLOCK=BLOCK,
        )
    return result


def select(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    """`select_all` for the layers of one request; arguments as for the operation."""
    one = Candidates(scores, num_tokens, kept_tokens, float(recent_ratio), max_kept, precedence)
    return select_all([one])[0]
