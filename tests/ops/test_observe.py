# SPDX-License-Identifier: Apache-2.0
"""Observation against a query-by-query, head-by-head softmax."""

import importlib
import math

import pytest
import torch

from tests.helpers.pools import PAGE_ORDERS, key_of, make_pool, page_number
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.ops.observe import (
    AttentionParams,
    RequestObservation,
    elite_queries,
    observe,
    observe_layers,
)
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool

pytestmark = pytest.mark.usefixtures("implementation")

THRESHOLD = 0.01
PARAMS = AttentionParams(scale=0.2, softcap=0.0, threshold=THRESHOLD)


def naive_observe(
    query: torch.Tensor,
    key: torch.Tensor,
    first_position: int,
    scale: float,
    threshold: float,
    softcap: float,
) -> tuple[torch.Tensor, int]:
    """Column sums ``[num_kv_heads, num_keys]`` and dense entries, in float64."""
    num_queries, num_heads, _ = query.shape
    num_kv_heads = key.shape[0]
    group = num_heads // num_kv_heads
    sums = torch.zeros(num_kv_heads, first_position + num_queries, dtype=torch.float64)
    dense = 0
    for q in range(num_queries):
        position = first_position + q
        for head in range(num_heads):
            kv_head = head // group
            logits = []
            for j in range(position + 1):
                logit = scale * float(query[q, head].double() @ key[kv_head, j].double())
                logits.append(softcap * math.tanh(logit / softcap) if softcap else logit)
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            total = math.fsum(weights)
            for j, weight in enumerate(weights):
                sums[kv_head, j] += weight / total
                dense += weight >= threshold  # the row maximum's weight is 1
    return sums, dense


def random_case(
    num_queries: int,
    num_keys: int,
    num_kv_heads: int,
    group: int,
    head_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_queries, num_kv_heads * group, head_size, generator=generator)
    key = torch.randn(num_kv_heads, num_keys, head_size, generator=generator)
    return (2 * query).to(dtype), key.to(dtype)


def run(
    query: torch.Tensor,
    key: torch.Tensor,
    first_position: int,
    *,
    scale: float = 0.2,
    threshold: float = THRESHOLD,
    softcap: float = 0.0,
    columns: int | None = None,
) -> tuple[torch.Tensor, int]:
    columns = first_position + query.shape[0] if columns is None else columns
    sums = torch.zeros(key.shape[0], columns)
    dense = torch.zeros((), dtype=torch.int64)
    params = AttentionParams(scale, softcap, threshold)
    observe(query, key, first_position, params, sums, dense)
    return sums, int(dense)


@pytest.mark.parametrize("group", [1, 3, 4], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("softcap", [0.0, 2.5], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("num_queries", "first_position"),
    [(1, 0), (1, 62), (7, 56), (13, 0)],
    ids=["only-token", "last-token", "post-vision", "whole-prompt"],
)
def test_equals_softmax_row_by_row(
    group: int, softcap: float, dtype: torch.dtype, num_queries: int, first_position: int
) -> None:
    query, key = random_case(num_queries, 63, 2, group, 80, dtype)
    sums, dense = run(query, key, first_position, softcap=softcap)
    expected, expected_dense = naive_observe(query, key, first_position, 0.2, THRESHOLD, softcap)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)
    assert dense == expected_dense


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("block_size", [5, 16])
def test_keys_in_pages(page_order: str, packing: str, block_size: int) -> None:
    pool = make_pool(page_order, packing, num_blocks=17, block_size=block_size, head_size=12)
    row = torch.randperm(17, generator=torch.Generator().manual_seed(2))[:13].int()
    num_queries, first = 6, 9 * block_size + 2
    query, _ = random_case(num_queries, 1, 2, 3, 12)
    sums, dense = torch.zeros(2, first + num_queries), torch.zeros((), dtype=torch.int64)
    observe(query, PagedKeys.of_blocks(pool, 1, row), first, PARAMS, sums, dense)
    key = torch.stack(
        [
            torch.stack(
                [key_of(pool, page_number(pool, 1, block), head, token) for head in range(2)]
            )
            for block in row.tolist()
            for token in range(block_size)
        ],
        1,
    )
    expected, expected_dense = naive_observe(query, key, first, 0.2, THRESHOLD, 0.0)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)
    assert int(dense) == expected_dense


