# SPDX-License-Identifier: Apache-2.0
"""The eviction worker over a page pool of its own, against the naive references of the parts."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pools import CPU_PACKINGS, PAGE_ORDERS, key_of, make_pool, page_number, value_of
from tests.ops.test_apportion import exact_apportion
from tests.ops.test_observe import naive_elite, naive_observe
from tests.ops.test_select import naive_select
from tests.policy.test_diversity import naive_mix
from tests.policy.test_vlcache import naive_weights
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.messages import EvictionOrder
from vl_cache_vllm.ops.page_pool import PagePool
from vl_cache_vllm.policy import PatchGrid
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker.evictor import EvictionStep, Evictor
from vl_cache_vllm.worker.requests import RequestState
from vl_cache_vllm.worker.step import Batch, BatchRow

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 3, 6, 2, 8, 4
PROMPT, VISION_END = 63, 50  # 15 whole blocks and a tail of 3, M = 4 at a quarter
EVICTED = 60
SCALE = 0.3
COLUMNS = 30
KEPT_ROW = [16, 17, 18, 19]


def make_worker(
    pool: PagePool,
    max_num_reqs: int = 3,
    budget: float = 0.25,
    readers: Sequence[int] = (),
    **settings: Any,
) -> Evictor:
    config = KVCompressConfig.from_dict({"policy": "vlcache", "budget": budget, **settings})
    assert config is not None
    return Evictor(
        config,
        pool,
        num_heads=NUM_HEADS,
        max_num_reqs=max_num_reqs,
        max_num_tokens=200,
        max_table_width=COLUMNS,
        readers=readers,
    )


def pool_of(page_order: str = "layer-outermost", packing: str = "side-by-side") -> PagePool:
    return make_pool(
        page_order,
        packing,
        num_layers=NUM_LAYERS,
        num_blocks=80,
        num_kv_heads=NUM_KV_HEADS,
        block_size=BLOCK_SIZE,
        head_size=HEAD_SIZE,
    )


def queries(num_tokens: int, seed: int) -> torch.Tensor:
    """Of all layers, `[L, tokens, heads, head_size]`; sharper in higher layers."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(NUM_LAYERS, num_tokens, NUM_HEADS, HEAD_SIZE, generator=generator)
    return query * torch.tensor([1.0, 3.0, 9.0])[:, None, None, None]


