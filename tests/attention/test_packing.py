# SPDX-License-Identifier: Apache-2.0
"""Deriving the page packing of vLLM's CPU kernels by using those kernels."""

import pytest
import torch
from vllm import _custom_ops as ops

from vl_cache_vllm.attention.cpu_packing import derive_packing, number_type
from vl_cache_vllm.ops.page_pool import PagePool

ISAS = ["vec", "vec16", *(["amx"] if torch.cpu._is_amx_tile_supported() else [])]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [
    pytest.param(isa, dtype, head_size, block_size, id=f"{isa}-{name}-d{head_size}-b{block_size}")
    for isa in ISAS
    for name, dtype in DTYPES.items()
    for head_size in (32, 64, 80, 128)
    for block_size in (32, 64, 128)
    # vLLM gives head sizes that are no multiple of 32 to vec16 alone, and amx only bf16.
    if (isa == "vec16" or head_size % 32 == 0) and (isa != "amx" or dtype is torch.bfloat16)
]


@pytest.mark.parametrize(("isa", "dtype", "head_size", "block_size"), CASES)
def test_tokens_written_by_the_kernel_are_read_back(
    isa: str, dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    num_blocks, num_kv_heads, num_tokens = 5, 2, 2 * block_size + 17
    generator = torch.Generator().manual_seed(0)
    key, value = (
        torch.randn(num_tokens, num_kv_heads, head_size, generator=generator).to(dtype)
        for _ in range(2)
    )
    row = torch.tensor([3, 0, 4])
    positions = torch.arange(num_tokens)
    slots = row[positions // block_size] * block_size + positions % block_size
    # As CPUAttentionImpl does: [num_blocks, K, 2 * N, D] with K and V as the two halves.
    cache = torch.zeros(num_blocks, num_kv_heads, 2 * block_size, head_size, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)

    pool = PagePool(
        cache.view(num_blocks, num_kv_heads, -1),
        derive_packing(isa, block_size, head_size, dtype),
        num_layers=1,
        layer_stride=num_blocks,
        block_stride=1,
    )
    keys, values = pool.read_keys(row), pool.read_values(row)  # of one layer: pages are blocks
    assert torch.equal(keys[:, :num_tokens], key.transpose(0, 1))
    assert torch.equal(values[:, :num_tokens], value.transpose(0, 1))
    assert not keys[:, num_tokens:].any()
    assert not values[:, num_tokens:].any()


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM needs AVX-512 for it")
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "vec16"])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_bytes_of_an_fp8_cache_are_read_as_numbers(isa: str, cache_dtype: str) -> None:
    num_blocks, block_size, head_size, scale = 3, 32, 64, 0.5
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 70, 2, head_size, generator=generator).bfloat16()
    cache = torch.zeros(num_blocks, 2, 2 * block_size, head_size, dtype=torch.uint8)
    ops.cpu_attn_reshape_and_cache(
        key, value, *cache.chunk(2, dim=2), torch.arange(70), isa, scale, scale, cache_dtype
    )
    pool = PagePool(
        cache.view(num_blocks, 2, -1),
        derive_packing(isa, block_size, head_size, torch.bfloat16, cache_dtype),
        num_layers=1,
        layer_stride=num_blocks,
        block_stride=1,
        number_type=number_type(cache_dtype),
    )
    row = torch.arange(num_blocks)
    tolerance = 2.0 ** (-2 if cache_dtype == "fp8_e5m2" else -3)  # half a step of the mantissa
    for written, read in ((key, pool.read_keys(row)), (value, pool.read_values(row))):
        found = scale * read[:, :70].float()
        torch.testing.assert_close(
            found, written.transpose(0, 1).float(), rtol=tolerance, atol=1e-2
        )


@pytest.mark.parametrize(("isa", "dtype", "head_size", "block_size"), CASES)
def test_packing_covers_the_page_once(
    isa: str, dtype: torch.dtype, head_size: int, block_size: int
) -> None:
    packing = derive_packing(isa, block_size, head_size, dtype)
    assert packing.key_index.shape == packing.value_index.shape == (block_size, head_size)
    cells = torch.cat((packing.key_index.flatten(), packing.value_index.flatten()))
    assert torch.equal(cells.sort().values, torch.arange(2 * block_size * head_size))


def test_vec_stores_keys_transposed() -> None:
    """docs/design.md, "What the design relies on in vLLM": K of "vec" is transposed."""
    packing = derive_packing("vec", 32, 64, torch.float32)
    token, dim = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    assert torch.equal(packing.key_index, dim * 32 + token)
    assert torch.equal(packing.value_index, 32 * 64 + token * 64 + dim)


@pytest.mark.parametrize("broken", ["K", "V"])
def test_a_packing_that_is_no_permutation_is_refused(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    write = ops.cpu_attn_reshape_and_cache

    def lossy(key, value, key_cache, value_cache, *arguments, **options) -> None:
        write(key, value, key_cache, value_cache, *arguments, **options)
        cache = key_cache if broken == "K" else value_cache
        cells = cache.view(-1)
        cells[7] = cells[8]

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", lossy)
    with pytest.raises(ValueError, match=f"cannot read the {broken} cache packing") as error:
        derive_packing("vec", 32, 64, torch.bfloat16)
    message = str(error.value)
    for detail in ("instruction set", "vec", "block size 32", "head size 64", "torch.bfloat16"):
        assert detail in message


def test_a_kernel_that_writes_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", lambda *args, **options: None)
    with pytest.raises(ValueError, match="cannot read the K cache packing"):
        derive_packing("vec", 32, 64, torch.float32)
