# SPDX-License-Identifier: Apache-2.0
"""Any setting that is accepted, however odd, leads to a choice that the cache can hold."""

import json
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from vl_cache_vllm.config import KVCompressConfig, _field_types
from vl_cache_vllm.policy import POLICIES, PatchGrid, Prompt
from vl_cache_vllm.policy.experimental import ExperimentalOptions
from vl_cache_vllm.policy.vlcache import VLCachePolicy
from vl_cache_vllm.worker import selection as selection_module
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.selection import (
    EvictionInput,
    Selection,
    divide,
    select_kept,
    selections,
)
from vl_cache_vllm.worker.source import EvictionSource

TOKENS, BLOCK, LAYERS, KV_HEADS, HEADS = 70, 8, 3, 2, 4
PROMPT = Prompt(TOKENS, ((4, 40),), (PatchGrid(4, 6, 6, 6),))
INTEGERS = (0, 1, 2, 3, 5, 69, 512, 10**6 - 1, 2**31 - 1, 2**31 + 1, 2**63 + 1, 10**30 + 1, -1)
FLOATS = (0.0, 5e-324, 1e-320, 1e-9, 0.3, 0.999999, 1.0, 1.5, 80.0, 1e6, sys.float_info.max / 2)


def values(annotation: Any) -> st.SearchStrategy:
    """What JSON can say of a type."""
    return st.one_of(
        *(
            st.sampled_from(choices)
            for kind, choices in (
                ("int", INTEGERS),
                ("float", FLOATS),
                ("bool", (False, True)),
                ("None", (None,)),
            )
            if kind in str(annotation)
        )
    )


def types_of(name: str) -> dict[str, Any]:
    """What a request may set, under the names that are not nested."""
    return _field_types(POLICIES[name]) | _field_types(ExperimentalOptions)


