# SPDX-License-Identifier: Apache-2.0
"""How vLLM's CPU kernels order the elements of a page, found by experiment."""

import torch
from vllm import _custom_ops as ops

from vl_cache_vllm.attention.per_layer import number_type
from vl_cache_vllm.ops.page_pool import PagePacking


def derive_packing(
    isa: str, block_size: int, head_size: int, dtype: torch.dtype, cache_dtype: str = "auto"
) -> PagePacking:
    """Find out how a kernel orders a page: write numbered tokens and read the page back.

    Args:
        isa: instruction set of the kernel.
        block_size, head_size: sizes of the page.
        dtype: type of new keys and values.
        cache_dtype: vLLM's name of the cache's type.

    Raises:
        ValueError: if the order is no permutation of the page, so that tokens cannot be evicted.
    """
    cells = block_size * head_size
    stored = number_type(cache_dtype)
    base = 128 if stored is None else 8  # the largest base whose digits the type holds exactly
    numbers = torch.arange(cells).view(block_size, 1, head_size)
    keys, values = torch.zeros(cells, dtype=torch.int64), torch.zeros(cells, dtype=torch.int64)
    weight = 1
    while weight < cells:  # write and read one digit of the numbers at a time
        empty = dtype if stored is None else torch.uint8
        cache = torch.zeros(1, 1, 2 * block_size, head_size, dtype=empty)
        key_cache, value_cache = cache.chunk(2, dim=2)
        token = (numbers // weight % base).to(dtype)
        ops.cpu_attn_reshape_and_cache(
            token,
            token,
            key_cache,
            value_cache,
            torch.arange(block_size),
            isa,
            kv_cache_dtype=cache_dtype,
        )
        for found, written in ((keys, key_cache), (values, value_cache)):
            digits = written.reshape(-1) if stored is None else written.reshape(-1).view(stored)
            found += weight * digits.float().long()
        weight *= base
    everything = torch.arange(cells)
    for name, cell in (("K", keys), ("V", values)):
        if not torch.equal(cell.sort().values, everything):
            raise ValueError(
                f"KV compression cannot read the {name} cache packing of vLLM's CPU attention "
                f"(instruction set {isa}, block size {block_size}, head size {head_size}, {dtype})"
            )
    shape = (block_size, head_size)
    # cell[offset] is the number stored there; invert it.
    return PagePacking(keys.argsort().view(shape), cells + values.argsort().view(shape))