def test_queries_have_weights() -> None:
    query, key = random_case(9, 63, 2, 3, 80)
    weights = torch.rand(2, 9, generator=torch.Generator().manual_seed(6))
    sums, dense = torch.zeros(2, 63), torch.zeros((), dtype=torch.int64)
    observe(query, key, 54, PARAMS, sums, dense, weights)
    one_by_one = torch.zeros(2, 63, dtype=torch.float64)
    for q in range(9):
        alone, _ = naive_observe(query[q : q + 1], key, 54 + q, 0.2, THRESHOLD, 0.0)
        one_by_one[:, : 55 + q] += weights[:, q, None] * alone
    torch.testing.assert_close(sums.double(), one_by_one, rtol=1e-5, atol=1e-6)
    assert int(dense) == run(query, key, 54)[1]


def naive_maxima(query: torch.Tensor, key: torch.Tensor, first_position: int) -> torch.Tensor:
    """Column maxima ``[num_kv_heads, num_keys]`` in float64, from one query and head at a time."""
    num_kv_heads = key.shape[0]
    group = query.shape[1] // num_kv_heads
    maxima = torch.zeros(num_kv_heads, first_position + query.shape[0], dtype=torch.float64)
    for q in range(query.shape[0]):
        for head in range(group):
            one = query[q : q + 1, head::group]
            alone, _ = naive_observe(one, key, first_position + q, 0.2, THRESHOLD, 0.0)
            seen = maxima[:, : alone.shape[1]]
            torch.maximum(seen, alone, out=seen)
    return maxima


@pytest.mark.parametrize("group", [1, 3], ids=lambda g: f"group{g}")
@pytest.mark.parametrize("num_queries", [1, 7, 40])
def test_maxima(num_queries: int, group: int) -> None:
    query, key = random_case(num_queries, 63, 2, group, 80)
    first = 63 - num_queries
    maxima = torch.full((3, 2, 70), -1.0)
    maxima[1] = 0
    sums, dense = torch.zeros(2, 63), torch.zeros((), dtype=torch.int64)
    observe(query, key, first, PARAMS, sums, dense, column_maxima=maxima[1])
    expected = naive_maxima(query, key, first)
    torch.testing.assert_close(maxima[1, :, :63].double(), expected, rtol=1e-5, atol=1e-6)
    assert not maxima[1, :, 63:].any()
    assert (maxima[::2] == -1).all()
    plain, plain_dense = run(query, key, first)
    assert torch.equal(sums, plain)
    assert int(dense) == plain_dense


def test_maxima_are_raised_and_have_no_weights() -> None:
    query, key = random_case(9, 63, 2, 3, 80)
    before = torch.full((2, 63), 0.1)
    sums, dense = torch.zeros(2, 63), torch.zeros((), dtype=torch.int64)
    weights = torch.zeros(2, 9)
    weights[:, -1] = 1
    observe(query, key, 54, PARAMS, sums, dense, weights, before)
    expected = naive_maxima(query, key, 54).clamp(min=0.1)
    assert (expected == 0.1).any()
    assert (expected > 0.1).any()
    torch.testing.assert_close(before.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums, run(query[-1:], key, 62)[0])


@pytest.mark.parametrize("chunks", [(13, 24), (1, 36), (36, 1), (5, 1, 20, 11)], ids=str)
def test_maxima_of_chunks(chunks: tuple[int, ...]) -> None:
    query, key = random_case(37, 63, 2, 3, 80)
    dense, sums = torch.zeros((), dtype=torch.int64), torch.zeros(2, 63)
    whole, parts = torch.zeros(2, 63), torch.zeros(2, 63)
    observe(query, key, 26, PARAMS, sums, dense, column_maxima=whole)
    start = 0
    for length in chunks:
        part = query[start : start + length]
        observe(part, key, 26 + start, PARAMS, sums, dense, column_maxima=parts)
        start += length
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("num_keys", [1, 64, 65, 500])
def test_sizes(head_size: int, num_keys: int) -> None:
    """Whole and broken tiles, keys split over several programs."""
    num_queries = min(5, num_keys)
    query, key = random_case(num_queries, num_keys, 1, 2, head_size, torch.bfloat16)
    sums, dense = run(query, key, num_keys - num_queries, scale=head_size**-0.5)
    expected, expected_dense = naive_observe(
        query, key, num_keys - num_queries, head_size**-0.5, THRESHOLD, 0.0
    )
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)
    assert dense == expected_dense


def test_density_is_neither_empty_nor_full() -> None:
    """The cases above would hide a wrong row filter if all or no entries passed it."""
    query, key = random_case(7, 63, 2, 3, 80)
    _, dense = run(query, key, 56)
    entries = 6 * sum(range(57, 64))
    assert 0.05 < dense / entries < 0.95