def run_step(
    worker: Evictor,
    batch: list[tuple[RequestState, int, int, list[int]]],
    query: torch.Tensor,
    kept: dict[RequestState, list[int]] | None = None,
    sharers: Sequence[tuple[int, torch.Tensor]] = (),
) -> EvictionStep | None:
    """A step of (state, computed, scheduled, block row) through all layers.

    ``kept`` are the kept blocks of the requests that are evicted in it; ``sharers`` are later
    layers, with the index of the layer whose cache they read, and their queries.
    """
    ends = {state: max(state.prefill_tokens, computed) for state, computed, _, _ in batch}
    worker.begin_output(
        (),
        None,
        {
            state.request_id: EvictionOrder(ends[state] // BLOCK_SIZE * BLOCK_SIZE, tuple(blocks))
            for state, blocks in (kept or {}).items()
        },
    )
    table = torch.zeros(len(batch), COLUMNS, dtype=torch.int32)
    starts, rows, lengths = [0], [], []
    for r, (state, computed, scheduled, blocks) in enumerate(batch):
        table[r, : len(blocks)] = torch.tensor(blocks)
        starts.append(starts[-1] + scheduled)
        lengths.append(computed + scheduled)
        rows.append(BatchRow(state, computed, scheduled))
    step = worker.begin_step(
        Batch.of(rows),
        table,
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
    )
    if step is not None:
        for layer in range(NUM_LAYERS):
            worker.layer_done(step, layer, query[layer], SCALE, 0.0)
        for layer, own in sharers:
            worker.layer_done(step, layer, own, SCALE, 0.0, is_owner=False)
    return step


def start(
    worker: Evictor,
    key: str,
    tokens: int = PROMPT,
    config: KVCompressConfig | None = None,
) -> RequestState:
    return worker.requests.start(key, config or worker.config, VISION_END, tokens)


def expected_eviction(
    pool: PagePool, prompt_row: list[int], query: torch.Tensor, config: KVCompressConfig
) -> tuple[list[int], list[list[list[int]]]]:
    """Pages of each layer and kept positions ``[L][KV heads]``; ``query`` is the whole prompt's."""
    policy, options = config.policy, config.experimental
    assert isinstance(policy, VLCachePolicy)
    observed_from = policy.observation_start(VISION_END, PROMPT)
    density, scores = [], []
    for layer in range(NUM_LAYERS):
        key = pool.read_keys(pool.block_pages(torch.tensor(prompt_row))[layer])
        window = query[layer, observed_from:PROMPT]
        sums, dense = naive_observe(window, key, observed_from, SCALE, policy.threshold, 0.0)
        if options.elite_window:
            elite = naive_elite(window, key, observed_from, 0.0, options.elite_window, SCALE)
            sums = torch.zeros_like(sums)
            for q, position in enumerate(range(observed_from, PROMPT)):
                one, _ = naive_observe(window[q : q + 1], key, position, SCALE, 0.01, 0.0)
                for head in range(NUM_KV_HEADS):
                    sums[head, : position + 1] += one[head] * elite[head][q]
        density.append(dense / (NUM_HEADS * sum(range(observed_from + 1, PROMPT + 1))))
        half = policy.pooling // 2
        scores.append(
            [
                [sum(row[max(0, j - half) : j + half + 1]) for j in range(PROMPT)]
                for row in sums.tolist()
            ]
        )
        if options.diversity:
            pairs = zip(scores[-1], key, strict=True)
            scores[-1] = [naive_mix(row, k[:PROMPT], options.diversity) for row, k in pairs]
    kept_blocks = -(-len(prompt_row) // 4)
    weights = naive_weights(density, config.budget, policy.uniform_mix)
    pages = exact_apportion(weights, kept_blocks * NUM_LAYERS, PROMPT // BLOCK_SIZE).pages
    positions = [
        [naive_select(row[:EVICTED], count * BLOCK_SIZE, "0.1") for row in scores[layer]]
        for layer, count in enumerate(pages)
    ]
    return pages, positions


Expected = tuple[torch.Tensor, list[int], list[list[list[int]]]]


@pytest.fixture(scope="module")
def expected() -> dict[Any, Expected]:
    """Of a pool and a policy: pages before the eviction, and what `expected_eviction` says."""
    return {}


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
@pytest.mark.parametrize("packing", CPU_PACKINGS)
@pytest.mark.parametrize("chunks", [(63,), (55, 8), (20, 33, 10)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pooling": 3, "uniform_mix": 0.8},
        {"max_observation_tokens": 5},
        {"post_vision_only": False, "max_observation_tokens": 40},
        {"post_vision_only": False},
        {"experimental": {"elite_window": 0.3}, "max_observation_tokens": 11},
        {"experimental": {"diversity": 1.0}},
    ],
    ids=[
        "paper",
        "pooled-and-mixed",
        "last-five-queries",
        "last-forty-queries",
        "all-queries",
        "elite-queries",
        "diverse-keys",
    ],
)
def test_a_prompt_is_evicted_as_the_parts_say(
    page_order: str,
    packing: str,
    chunks: tuple[int, ...],
    settings: dict[str, Any],
    expected: dict[Any, Expected],
) -> None:
    """Beside a request that decodes after an eviction and one that is never evicted."""
    pool = pool_of(page_order, packing)
    worker = make_worker(pool, **settings)
    other, plain = start(worker, "other"), worker.requests.start("plain", worker.config, None, 9)
    other_row, plain_row = list(range(60, 76)), [59, 58, 57]
    other_kept = {other: [76, 77, 78, 79]}
    run_step(worker, [(other, 0, PROMPT, other_row)], queries(PROMPT, seed=1), other_kept)
    assert other.evicted_tokens == EVICTED

    state = start(worker, "a")
    blocks = torch.randperm(57, generator=torch.Generator().manual_seed(2))[:20].tolist()
    row, kept_row = blocks[:16], blocks[16:]
    query = queries(PROMPT, seed=3)
    before = pool.pages.clone()
    computed = 0
    for index, chunk in enumerate(chunks):
        end = computed + chunk
        noise = queries(3, seed=4)
        step = run_step(
            worker,
            [
                (other, PROMPT + index, 1, [*other_row, 56]),
                (state, computed, chunk, row[: -(-end // BLOCK_SIZE)]),
                (plain, index, 2, plain_row[:1]),
            ],
            torch.cat((noise[:, :1], query[:, computed:end], noise[:, 1:]), 1),
            {state: kept_row} if end == PROMPT else None,
        )
        assert step is not None
        assert step.tables is not None
        if end < PROMPT:
            assert torch.equal(pool.pages, before)
        computed = end

    source = pool_of(page_order, packing)
    source.pages.copy_(before)
    case = page_order, packing, worker.config
    if case not in expected:  # it is the same for all chunks, and plain loops are slow
        expected[case] = before, *expected_eviction(source, row, query, worker.config)
    pages_before, pages, positions = expected[case]
    assert torch.equal(before, pages_before)
    assert worker.tables.kept_pages(state.slot).tolist() == pages
    assert len(set(pages)) > 1 or settings  # otherwise the case shows nothing
    assert state.attention_stats is None

    # The next step reads the survivors and the tail, and writes behind them.
    step = run_step(
        worker,
        [(plain, 5, 1, plain_row[:2]), (state, PROMPT, 1, row)],
        queries(2, seed=5),
    )
    assert step is not None
    assert step.tables is not None
    for layer, count in enumerate(pages):
        assert step.tables.seq_lens[layer].tolist() == [6, count * BLOCK_SIZE + 4]
        table = step.tables.block_table[layer, 1].tolist()
        assert table[count] == page_number(pool, layer, row[15])
        assert step.tables.slot_mapping[layer, 1] == table[count] * BLOCK_SIZE + 3
        for head in range(NUM_KV_HEADS):
            for kept, position in enumerate(positions[layer][head]):
                page, token = table[kept // BLOCK_SIZE], kept % BLOCK_SIZE
                origin = page_number(pool, layer, row[position // BLOCK_SIZE])
                cell = origin, head, position % BLOCK_SIZE
                assert torch.equal(key_of(pool, page, head, token), key_of(source, *cell))
                assert torch.equal(value_of(pool, page, head, token), value_of(source, *cell))
    # Prompt pages may be shared with other requests.
    shared = [page_number(pool, layer, block) for layer in range(NUM_LAYERS) for block in row]
    assert torch.equal(pool.pages[shared], before[shared])


def test_plain_steps_are_left_to_vllm() -> None:
    worker = make_worker(pool_of())
    state = worker.requests.start("a", worker.config, None, 9)
    assert run_step(worker, [(state, 0, 9, [1, 2, 3])], queries(9, seed=0)) is None
    assert run_step(worker, [(state, 9, 1, [1, 2, 3])], queries(1, seed=0)) is None


def test_two_prompts_end_in_one_step() -> None:
    """They must not see each other's queries, and the result is that of one at a time."""
    together, alone = pool_of(), pool_of()
    rows = [list(range(1, 17)), list(range(30, 46))]
    kept = [list(range(17, 21)), list(range(46, 50))]
    worker = make_worker(together)
    states = [start(worker, name) for name in "ab"]
    both = [queries(PROMPT, seed) for seed in (6, 7)]
    run_step(
        worker,
        [(state, 0, PROMPT, row) for state, row in zip(states, rows, strict=True)],
        torch.cat(both, 1),
        dict(zip(states, kept, strict=True)),
    )
    for row, kept_row, query in zip(rows, kept, both, strict=True):
        one = make_worker(alone)
        state = start(one, "a")
        run_step(one, [(state, 0, PROMPT, row)], query, {state: kept_row})
    assert torch.equal(together.pages, alone.pages)


def test_a_request_in_the_place_of_another_of_its_size() -> None:
    """Nothing in the numbers of the batch tells the two apart."""
    worker = make_worker(pool_of())
    row = list(range(16))
    tables = []
    query = queries(PROMPT, seed=1)
    for name, of_prompt in (("a", query), ("b", query.flip(0))):
        state = start(worker, name)
        run_step(worker, [(state, 0, PROMPT, row)], of_prompt, {state: KEPT_ROW})
        for computed in (PROMPT, PROMPT + 1):
            step = run_step(worker, [(state, computed, 1, [*row, 20])], query[:, :1])
            assert step is not None and step.tables is not None
        kept = worker.tables.kept_pages(state.slot)
        lengths = kept * BLOCK_SIZE + PROMPT - EVICTED + 2
        assert step.tables.seq_lens[:, 0].tolist() == lengths.tolist()
        tables.append(kept.tolist())
        worker.requests.drop(name)
    assert tables[0] != tables[1]


def test_each_request_brings_its_own_settings() -> None:
    """In one step, as in workers that have these settings for everybody."""
    own = [
        KVCompressConfig(policy=VLCachePolicy(pooling=3, threshold=0.2), budget=0.125),
        KVCompressConfig(policy=VLCachePolicy(max_observation_tokens=5), budget=0.5),
    ]
    together, alone = pool_of(), pool_of()
    rows = [list(range(1, 17)), list(range(30, 46))]
    kept = [[17, 18], list(range(46, 54))]
    worker = make_worker(together)
    states = [start(worker, name, config=c) for name, c in zip("ab", own, strict=True)]
    both = [queries(PROMPT, seed) for seed in (6, 7)]
    run_step(
        worker,
        [(state, 0, PROMPT, row) for state, row in zip(states, rows, strict=True)],
        torch.cat(both, 1),
        dict(zip(states, kept, strict=True)),
    )
    for config, row, kept_row, query in zip(own, rows, kept, both, strict=True):
        one = make_worker(alone)
        one.config = config
        state = start(one, "a")
        run_step(one, [(state, 0, PROMPT, row)], query, {state: kept_row})
    assert torch.equal(together.pages, alone.pages)


def test_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    pool = pool_of()
    worker = make_worker(pool, trace={"path": str(path), "positions": True, "scores": True})
    query = queries(PROMPT, seed=3)
    source = pool_of()
    for name in ("a", "b"):
        state = start(worker, name)
        state.visual, state.grids = ((10, 50),), lambda: (PatchGrid(12, 6, 6, 6),)
        run_step(worker, [(state, 0, PROMPT, list(range(16)))], query, {state: KEPT_ROW})
    pages, positions = expected_eviction(source, list(range(16)), query, worker.config)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["request_id"], second["request_id"]) == ("a", "b")
    assert first["policy"] == worker.config.policy.name
    assert first["policy_options"] == dataclasses.asdict(worker.config.policy)
    assert first["experimental"] == {"elite_window": 0.0, "diversity": 0.0}
    assert (first["eviction"], first["tokens"], first["evicted_tokens"]) == (1, PROMPT, EVICTED)
    assert first["cached_tokens"] == [PROMPT] * NUM_LAYERS
    assert first["vision_end"] == VISION_END
    assert (first["kept_blocks"], first["block_size"]) == (4, 4)
    assert first["kept_tokens"] == [count * BLOCK_SIZE for count in pages]
    assert first["kept_positions"] == positions
    assert all(0 < density <= 1 for density in first["density"])
    assert first["visual"] == [[10, 50]]
    assert first["grids"] == [[12, 6, 6, 6]]
    key = source.read_keys(source.block_pages(torch.arange(16))[1])
    sums, _ = naive_observe(query[1, VISION_END:], key, VISION_END, SCALE, 0.01, 0.0)
    torch.testing.assert_close(
        torch.tensor(first["attention"][1], dtype=torch.float64), sums, rtol=1e-3, atol=1e-9
    )
    assert first["scores"] == first["attention"]  # of this policy


def test_reports() -> None:
    """Of an eviction, and of a prompt that was observed but then not evicted."""
    worker = make_worker(pool_of())
    evicted, declined = start(worker, "evicted"), start(worker, "declined")
    first = [(evicted, 0, 60, list(range(15))), (declined, 0, 60, list(range(30, 45)))]
    run_step(worker, first, torch.cat((queries(60, 3), queries(60, 4)), 1))
    assert not worker.take_reports()
    assert declined.attention_stats is not None
    last = PROMPT - 60
    batch = [(evicted, 60, last, list(range(16))), (declined, 60, last, list(range(30, 46)))]
    kept = {evicted: KEPT_ROW}
    run_step(worker, batch, torch.cat((queries(last, 3), queries(last, 4)), 1), kept)
    assert declined.attention_stats is None  # at once: its scores are not needed
    not_evicted, report = (pending() for pending in worker.take_reports())
    assert report.observation_seconds > 0
    assert report.compaction_seconds is not None and report.compaction_seconds > 0
    assert report.layers_retained is not None and len(report.layers_retained) == NUM_LAYERS
    assert not_evicted.observation_seconds > 0
    assert not_evicted.compaction_seconds is not_evicted.layers_retained is None


def test_more_requests_than_rows() -> None:
    """Preempted requests keep their slots while they wait."""
    worker = make_worker(pool_of(), max_num_reqs=2)
    for number in range(3):
        start(worker, f"waiting-{number}")
    state = start(worker, "a")
    assert state.slot == 4
    row = list(range(16))
    run_step(worker, [(state, 0, PROMPT, row)], queries(PROMPT, seed=3), {state: KEPT_ROW})
    assert worker.tables.kept_pages(state.slot).sum() == 4 * NUM_LAYERS


def test_many_more_requests_than_rows() -> None:
    """Under the priority policy any number of preempted requests may wait."""
    worker = make_worker(pool_of(), max_num_reqs=1)
    for number in range(4):
        start(worker, f"waiting-{number}")
    state = start(worker, "a")
    row = list(range(16))
    run_step(worker, [(state, 0, PROMPT, row)], queries(PROMPT, seed=3), {state: KEPT_ROW})
    assert worker.tables.kept_pages(state.slot).sum() == 4 * NUM_LAYERS


@pytest.mark.parametrize("page_order", PAGE_ORDERS)
def test_a_second_eviction_chooses_from_what_the_first_one_left(page_order: str) -> None:
    """By the first query of the step alone, in each layer's own cache."""
    pool = pool_of(page_order)
    worker = make_worker(pool, pooling=3)
    state = start(worker, "a")
    row = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tolist()[:24]
    run_step(worker, [(state, 0, PROMPT, row[:16])], queries(PROMPT, 3), {state: [50, 51, 52, 53]})
    first_pages = worker.tables.kept_pages(state.slot).tolist()
    assert len(set(first_pages)) > 1
    # 95 tokens: of the row, columns 15 to 22 are whole blocks, and 3 tokens are in column 23.
    step = run_step(worker, [(state, 94, 1, row)], queries(1, 7))
    assert step is not None and step.tables is not None
    tables = step.tables.block_table[:, 0].clone()
    lengths = [count * BLOCK_SIZE + 95 - EVICTED for count in first_pages]
    assert step.tables.seq_lens[:, 0].tolist() == lengths
    before = pool.pages.clone()
    query = queries(3, 8)  # with two drafts
    run_step(worker, [(state, 94, 3, row)], query, {state: [54, 55, 56]})

    policy, density, scores = worker.config.policy, [], []
    assert isinstance(policy, VLCachePolicy)
    source = pool_of(page_order)
    source.pages.copy_(before)
    for layer, length in enumerate(lengths):
        key = source.read_keys(tables[layer])
        sums, dense = naive_observe(query[layer, :1], key, length - 1, SCALE, 0.01, 0.0)
        density.append(dense / (NUM_HEADS * length))
        padded = torch.nn.functional.pad(sums[:, :length], (1, 1))
        scores.append(padded.unfold(1, 3, 1).sum(-1))
    weights = naive_weights(density, worker.config.budget, policy.uniform_mix)
    caps = [(length - 3) // BLOCK_SIZE for length in lengths]
    pages = exact_apportion(weights, 3 * NUM_LAYERS, caps).pages
    assert worker.tables.kept_pages(state.slot).tolist() == pages

    step = run_step(worker, [(state, 95, 1, row)], queries(1, 9))
    assert step is not None and step.tables is not None
    for layer, count in enumerate(pages):
        assert step.tables.seq_lens[layer, 0] == count * BLOCK_SIZE + 4
        table = step.tables.block_table[layer, 0].tolist()
        assert table[count] == page_number(pool, layer, row[23])
        for head in range(NUM_KV_HEADS):
            candidates = scores[layer][head, : caps[layer] * BLOCK_SIZE].tolist()
            chosen = naive_select(candidates, count * BLOCK_SIZE, "0.1")
            for kept, index in enumerate(chosen):
                page, token = table[kept // BLOCK_SIZE], kept % BLOCK_SIZE
                cell = int(tables[layer, index // BLOCK_SIZE]), head, index % BLOCK_SIZE
                assert torch.equal(key_of(pool, page, head, token), key_of(source, *cell))
                assert torch.equal(value_of(pool, page, head, token), value_of(source, *cell))
    written = {
        page_number(pool, layer, block) for layer in range(NUM_LAYERS) for block in (54, 55, 56)
    }
    others = [page for page in range(len(pool.pages)) if page not in written]
    assert torch.equal(pool.pages[others], before[others])
