# SPDX-License-Identifier: Apache-2.0
"""The formula of eviction's memory, against what is allocated and what the documents say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.kernels import recorded
from tests.worker.test_late_observation import needs_compiler
from tests.worker.test_warmup import NUM_KV_HEADS, NUM_LAYERS, warmup_of
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.policy import Prompt
from vl_cache_vllm.worker import memory, selection
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.late_observation import QueryBuffer
from vl_cache_vllm.worker.memory import memory_use
from vl_cache_vllm.worker.selection import EvictionInput, divide, selections
from vl_cache_vllm.worker.source import EvictionSource
from vl_cache_vllm.worker.step_tables import TableSizes

GUIDE = Path(__file__).parents[2] / "docs" / "gpu-validation.md"


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are alive, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0
        self.launches: list[Any] = []  # recorded ones, which would hold their arguments

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.launches.clear()
        out = func(*args, **(kwargs or {}))
        given = {
            one.untyped_storage().data_ptr()
            for one in tree_iter((args, kwargs))
            if isinstance(one, torch.Tensor)
        }
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in given:
                    continue
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.most = max(self.most, self.alive())
        return out

    def alive(self) -> int:
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())


def config_of(policy: str) -> KVCompressConfig:
    config = KVCompressConfig.from_dict({"policy": policy})
    assert config is not None
    return config


@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus"])
@pytest.mark.parametrize("tokens", [333, 5000])
def test_buffers_are_those_of_the_formula(policy: str, tokens: int) -> None:
    """Scores of all prompts under observation, and the tables that graphs read."""
    config = config_of(policy)
    with Allocations() as allocations:
        sizes = warmup_of(config, tokens, 0)[1].tables.sizes
        room = 2 * tokens
        expected = memory_use(sizes, NUM_KV_HEADS, tokens, room, config.policy.wants_maxima, 0)
        before = allocations.alive()
        kept = [
            AttentionStats(config, NUM_LAYERS, NUM_KV_HEADS, tokens, torch.device("cpu"))
            for _ in range(2)
        ]
        assert allocations.alive() - before == expected.observed + 2 * 8 * NUM_LAYERS
    del kept


@needs_compiler
@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus"])
@pytest.mark.parametrize("most", [1, 64_000, 1 << 20])
def test_evictions_allocate_no_more_than_the_formula(
    policy: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one layer, of a few layers and of all layers at once, with the launchers of a GPU."""
    num_layers, num_kv_heads, tokens = 6, 16, 1000
    for module in (selection, memory):
        monkeypatch.setattr(module, "MAX_GROUP_SCORES", most)
        monkeypatch.setattr(module, "MAX_POLICY_SCORES", most // 2)
    config = config_of(policy)
    observed = AttentionStats(config, num_layers, num_kv_heads, tokens, torch.device("cpu"), 16)
    source = EvictionSource.of_prompt(tokens, num_layers, 16)
    one = EvictionInput(config, observed, observed.dense_entries, Prompt(tokens), 4, 9, 30, source)
    sizes = TableSizes(num_layers, 1, 1, 1, 1)
    maxima = config.policy.wants_maxima
    expected = memory_use(sizes, num_kv_heads, tokens, tokens, maxima, 0)
    with dispatch.use("triton"), recorded() as launches, Allocations() as allocations:
        allocations.launches = launches
        for group in selections([one], divide([one])):
            group.clear()
    found = allocations.most - 40 * tokens  # vectors over the tokens are not in the formula
    assert 0.6 < found / (expected.selected + expected.rankings) <= 1.0


def test_queries_are_those_of_the_formula() -> None:
    sizes = TableSizes(NUM_LAYERS, 1, 1, 1, 1)
    expected = memory_use(sizes, NUM_KV_HEADS, 200, 200, False, 2 * 8 * 2)
    query = torch.empty(5, 2, 8, dtype=torch.bfloat16)
    assert QueryBuffer().of(query, NUM_LAYERS, 5).untyped_storage().nbytes() == expected.queries
    parts = (
        expected.tables,
        expected.observed,
        expected.selected,
        expected.rankings,
        expected.queries,
    )
    assert expected.total == sum(parts)


DOCUMENTED = [
    ("LLaVA-1.5-7B, 4K", 32, 32, 4096),
    ("Qwen3-VL-8B, 32K", 36, 8, 32768),
    ("Qwen3-VL-8B, 256K", 36, 8, 262144),
]


@pytest.mark.parametrize("policy", ["vlcache", "vlcache-plus"])
def test_the_documented_table(policy: str) -> None:
    """For vLLM's default on large GPUs: 1,024 requests, graphs of 512, steps of 16K tokens."""
    wants_maxima = config_of(policy).policy.wants_maxima
    columns = []
    for _, num_layers, num_kv_heads, max_model_len in DOCUMENTED:
        query_bytes = 32 * 128 * 2  # both have 32 heads of 128 bfloat16 elements
        sizes = TableSizes(num_layers, 1024, 16384, max_model_len // 16 + 1, 512)
        token_bytes = 4 * num_layers * num_kv_heads * (2 if wants_maxima else 1)
        room = max(max_model_len + 16384, (256 << 20) // token_bytes)
        use = memory_use(sizes, num_kv_heads, max_model_len, room, wants_maxima, query_bytes)
        columns.append(
            [use.tables, use.observed, use.selected, use.rankings, use.queries, use.total]
        )
        assert use.total < 1e9
    found = [[f"{value / 1e6:,.0f}" for value in row] for row in zip(*columns, strict=True)]
    lines = GUIDE.read_text().splitlines()
    start = lines.index(f"| `{policy}`, MB | " + " | ".join(name for name, *_ in DOCUMENTED) + " |")
    rows = [line.strip("| ").split(" | ")[1:] for line in lines[start + 2 : start + 8]]
    assert rows == found
