# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.select.select` as one launch, a program per layer and KV head.

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

import torch
import triton
import triton.language as tl
from vl_cache_vllm.kernels.rank import ordered_bits

BLOCK = 1024  # tokens per iteration


@triton.jit
def _keys(
    scores,  # [num_tokens] float32, of one layer and KV head
    precedence,  # [num_tokens] int64, 32 bits used; not read without HAS_PRECEDENCE
    token,  # [BLOCK] int32, positions to load
    first_recent,  # scalar int64, position of the first recent token
    num_tokens,  # scalar int64, tokens that can be selected
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


# Compiled once for all prompts and ratios. The ratio has a type because Triton passes floats in 32
# bits by default, in which a tenth of 10 tokens is more than one token.
@triton.jit(do_not_specialize=["width", "max_kept"])
def select_kernel(
    scores,  # [num_layers, num_kv_heads, width] float32
    num_tokens_of,  # [num_layers] int64, tokens of each layer that can be selected
    kept_tokens,  # [num_layers] int64, budget of each layer in tokens
    precedence,  # [width] int64, 32 bits used; not read without HAS_PRECEDENCE
    positions,  # [num_layers, num_kv_heads, max_kept] int32, output: kept positions
    width,  # int, tokens
    max_kept,  # int, tokens
    recent_ratio: tl.float64,  # fraction of the budget for the most recent tokens
    HAS_PRECEDENCE: tl.constexpr,  # bool
    BLOCK: tl.constexpr,  # tokens per iteration
):
    """Select the tokens of one KV head. Grid ``(num_layers, num_kv_heads)``."""
    layer = tl.program_id(0).to(tl.int64)
    row = layer * tl.num_programs(1) + tl.program_id(1)
    scores += row * width
    num_tokens = tl.load(num_tokens_of + layer)
    positions += row * max_kept
    kept = tl.load(kept_tokens + layer)
    # As in the specification: round to nine decimals, then up.
    recent = tl.floor(kept.to(tl.float64) * recent_ratio * 1e9 + 0.5) / 1e9
    first_recent = num_tokens - tl.ceil(recent).to(tl.int64)
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

    num_equal = tl.zeros((), tl.int64)
    num_kept = tl.zeros((), tl.int64)
    for start in range(0, tl.where(kept > 0, num_tokens, 0), BLOCK):
        token = start + steps
        key = _keys(scores, precedence, token, first_recent, num_tokens, HAS_PRECEDENCE)
        exists = token < num_tokens
        equal = exists & (key == last)
        number = num_equal + tl.cumsum(equal.to(tl.int64), 0)  # from 1
        is_kept = (exists & (key > last)) | (equal & (number <= wanted))
        entry = num_kept + tl.cumsum(is_kept.to(tl.int64), 0) - 1
        tl.store(positions + entry, token.to(tl.int32), mask=is_kept & (entry < max_kept))
        num_equal += tl.sum(equal.to(tl.int64))
        num_kept += tl.sum(is_kept.to(tl.int64))


def select(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    """Select tokens by score; arguments as for the operation.

    Grid ``(num_layers, num_kv_heads)``: a program selects the tokens of one KV head.

    Scores must not be NaN, and precedences must fit 32 bits.
    """
    num_layers, num_kv_heads, width = scores.shape
    positions = torch.empty(
        num_layers, num_kv_heads, max_kept, dtype=torch.int32, device=scores.device
    )
    select_kernel[num_layers, num_kv_heads](
        scores.float().contiguous(),
        num_tokens.contiguous(),
        kept_tokens.contiguous(),
        scores if precedence is None else precedence.contiguous(),
        positions,
        width,
        max_kept,
        float(recent_ratio),
        HAS_PRECEDENCE=precedence is not None,
        BLOCK=BLOCK,
    )
    return positions
