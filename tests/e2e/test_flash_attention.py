# SPDX-License-Identifier: Apache-2.0
"""Our FlashAttention backend from end to end, over a stand-in for FlashAttention 3 on the CPU.

On the V2 runner, with scheduler metadata and numbers of splits as for full CUDA graphs. Decode
steps run eagerly, or as a graph replays them: with the tensors of the step that was captured.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.config import CUDAGraphMode

from testing import tiny_models
from testing.engine import DEFAULTS, eviction_stats, greedy, image_request, logprobs, token_ids
from testing.engine import engine as running_engine
from testing.oracle import Oracle, Settings
from tests.e2e.test_against_oracle import check, load_oracle  # noqa: F401  a fixture
from tests.helpers.fakes import give_graphs_tables
from tests.helpers.flash_attention import FlashAttention, Replay, installed
from vl_cache_vllm import hooks
from vl_cache_vllm.ops import dispatch
from vl_cache_vllm.worker.v2 import V2Adapter

pytestmark = pytest.mark.interpreter

IMAGE_SIZE = 112


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashAttention]:
    monkeypatch.setitem(hooks.CPU_BACKENDS, "CPU_ATTN", hooks.GPU_BACKENDS["FLASH_ATTN"])
    # C++ operations do not know this layout of a page.
    with installed() as stand_in, dispatch.use("torch"):
        yield stand_in


@pytest.fixture(params=[False, True], ids=["eager", "replayed"])
def replay(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, flash: FlashAttention
) -> Iterator[Replay | None]:
    """Decode steps as those of full graphs; None: eager."""
    if not request.param:
        yield None
        return
    found = Replay(DEFAULTS["max_model_len"])
    prepare = V2Adapter.prepare_attn

    def prepare_attn(
        self: V2Adapter, batch: Any, mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        found.is_graph = bool(
            (batch.num_scheduled_tokens == 1).all() and not batch.is_prefilling_np.any()
        )
        mode = CUDAGraphMode.FULL if found.is_graph else mode
        return prepare(self, batch, mode, *args, **kwargs)

    monkeypatch.setattr(V2Adapter, "prepare_attn", prepare_attn)
    give_graphs_tables(monkeypatch, DEFAULTS["max_num_seqs"])
    with found.installed():
        yield found


@pytest.fixture
def model(models_dir: Path) -> Path:
    name = f"gpu-path-{IMAGE_SIZE}"
    return tiny_models.build("llava", models_dir / name, num_layers=2, image_size=IMAGE_SIZE)


def test_the_method(
    flash: FlashAttention,
    replay: Replay | None,
    model: Path,
    tmp_path: Path,
    load_oracle: Callable[[Path], Oracle],  # noqa: F811
) -> None:
    settings = Settings(0.25, 16)
    check(load_oracle(model), model, "llava", IMAGE_SIZE, settings, tmp_path, image_counts=[1])
    assert flash.seen["calls"] > 50 and flash.seen["metadata"] > 25
    assert flash.seen["split rows"] > 25
    if replay is not None:
        assert replay.replayed > 50


def test_a_batch_of_evicted_and_whole_requests(
    flash: FlashAttention, replay: Replay | None, model: Path
) -> None:
    """Requests come and go, some evicted and some not; each answers as it does alone."""
    settings = {"policy": "vlcache", "budget": 0.25}
    requests = [image_request("llava", f"Question {i}?", [i]) for i in range(4)]
    params = [greedy(8, extra_args={"kv_budget": 1.0} if i % 2 else None) for i in range(4)]
    with running_engine(model, settings, block_size=16) as llm:
        alone = [
            llm.generate([request], one, use_tqdm=False)[0]
            for request, one in zip(requests, params, strict=True)
        ]
        together = llm.generate(requests, params, use_tqdm=False)
        assert eviction_stats(llm).evicted == 4
    assert [*map(token_ids, together)] == [*map(token_ids, alone)]
    for one, other in zip(together, alone, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)
    if replay is not None:
        assert replay.replayed > 20


def test_stale_tables_are_seen(
    flash: FlashAttention, replay: Replay | None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that moved after the capture: what graphs must never meet, a replay does."""
    if replay is None:
        pytest.skip("only a replay reads what was captured")
    from vl_cache_vllm.worker.step_tables import StepTables

    settings = {"policy": "vlcache", "budget": 0.25}
    request = image_request("llava", "Question?", [0])
    with running_engine(model, settings, block_size=16) as llm:
        expected = llm.generate([request], greedy(8), use_tqdm=False)[0]
    fill = StepTables.fill

    def moved(self: StepTables, *args: Any) -> Any:
        self._block_table = self._block_table.clone()
        self._seq_lens = self._seq_lens.clone()
        self._last_views = None
        return fill(self, *args)

    replay._captured.clear()
    monkeypatch.setattr(StepTables, "fill", moved)
    with running_engine(model, settings, block_size=16) as llm:
        found = llm.generate([request], greedy(8), use_tqdm=False)[0]
    assert logprobs(found) != pytest.approx(logprobs(expected), abs=1e-4)


def test_counts_start_at_none(flash: FlashAttention) -> None:
    assert flash.seen == Counter()
