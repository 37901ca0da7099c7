# SPDX-License-Identifier: Apache-2.0
"""What runs on a GPU, on the CPU: vLLM's Triton attention under ours, all operations in Triton.

Through Triton's interpreter. Decode steps go as those of full CUDA graphs do, through tables at
fixed places, of the largest width. Graphs themselves, streams and FlashAttention need a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from testing import tiny_models
from testing.engine import DEFAULTS, eviction_worker, greedy, image_request, token_ids
from testing.engine import engine as running_engine
from testing.oracle import Oracle, Settings
from tests.e2e.test_against_oracle import check, load_oracle  # noqa: F401  a fixture
from tests.helpers.fakes import give_graphs_tables
from vl_cache_vllm import hooks
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.worker.v2 import V2Adapter

pytestmark = pytest.mark.interpreter

IMAGE_SIZE = 112  # small: the interpreter is slow


@pytest.fixture(params=["LBNHC", "BLHNC"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", request.param)
    return request.param


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many steps of the engines went which way."""
    counts: Counter[str] = Counter()
    monkeypatch.setitem(hooks.CPU_BACKENDS, "CPU_ATTN", hooks.GPU_BACKENDS["TRITON_ATTN"])
    prepare = V2Adapter.prepare_attn

    def prepare_attn(
        self: V2Adapter, batch: Any, mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if (batch.num_scheduled_tokens == 1).all() and not batch.is_prefilling_np.any():
            mode = CUDAGraphMode.FULL
        counts[mode.name] += 1
        return prepare(self, batch, mode, *args, **kwargs)

    monkeypatch.setattr(V2Adapter, "prepare_attn", prepare_attn)
    give_graphs_tables(monkeypatch, DEFAULTS["max_num_seqs"])
    # vLLM's kernel that writes K and V asks for its tile size.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with dispatch.use("triton"):
        yield counts


@pytest.fixture
def model(models_dir: Path) -> Path:
    name = f"gpu-path-{IMAGE_SIZE}"
    return tiny_models.build("llava", models_dir / name, num_layers=2, image_size=IMAGE_SIZE)


def test_the_method(
    layout: str,
    steps: Counter[str],
    model: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],  # noqa: F811
) -> None:
    """Against the oracle, with heads interleaved in a page or not, layers or blocks outermost."""
    settings = Settings(0.25, 16)
    check(load_oracle(model), model, "llava", IMAGE_SIZE, settings, tmp_path, image_counts=[1])
    assert steps["FULL"] > 25 and steps["NONE"] > 0


def test_tables_stay_where_graphs_find_them(steps: Counter[str], model: Path) -> None:
    """Requests come, are evicted at different lengths and end."""
    found: dict[int, set[tuple[int, ...]]] = {}
    settings = {"policy": "vlcache", "budget": 0.25}
    with running_engine(model, settings, block_size=16) as llm:
        worker = eviction_worker(llm)
        fill = worker.tables.fill

        def record(evicted: Any, *args: Any) -> Any:
            tables = fill(evicted, *args)
            pointers = [tables.block_table, tables.seq_lens, tables.slot_mapping]
            places = tuple(tensor.data_ptr() for tensor in pointers)
            num_reqs = tables.block_table.shape[1]  # padded to the graph
            found.setdefault(num_reqs, set()).add((*places, *tables.block_table.shape))
            return tables

        worker.tables.fill = record  # type: ignore[method-assign]
        alone = [
            token_ids(llm.generate([request], greedy(6), use_tqdm=False)[0])
            for request in (image_request("llava", "One?", [1]), image_request("llava", "2?", [2]))
        ]
        assert set(found) == {1}
        together = llm.generate(
            [image_request("llava", "One?", [1]), image_request("llava", "2?", [2])],
            [greedy(6), greedy(6)],
            use_tqdm=False,
        )
    assert [token_ids(output) for output in together] == alone
    assert set(found) == {1, 2} and all(len(places) == 1 for places in found.values())