@pytest.mark.parametrize("name", [name for name in POLICIES if not name.startswith("keep")])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_accepted_settings_can_be_carried_out(name: str, data: st.DataObject) -> None:
    types = types_of(name)
    chosen = data.draw(st.lists(st.sampled_from(sorted(types)), unique=True, max_size=4))
    options = {key: data.draw(values(types[key]), label=key) for key in chosen}
    budget = data.draw(st.sampled_from((5e-324, 1e-320, 0.01, 0.3, 0.8)))
    base = KVCompressConfig.from_dict({"policy": name})
    assert base is not None
    try:
        config = base.for_request(
            SamplingParams(
                extra_args={"kv_budget": budget, "kv_policy_options": json.dumps(options)}
            )
        )
    except ValueError:
        return
    policy = config.policy
    first = policy.observation_start(40, TOKENS)
    assert 0 <= first < TOKENS
    observed = AttentionStats(config, LAYERS, KV_HEADS, TOKENS, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        query = torch.randn(TOKENS - first, HEADS, 8, generator=generator)
        key = torch.randn(KV_HEADS, TOKENS, 8, generator=generator)
        observed.add(layer, query, key, first, 0.3, 0.0)
    # More would not be evicted (`plan_eviction`).
    kept_blocks = min(config.kept_blocks(-(-TOKENS // BLOCK), BLOCK), TOKENS // BLOCK)
    division, selection = select_kept(
        EvictionInput(
            config,
            observed,
            observed.dense_entries,
            PROMPT,
            HEADS,
            TOKENS - first,
            kept_blocks,
            EvictionSource.of_prompt(TOKENS, LAYERS, BLOCK),
        )
    )
    pages = division.kept_pages.tolist()
    assert sum(pages) == kept_blocks * LAYERS
    assert all(1 <= count <= TOKENS // BLOCK for count in pages)
    for count, heads in zip(pages, selection.positions, strict=True):
        for head in heads[:, : count * BLOCK].tolist():
            assert head == sorted(set(head))
            assert head[0] >= 0 and head[-1] < TOKENS // BLOCK * BLOCK


def test_every_parameter_is_tried() -> None:
    """`values` knows the types of all of them."""
    for name in POLICIES:
        for annotation in types_of(name).values():
            assert not values(annotation).is_empty


def test_layers_divide_what_a_minimum_of_tokens_keeps() -> None:
    """Not the budget: a budget of 1 % would clip all layers to the minimum of a layer."""
    seen = []

    class Spy(VLCachePolicy):
        def layer_weights(self, density, budget, prompt):
            seen.append(budget)
            return super().layer_weights(density, budget, prompt)

    for minimum in (0, 4 * BLOCK):
        config = KVCompressConfig(budget=0.01, policy=Spy(min_kept_tokens=minimum))
        observed = AttentionStats(config, LAYERS, KV_HEADS, TOKENS, torch.device("cpu"))
        kept_blocks = config.kept_blocks(-(-TOKENS // BLOCK), BLOCK)
        assert kept_blocks == max(1, minimum // BLOCK)
        observed.attention.sums.uniform_()
        source = EvictionSource.of_prompt(TOKENS, LAYERS, BLOCK)
        dense = torch.arange(1, LAYERS + 1)
        select_kept(EvictionInput(config, observed, dense, PROMPT, HEADS, 4, kept_blocks, source))
    assert seen == [0.01, 4 * BLOCK / TOKENS]


@pytest.mark.parametrize("name", ["vlcache", "vlcache-plus", "snapkv", "pyramidkv", "h2o"])
def test_layers_of_different_lengths(name: str) -> None:
    """A later eviction: a layer gives no more than it has, and nothing behind its end is kept."""
    config = KVCompressConfig.from_dict({"policy": name})
    assert config is not None
    own = torch.tensor([2, 9, 4])
    source = EvictionSource(
        torch.zeros(LAYERS, 9, dtype=torch.int32),
        own,
        9,
        15,
        tail=3,
        block_size=BLOCK,
        is_first=False,
    )
    assert source.cached_tokens.tolist() == [19, 75, 35]
    assert source.max_tokens == 75
    observed = AttentionStats(config, LAYERS, KV_HEADS, 75, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for layer, end in enumerate(source.cached_tokens.tolist()):
        key = torch.randn(KV_HEADS, 75, 8, generator=generator)
        query = torch.randn(1, HEADS, 8, generator=generator)
        observed.add(layer, query, key, 74, 0.3, 0.0, torch.tensor(end))
    for kept_blocks in (1, 3, 4):
        dense, prompt = observed.dense_entries, Prompt(75)
        division, selection = select_kept(
            EvictionInput(config, observed, dense, prompt, HEADS, 1, kept_blocks, source)
        )
        assert division.kept_pages.sum() == kept_blocks * LAYERS
        assert (division.kept_pages <= own).all()
        assert ((division.density > 0) & (division.density <= 1)).all()
        for layer, pages in enumerate(division.kept_pages.tolist()):
            for head in selection.positions[layer, :, : pages * BLOCK].tolist():
                assert head == sorted(set(head))
                assert head[-1] < own[layer] * BLOCK


def random_input(name: str, tokens: int, seed: int, **options: Any) -> EvictionInput:
    config = KVCompressConfig.from_dict({"policy": name, **options})
    assert config is not None
    observed = AttentionStats(config, LAYERS, KV_HEADS, tokens, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        query = torch.randn(9, HEADS, 8, generator=generator)
        key = torch.randn(KV_HEADS, tokens, 8, generator=generator)
        observed.add(layer, query, key, tokens - 9, 0.3, 0.0)
    source = EvictionSource.of_prompt(tokens, LAYERS, BLOCK)
    prompt = Prompt(tokens, ((4, 40),))
    return EvictionInput(config, observed, observed.dense_entries, prompt, HEADS, 9, 3, source)


@pytest.mark.parametrize(
    ("most", "scored", "groups"),
    [
        # Requests of 3 layers; a layer of the first has 140 scores, of the second 180, third 100.
        (1 << 20, 1 << 20, [[(0, 0), (1, 0), (2, 0)]]),
        (840, 840, [[(0, 0)], [(1, 0), (2, 0)]]),
        (600, 300, [[(0, 0), (0, 2), (1, 0)], [(1, 1), (1, 2)], [(2, 0)]]),
        (1, 1, [[(request, layer)] for request in range(3) for layer in range(LAYERS)]),
    ],
    ids=["all", "requests", "layers", "one"],
)
@pytest.mark.parametrize("name", ["vlcache", "vlcache-plus", "random", "pyramidkv"])
def test_groups_of_layers_keep_what_all_together_keep(
    name: str,
    most: int,
    scored: int,
    groups: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if a group has layers of several requests, with other settings."""
    inputs = [
        random_input(name, 70, 1),
        random_input(name, 90, 2, budget=0.3, recent_ratio=0.2),
        random_input(name, 50, 3, experimental={"diversity": 0.5}),
    ]
    expected = [select_kept(one) for one in inputs]
    monkeypatch.setattr(selection_module, "MAX_GROUP_SCORES", most)
    monkeypatch.setattr(selection_module, "MAX_POLICY_SCORES", scored)
    division = divide(inputs)
    parts: list[list[Selection]] = [[] for _ in inputs]
    found = []
    for group in selections(inputs, division):
        found.append([(part.request, part.first_layer) for part in group])
        for part in group:
            parts[part.request].append(part)
    assert found == groups
    for index, (own, selection) in enumerate(expected):
        assert torch.equal(division.density[index], own.density)
        assert torch.equal(division.kept_pages[index], own.kept_pages)
        together = selection_module.whole(parts[index])
        assert torch.equal(together.scores, selection.scores)
        for layer, pages in enumerate(own.kept_pages.tolist()):
            kept = slice(pages * BLOCK)
            assert torch.equal(
                together.positions[layer, :, kept], selection.positions[layer, :, kept]
            )
