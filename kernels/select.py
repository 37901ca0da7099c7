# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.select.select` in one launch, a program per layer and KV head.

A radix select finds the score of the last token that is kept, eight bits at a time, with the number
of kept tokens read on the device; then the kept positions are written in their order.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _keys(
    scores,
    precedence,
    token,
    first_recent,
    num_tokens,
    HAS_PRECEDENCE: tl.constexpr,
):
    """Unsigned numbers that order tokens as they shall be kept, int64 bit patterns of 64 bits."""
    exists = token < num_tokens
    score = tl.load(scores + token, mask=exists, other=0.0)
    score = tl.where(score == 0, 0.0, score)  # 0.0 and -0.0 are equal
    bits = score.to(tl.int32, bitcast=True)
    # Floats, negative ones turned round, are ordered as unsigned integers.
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True).to(tl.uint64)
    if HAS_PRECEDENCE:
        before = tl.load(precedence + token, mask=exists, other=0).to(tl.int32)
        key |= (before ^ -2147483648).to(tl.uint32, bitcast=True).to(tl.uint64) << 32
        highest = tl.full(key.shape, 0xFFFFFFFFFFFFFFFF, tl.uint64)
    else:
        highest = tl.full(key.shape, 0xFFFFFFFF, tl.uint64)
    return tl.where(token >= first_recent, highest, key)


# One compilation serves all prompts and ratios. A number without a type would come in 32 bits, in
# which a tenth of 10 tokens is more than one.
@triton.jit(do_not_specialize=["num_tokens", "max_kept"])
def select_kernel(
    scores,
    kept_tokens,
    precedence,
    positions,
    num_tokens,
    max_kept,
    recent_ratio: tl.float64,
    HAS_PRECEDENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(num_layers, num_kv_heads)``."""
    layer = tl.program_id(0).to(tl.int64)
    row = layer * tl.num_programs(1) + tl.program_id(1)
    scores += row * num_tokens
    positions += row * max_kept
    kept = tl.load(kept_tokens + layer)
    # As the specification does: rounded to nine decimals, then up.
    share = tl.floor(kept.to(tl.float64) * recent_ratio * 1e9 + 0.5) / 1e9
    first_recent = num_tokens - tl.ceil(share).to(tl.int64)
    steps = tl.arange(0, BLOCK)
    bins = tl.arange(0, 256)

    last = tl.zeros((), tl.uint64)  # the leading digits of the last kept token's key
    wanted = kept  # of the tokens whose keys begin with these digits
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
        place = num_equal + tl.cumsum(equal.to(tl.int64), 0)  # from 1
        is_kept = (exists & (key > last)) | (equal & (place <= wanted))
        entry = num_kept + tl.cumsum(is_kept.to(tl.int64), 0) - 1
        tl.store(positions + entry, token.to(tl.int64), mask=is_kept & (entry < max_kept))
        num_equal += tl.sum(equal.to(tl.int64))
        num_kept += tl.sum(is_kept.to(tl.int64))


def select(
    scores: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the operation; scores are finite or infinite, precedences of 32 bits."""
    num_layers, num_kv_heads, num_tokens = scores.shape
    positions = torch.zeros(
        num_layers, num_kv_heads, max_kept, dtype=torch.int64, device=scores.device
    )
    select_kernel[num_layers, num_kv_heads](
        scores.float().contiguous(),
        kept_tokens.contiguous(),
        scores if precedence is None else precedence.contiguous(),
        positions,
        num_tokens,
        max_kept,
        float(recent_ratio),
        HAS_PRECEDENCE=precedence is not None,
        BLOCK=BLOCK,
    )
    return positions
