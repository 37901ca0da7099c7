# SPDX-License-Identifier: Apache-2.0
"""Scheduler metadata that FlashAttention 3 made for other lengths divides the keys rightly.

Layers of evicted requests hold fewer keys than the logical length for which vLLM made the metadata.
The metadata fixes the number of splits; every split derives its blocks from the length that it
reads (docs/adr/0013).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.helpers import flash_attention as fa

LENGTHS = st.integers(0, 600)


@examples(300)
@given(
    rows=st.lists(st.tuples(LENGTHS, st.floats(0, 1)), min_size=1, max_size=40),
    num_heads=st.sampled_from([1, 2, 8, 32]),
    num_splits=st.sampled_from([0, 1, 3, 32]),
)
def test_every_key_is_visited_once_for_any_shorter_length(
    rows: list[tuple[int, float]], num_heads: int, num_splits: int
) -> None:
    logical = [length for length, _ in rows]
    actual = [round(length * share) for length, share in rows]
    static = fa.static_splits_of(num_splits, max(logical))
    splits = fa.dynamic_splits(logical, [1] * len(rows), num_heads, static)
    for length, number in zip(actual, splits, strict=True):
        assert 1 <= number <= static, "the buffers of partial outputs have no such split"
        visited = [b for split in range(number) for b in fa.key_blocks(length, split, number)]
        assert visited == [*range(fa.cdiv(length, fa.BLOCK_KEYS))]


def call(
    lengths: list[int],
    queries: list[int],
    metadata: torch.Tensor | None,
    num_splits: int,
    longest: int,
    scattered: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stand-in's output for random queries and pages, and plain attention's."""
    generator = torch.Generator().manual_seed(len(lengths))
    width = fa.cdiv(longest, 16) + 1
    pages = torch.randn(len(lengths) * width, 16, 2, 2 * 8, generator=generator)
    key, value = pages.split(8, -1)
    order = (
        torch.randperm(len(pages), generator=generator) if scattered else torch.arange(len(pages))
    )
    table = order.int().view(len(lengths), width)
    query = torch.randn(sum(queries), 4, 8, generator=generator)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    out = torch.full_like(query, torch.nan)
    fa.FlashAttention().flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=starts,
        max_seqlen_q=max(queries),
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_k=longest,
        softmax_scale=0.3,
        causal=True,
        block_table=table,
        scheduler_metadata=metadata,
        num_splits=num_splits,
        alibi_slopes=None,
        s_aux=None,
        mask_mod=None,
    )
    expected = torch.zeros_like(query)
    for row, length in enumerate(lengths):
        start, end = int(starts[row]), int(starts[row + 1])
        keys, values = (
            x[table[row].long()].flatten(0, 1)[:length].repeat_interleave(2, 1).transpose(0, 1)
            for x in (key, value)
        )
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(length - end + start)
        found = torch.nn.functional.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            scale=0.3,
        )
        expected[start:end] = found[0].transpose(0, 1)
    return out, expected


def metadata_for(lengths: list[int], queries: list[int], num_splits: int) -> torch.Tensor:
    return fa.FlashAttention().get_scheduler_metadata(
        batch_size=len(lengths),
        max_seqlen_k=max(lengths),
        num_heads_kv=2,
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        num_splits=num_splits,
    )


@pytest.mark.parametrize("num_splits", [0, 32])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1], ids=["logical", "half", "tenth"])
def test_outputs_with_borrowed_metadata(num_splits: int, scale: float) -> None:
    """Whole requests beside evicted ones, decodes beside a prefill, and rows of padding."""
    logical, queries = [400, 37, 250, 90, 300], [1, 1, 1, 20, 1]
    actual = [max(q, round(scale * n)) for n, q in zip(logical, queries, strict=True)]
    actual[2] = logical[2]  # not evicted
    metadata = metadata_for(logical, queries, num_splits)
    assert metadata[9:14].max() > 1, "nothing is split"
    found, expected = call(actual, queries, metadata, num_splits, max(logical))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padded_rows_are_not_read() -> None:
    logical, queries = [200, 64, 0, 0], [1, 1, 0, 0]
    metadata = metadata_for(logical, queries, 32)
    found, expected = call([48, 64, 0, 0], queries, metadata, 32, 200)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_split_beyond_the_buffers_is_an_error() -> None:
    metadata = metadata_for([400], [1], 32)
    metadata[5] = 33
    with pytest.raises(IndexError):
        call([400], [1], metadata, 32, 400)


def test_keys_left_out_are_seen() -> None:
    """If metadata held key lengths, as it does not, shorter layers would be wrong."""
    metadata = metadata_for([400], [1], 32)
    found, expected = call([400], [1], metadata, 32, 400)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    original = fa.key_blocks
    try:
        fa.key_blocks = lambda length, split, number: original(200, split, number)
        found, _ = call([400], [1], metadata, 32, 400)
    finally:
        fa.key_blocks = original
    assert not torch.allclose(found, expected, atol=1e-2)
