# SPDX-License-Identifier: Apache-2.0
"""`vl_cache_vllm.ops.look_ahead.look_ahead` as one launch, a program per layer and KV head.

A program scans one frame of tokens after another, and carries the decayed maximum from each to the
next. Scores are read once and written once.
"""

import torch
import triton
import triton.language as tl

from vl_cache_vllm.ops.decay import decay_frame, inherits_nothing


@triton.jit
def _larger(
    a,  # float64
    b,  # float64
):
    """The operator of the scan."""
    return tl.maximum(a, b)


# Compiled once for all prompts, and for all decay lengths of at least 0.86 tokens.
@triton.jit(
    do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["scores", "inherited"]
)
def look_ahead_kernel(
    scores,  # [rows, num_tokens] float32, not negative
    inherited,  # [rows, num_tokens] float32, output
    growth,  # [FRAME] float64, exp(i / length)
    shrinkage,  # [FRAME] float64, exp(-i / length)
    num_tokens,  # int
    of_frame: tl.float64,  # exp(-FRAME / length)
    FRAME: tl.constexpr,  # tokens of a frame, a power of 2
):
    """The decayed running maximum of one row. Grid ``(rows,)``."""
    first = tl.program_id(0).to(tl.int64) * num_tokens
    steps = tl.arange(0, FRAME)
    grows, shrinks = tl.load(growth + steps), tl.load(shrinkage + steps)
    best = tl.zeros((), tl.float64)  # of the frames before, in this frame's scale
    for start in range(0, num_tokens, FRAME):
        token = start + steps
        exists = token < num_tokens
        score = tl.load(scores + first + token, mask=exists, other=0.0).to(tl.float64)
        running = tl.maximum(tl.associative_scan(score * grows, 0, _larger), best)
        tl.store(inherited + first + token, (running * shrinks).to(tl.float32), mask=exists)
        best = tl.max(running, 0) * of_frame


def look_ahead(scores: torch.Tensor, length: float) -> torch.Tensor:
    """Inherit scores with decay; arguments as for the operation.

    Grid ``(rows,)``: a program scans all tokens of a layer and KV head.
    """
    if inherits_nothing(length):
        return scores.clone()
    decay = decay_frame(length, scores.device)
    scores = scores.float().contiguous()
    inherited = torch.empty_like(scores)
    num_tokens = scores.shape[-1]
    look_ahead_kernel[(scores.numel() // num_tokens,)](
        scores,
        inherited,
        decay.growth,
        decay.shrinkage,
        num_tokens,
        decay.of_frame,
        FRAME=decay.size,
    )
    return inherited
