# SPDX-License-Identifier: Apache-2.0
"""The formula of eviction's memory, against what is allocated and what the documents say."""

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.worker.test_warmup import NUM_KV_HEADS, NUM_LAYERS, warmup_of
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.ops.select import select
from vl_cache_vllm.worker.attention_stats import AttentionStats
from vl_cache_vllm.worker.late_observation import QueryBuffer
from vl_cache_vllm.worker.memory import memory_use
from vl_cache_vllm.worker.step_tables import TableSizes

GUIDE = Path(__file__).parents[2] / "docs" / "gpu-validation.md"


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages.setdefault(reference.cdata, (reference, storage.nbytes()))
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
        assert allocations.alive() - before == expected.scores + 2 * 8 * NUM_LAYERS
    del kept


def test_positions_and_queries_are_those_of_the_formula() -> None:
    """An eviction may keep all tokens of one layer, and positions have one shape in all layers."""
    tokens = 200
    scores = torch.rand(NUM_LAYERS, NUM_KV_HEADS, tokens)
    num_tokens = torch.full((NUM_LAYERS,), tokens)
    positions = select(scores, num_tokens, torch.tensor([tokens, 8, 8]), 0.1, tokens)
    sizes = TableSizes(NUM_LAYERS, 1, 1, 1, 1)
    expected = memory_use(sizes, NUM_KV_HEADS, tokens, tokens, False, 2 * 8 * 2)
    assert positions.numel() * positions.element_size() == expected.positions
    query = torch.empty(5, 2, 8, dtype=torch.bfloat16)
    assert QueryBuffer().of(query, NUM_LAYERS).untyped_storage().nbytes() == expected.queries
    parts = expected.tables, expected.scores, expected.positions, expected.queries
    assert expected.total == sum(parts)


def documented_rows() -> list[list[str]]:
    lines = GUIDE.read_text().splitlines()
    start = lines.index(
        "| bytes of, MB | LLaVA-1.5-7B, 4K | Qwen3-VL-8B, 32K | Qwen3-VL-8B, 256K |"
    )
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 : start + 7]]
    return [row[1:] for row in rows]


def test_the_documented_table() -> None:
    """For vLLM's default on large GPUs: 1,024 requests, graphs of 512, steps of 16K tokens."""
    columns = []
    for num_layers, num_kv_heads, max_model_len in (
        (32, 32, 4096),
        (36, 8, 32768),
        (36, 8, 262144),
    ):
        query_bytes = 32 * 128 * 2  # both have 32 heads of 128 bfloat16 elements
        sizes = TableSizes(num_layers, 1024, 16384, max_model_len // 16 + 1, 512)
        room = max(max_model_len + 16384, (256 << 20) // (4 * num_layers * num_kv_heads))
        use = memory_use(sizes, num_kv_heads, max_model_len, room, False, query_bytes)
        columns.append([use.tables, use.scores, use.positions, use.queries, use.total])
        assert use.total < 1e9
    found = [[f"{value / 1e6:,.0f}" for value in row] for row in zip(*columns, strict=True)]
    assert documented_rows() == found