@pytest.mark.parametrize("threshold", [1e-6, 0.01, 0.3, 1.0], ids=lambda p: f"p{p}")
@pytest.mark.parametrize("softcap", [0.0, 2.5], ids=["no-softcap", "softcap"])
def test_row_filter(threshold: float, softcap: float) -> None:
    query, key = random_case(9, 63, 2, 3, 16, seed=3)
    _, dense = run(query, key, 54, threshold=threshold, softcap=softcap)
    _, expected = naive_observe(query, key, 54, 0.2, threshold, softcap)
    assert dense == expected


def test_equal_logits_are_all_dense_whatever_the_threshold() -> None:
    query, key = torch.ones(4, 6, 80), torch.ones(2, 20, 80)
    sums, dense = run(query, key, 10, threshold=1.0)
    assert dense == 6 * (11 + 12 + 13 + 14)
    per_query = [3 / (position + 1) for position in range(10, 14)]
    assert sums[0, 0].item() == pytest.approx(sum(per_query))
    assert sums[1, 13].item() == pytest.approx(per_query[-1])


def test_threshold_one_keeps_the_maximum_of_each_row() -> None:
    query, key = random_case(5, 30, 2, 3, 16)
    _, dense = run(query, key, 25, threshold=1.0)
    assert dense == 5 * 6


def test_row_filter_is_relative_to_the_row_maximum() -> None:
    """Weights 1, 0.02 and 0.005 of the maximum: two of three are dense at p = 0.01."""
    query = torch.ones(1, 1, 1)
    key = torch.tensor([[[math.log(0.02)], [0.0], [math.log(0.005)]]]) + 100
    sums, dense = run(query, key, 2, scale=1.0)
    assert dense == 2
    torch.testing.assert_close(sums[0], torch.tensor([0.02, 1, 0.005]) / 1.025, rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunks", [(13, 24), (1, 36), (36, 1), (5, 1, 20, 11)], ids=str)
@pytest.mark.parametrize("group", [1, 3], ids=lambda g: f"group{g}")
def test_chunks_add_up_to_one_observation(chunks: tuple[int, ...], group: int) -> None:
    first, num_queries = 26, sum(chunks)
    query, key = random_case(num_queries, 63, 2, group, 80)
    whole, whole_dense = run(query, key, first)
    sums, dense = torch.zeros(2, 63), torch.zeros((), dtype=torch.int64)
    start = 0
    for length in chunks:
        end = start + length
        # Only the keys of the prompt so far are in the cache when a chunk runs.
        seen = key.clone()
        seen[:, first + end :] = torch.nan
        observe(query[start:end], seen, first + start, PARAMS, sums, dense)
        start = end
    torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-6)
    assert int(dense) == whole_dense


@pytest.mark.parametrize("max_logits", [1, 6 * 63, 6 * 63 * 5 + 1])
def test_slices_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    query, key = random_case(37, 63, 2, 3, 16)
    whole, whole_dense = run(query, key, 26)
    module = importlib.import_module("vl_cache_vllm.ops.observe")
    monkeypatch.setattr(module, "_MAX_LOGITS", max_logits)
    sums, dense = run(query, key, 26)
    torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-6)
    assert dense == whole_dense


def test_accumulates_into_what_is_there_and_nowhere_else() -> None:
    query, key = random_case(4, 20, 2, 3, 16)
    alone, alone_dense = run(query, key, 10)
    sums, dense = torch.full((2, 63), 5.0), torch.tensor(1000)
    observe(query, key, 10, PARAMS, sums, dense)
    torch.testing.assert_close(sums[:, :14], alone + 5.0)
    assert torch.equal(sums[:, 14:], torch.full((2, 49), 5.0))
    assert int(dense) == 1000 + alone_dense


def test_accumulates_through_views_of_a_request_state() -> None:
    """The worker passes layer l of ``[L, K, tokens]`` and of ``[L]``."""
    query, key = random_case(4, 14, 2, 3, 16)
    sums, dense = torch.zeros(3, 2, 14), torch.zeros(3, dtype=torch.int64)
    observe(query, key, 10, PARAMS, sums[1], dense[1])
    alone, alone_dense = run(query, key, 10)
    assert torch.equal(sums[1], alone)
    assert dense.tolist() == [0, alone_dense, 0]
    assert not sums[0].any()
    assert not sums[2].any()


@pytest.mark.parametrize("group", [1, 3, 4], ids=lambda g: f"group{g}")
def test_every_row_sums_to_one(group: int) -> None:
    query, key = random_case(9, 63, 3, group, 80)
    sums, _ = run(query, key, 54)
    torch.testing.assert_close(sums.sum(1), torch.full((3,), 9.0 * group))


