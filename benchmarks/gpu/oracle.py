# SPDX-License-Identifier: Apache-2.0
"""The ``observe`` operation compared with the attention of xformers, an independent implementation.

    python -m benchmarks.gpu.oracle [--shapes 7b-gqa] [--tokens 2048 8192] [--json FILE]

With unit vectors as values, attention returns its own probabilities. Column sums and dense entries
follow from them without any softmax of this package. The times of both are reported as well:
xformers attends with the same queries to the same prompt, with contiguous keys and values;
``observe`` reads only the keys, but twice.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.kernels import (
    ATTENTION_SHAPES,
    OBSERVED,
    THRESHOLD,
    SyntheticPrompt,
    milliseconds,
)
from testing.cli import make_parser
from testing.results import Row, write_report
from vl_cache_vllm.ops import dispatch

BLOCK_SIZE = 16
COLUMN_TOLERANCE = 1e-3  # relative error of float32 sums of probabilities
DENSE_TOLERANCE = 1e-4  # fraction of entries that may differ: those at the threshold
# Query [1, Q, H, D], key and value [1, S, H, D]. Causal; the last query is at the last key.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _xformers() -> Any:
    try:
        from xformers.ops import fmha
    except ImportError as error:
        sys.exit(f"xformers is required ({error}): python -m pip install --no-deps xformers")
    return fmha


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of xformers."""
    fmha = _xformers()
    mask = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    return fmha.memory_efficient_attention(query, key, value, attn_bias=mask)


def probabilities(attention: Attention, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The probabilities of an attention function, obtained with unit vectors as values.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        key: ``[num_kv_heads, num_keys, head_size]``.

    Returns:
        float32 ``[num_heads, num_queries, num_keys]``.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads, num_keys, _ = key.shape
    key = key.transpose(0, 1).repeat_interleave(num_heads // num_kv_heads, 1)[None].float()
    unit = torch.eye(head_size, device=key.device)[:, None].expand(-1, num_heads, -1)
    parts = []
    for start in range(0, num_keys, head_size):
        width = min(head_size, num_keys - start)
        value = torch.zeros_like(key)
        value[0, start : start + width] = unit[:width]
        parts.append(attention(query[None].float(), key, value)[0, ..., :width])
    return torch.cat(parts, -1).transpose(0, 1)


def compare(prompt: SyntheticPrompt, attention: Attention) -> Row:
    """Compare ``observe`` of the first layer with sums of an attention's probabilities.

    Raises:
        AssertionError: if they differ.
    """
    shape, row = prompt.shape, prompt.row[: -prompt.kept_blocks]
    prompt.column_sums.zero_()
    prompt.dense_entries.zero_()
    prompt.observe()
    found = probabilities(attention, prompt.query, prompt.pool.read_keys(0, row))
    sums = found.unflatten(0, (shape.num_kv_heads, -1)).sum((1, 2))
    dense = (found >= THRESHOLD * found.amax(-1, keepdim=True)).sum()
    entries = shape.num_heads * OBSERVED * prompt.tokens
    result = {
        "tokens": prompt.tokens,
        "column_error": float(((prompt.column_sums[0] - sums).abs() / sums).max()),
        "dense_error": float((prompt.dense_entries[0] - dense).abs() / entries),
    }
    # In this form the comparison fails for NaN.
    agree = result["column_error"] <= COLUMN_TOLERANCE and result["dense_error"] <= DENSE_TOLERANCE
    assert agree, result
    return result


def attend_all(prompt: SyntheticPrompt) -> Callable[[], None]:
    """A function that attends from the queries to the whole prompt in all layers, with xformers."""
    fmha = _xformers()
    shape = prompt.shape
    group = shape.num_heads // shape.num_kv_heads
    query = prompt.query.view(1, OBSERVED, shape.num_kv_heads, group, shape.head_size)
    layers = torch.randn(
        *(shape.num_layers, 2, 1, prompt.tokens, shape.num_kv_heads, 1, shape.head_size),
        dtype=prompt.dtype,
        device=prompt.row.device,
    ).expand(-1, -1, -1, -1, -1, group, -1)

    def run() -> None:
        for key, value in layers:
            fmha.memory_efficient_attention(query, key, value)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    shapes = ["7b-mha", "7b-gqa"]
    parser.add_argument("--shapes", nargs="+", choices=sorted(ATTENTION_SHAPES), default=shapes)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    options = parser.parse_args(arguments)
    _xformers()
    if not torch.cuda.is_available():
        sys.exit("the attention of xformers needs a GPU")
    device = torch.device("cuda")
    rows = []
    for name in options.shapes:
        for tokens in options.tokens:
            prompt = SyntheticPrompt(ATTENTION_SHAPES[name], tokens, BLOCK_SIZE, device)
            with dispatch.use("triton"):
                row = {
                    "shape": name,
                    **compare(prompt, causal_attention),
                    "milliseconds": round(milliseconds(prompt.observe, device), 4),
                    "xformers_milliseconds": round(milliseconds(attend_all(prompt), device), 4),
                }
            rows.append(row)
            print(row, flush=True)
            del prompt
    if options.json:
        write_report(options.json, "benchmarks.gpu.oracle", arguments, rows=rows)


if __name__ == "__main__":
    main()