def test_large_logits_do_not_overflow() -> None:
    query, key = random_case(3, 20, 1, 2, 16)
    sums, dense = run(query * 1e4, key * 1e4, 17)
    assert torch.isfinite(sums).all()
    assert dense == 6


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [16, 17, 40])
def test_keys_split_over_many_programs(
    implementation: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a large GPU does for few queries: statistics of up to 40 splits are combined."""
    if implementation != "triton":
        pytest.skip("only Triton's kernels split")
    from vl_cache_vllm.kernels import observe as kernels

    monkeypatch.setattr(kernels, "_num_programs", lambda _: programs)
    query, key = random_case(3, 64 * 40 - 7, 1, 2, 16)
    first = key.shape[1] - 3
    with dispatch.use("torch"):
        expected, expected_dense = run(query, key, first)
    sums, dense = run(query, key, first)
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-6)
    assert dense == expected_dense


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reads_keys_from_pages(page_order: str, packing: str, dtype: torch.dtype) -> None:
    """63 tokens in 9 blocks of 8: the last page is not full."""
    pool = make_pool(page_order, packing, block_size=8, head_size=80, num_blocks=13, dtype=dtype)
    row = torch.randperm(13, generator=torch.Generator().manual_seed(2))[:8]
    query, _ = random_case(7, 63, 2, 3, 80, dtype)
    for layer in range(3):
        key = pool.read_keys(pool.block_pages(row)[layer])
        sums, dense = run(query, key, 56, columns=63)
        expected, expected_dense = naive_observe(query, key, 56, 0.2, THRESHOLD, 0.0)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-6)
        assert dense == expected_dense


@pytest.mark.parametrize("num_keys", [1, 9, 40, 63])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_the_device_may_know_the_number_of_keys(num_keys: int, num_queries: int) -> None:
    """Layers that were evicted differ in length; the host knows only a bound."""
    if num_queries > num_keys:
        return
    pool = make_pool(block_size=8, head_size=80, num_blocks=13)
    table = torch.randperm(len(pool.pages), generator=torch.Generator().manual_seed(2))[:8].int()
    query, _ = random_case(num_queries, 63, 2, 3, 80)
    sums, dense = torch.zeros(2, 70), torch.zeros((), dtype=torch.int64)
    maxima = torch.zeros_like(sums)
    observe(
        query,
        PagedKeys(pool, table),
        64 - num_queries,
        PARAMS,
        sums,
        dense,
        column_maxima=maxima,
        num_keys=torch.tensor([9, num_keys], dtype=torch.int32)[1],
    )
    key, first = pool.read_keys(table)[:, :num_keys], num_keys - num_queries
    expected, expected_maxima = torch.zeros(2, num_keys), torch.zeros(2, num_keys)
    expected_dense = torch.zeros_like(dense)
    observe(query, key, first, PARAMS, expected, expected_dense, column_maxima=expected_maxima)
    torch.testing.assert_close(sums[:, :num_keys], expected)
    torch.testing.assert_close(maxima[:, :num_keys], expected_maxima)
    assert not sums[:, num_keys:].any()
    assert not maxima[:, num_keys:].any()
    assert dense == expected_dense
    assert torch.isclose(sums.sum(), torch.tensor(6.0 * num_queries))


def naive_elite(
    query: torch.Tensor,
    key: torch.Tensor,
    first: int,
    softcap: float,
    share: float,
    scale: float = 0.2,
) -> list[list[bool]]:
    num_kv_heads = key.shape[0]
    group = query.shape[1] // num_kv_heads
    end = first + query.shape[0]
    result = []
    for kv_head in range(num_kv_heads):
        received = [0.0] * end
        for head in range(kv_head * group, (kv_head + 1) * group):
            logits = [scale * float(query[-1, head] @ key[kv_head, j]) for j in range(end)]
            if softcap:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            total = math.fsum(math.exp(x) for x in logits)
            received = [r + math.exp(x) / total for r, x in zip(received, logits, strict=True)]
        most = max(received[first:])
        result.append([r >= share * most for r in received[first:]])
    return result


@pytest.mark.parametrize("softcap", [0.0, 2.5], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize(("num_queries", "first"), [(1, 62), (20, 43), (63, 0)])
def test_elite_queries(softcap: float, share: float, num_queries: int, first: int) -> None:
    query, key = random_case(num_queries, 63, 2, 3, 16)
    params = AttentionParams(0.2, softcap, THRESHOLD)
    found = elite_queries(query, key, first, params, share)
    assert found.tolist() == naive_elite(query, key, first, softcap, share)
    assert found.any(-1).all()


def test_weights_of_queries_count_in_the_sums_only() -> None:
    query, key = random_case(9, 63, 2, 3, 16)
    elite = torch.zeros(2, 9, dtype=torch.bool)
    elite[0, [1, 4]] = elite[1, 8] = True
    sums, dense = torch.zeros(2, 63), torch.zeros((), dtype=torch.int64)
    observe(query, key, 54, PARAMS, sums, dense, elite)
    expected = torch.zeros(2, 63)
    for head, position in ((0, 1), (0, 4), (1, 8)):
        one, _ = run(query[position : position + 1], key, 54 + position, columns=63)
        expected[head] += one[head]
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)
    assert int(dense) == run(query, key, 54)[1]


def test_weights_are_sliced_with_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = random_case(9, 63, 2, 3, 16)
    elite = torch.rand(2, 9) < 0.5
    whole = torch.zeros(2, 63)
    observe(query, key, 54, PARAMS, whole, torch.zeros((), dtype=torch.int64), elite)
    module = importlib.import_module("vl_cache_vllm.ops.observe")
    monkeypatch.setattr(module, "_MAX_LOGITS", 2 * 6 * 63)  # two queries at a time
    sliced = torch.zeros(2, 63)
    observe(query, key, 54, PARAMS, sliced, torch.zeros((), dtype=torch.int64), elite)
    torch.testing.assert_close(sliced, whole)


def observations_of(pool: PagePool, table: torch.Tensor, seed: int) -> list[RequestObservation]:
    """Four requests with other numbers of queries, keys, thresholds, and kinds of tables.

    Args:
        pool: of 3 layers and 2 KV heads, with blocks of 8 tokens.
        table: ids of at least 20 blocks, int32.
        seed: of the results that they are added to.
    """
    generator = torch.Generator().manual_seed(seed)

    def columns(tokens: int) -> torch.Tensor:
        return torch.rand(3, 2, tokens, generator=generator)

    def dense() -> torch.Tensor:
        return torch.randint(9, (3,), generator=generator)

    pages = pool.block_pages(table[7:15]).int()
    num_keys = torch.tensor([9, 40, 64], dtype=torch.int32)
    return [
        RequestObservation(0, 30, 97, 0.01, table[:13], columns(97), dense()),
        RequestObservation(30, 1, 5, 1.0, table[3:4], columns(70), dense(), columns(70)),
        RequestObservation(33, 2, 64, 0.3, pages, columns(66), dense(), num_keys=num_keys),
        RequestObservation(35, 9, 160, 0.01, table[:20], columns(160), dense(), columns(160), 4),
    ]


@pytest.mark.parametrize("softcap", [0.0, 2.5], ids=["no-softcap", "softcap"])
@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("which", [slice(0, 4), slice(1, 3), slice(0, 1)], ids=str)
@pytest.mark.parametrize("groups", [[3], [1, 2], [1, 1, 1]], ids=str)
def test_layers_and_requests_at_once(
    packing: str, page_order: str, softcap: float, which: slice, groups: list[int]
) -> None:
    """Some or all layers of several requests, as from one observation of each."""
    pool = make_pool(page_order, packing, block_size=8, head_size=12, num_blocks=23)
    table = torch.randperm(23, generator=torch.Generator().manual_seed(2))[:20].int()
    query = torch.randn(3, 50, 6, 12, generator=torch.Generator().manual_seed(3))
    scales = 0.2, 0.3, 0.1
    found = observations_of(pool, table, seed=4)[which]
    first = 0
    for number in groups:
        layers = slice(first, first + number)
        observe_layers(
            query[layers],
            pool,
            scales[layers],
            softcap,
            [one.of_layers(layers) for one in found],
            first,
        )
        first += number
    expected = observations_of(pool, table, seed=4)[which]
    for request in expected:
        keys = request.table if request.table.dim() == 2 else pool.block_pages(request.table)
        for layer, scale in enumerate(scales):
            num_keys = request.most_keys
            if request.num_keys is not None:
                num_keys = int(request.num_keys[layer])
            weights = torch.ones(2, request.num_queries)
            weights[:, : request.first_summed or 0] = 0
            with dispatch.use("torch"):
                observe(
                    query[layer, request.first_query :][: request.num_queries],
                    pool.read_keys(keys[layer]),
                    num_keys - request.num_queries,
                    AttentionParams(scale, softcap, request.threshold),
                    request.column_sums[layer],
                    request.dense_entries[layer],
                    weights,
                    None if request.column_maxima is None else request.column_maxima[layer],
                )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.column_sums, other.column_sums)
        assert torch.equal(one.dense_entries, other.dense_entries)
        if one.column_maxima is not None:
            torch.testing.assert_close(one.column_maxima, other.column_maxima)
