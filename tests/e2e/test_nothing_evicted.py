# SPDX-License-Identifier: Apache-2.0
"""Where nothing is evicted, outputs are vLLM's to the last bit."""

from pathlib import Path
from typing import Any

import pytest

from testing import engine as harness
from testing import tiny_models
from tests.helpers import stock_reference

pytestmark = pytest.mark.both_runners


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


@pytest.fixture(scope="module")
def stock(model: Path) -> list[list[Any]]:
    return stock_reference.run_without_plugin(model)


@pytest.mark.parametrize(
    "kv_compress",
    [
        pytest.param(None, id="plugin loaded, not asked for"),
        pytest.param({"policy": "none"}, id="policy none"),
        pytest.param({"policy": "vlcache", "budget": 1.0}, id="budget 1"),
        pytest.param({"policy": "vlcache", "budget": 0.1, "when": "pressure"}, id="no pressure"),
        pytest.param({"policy": "vlcache", "budget": 0.1, "min_prompt_tokens": 2000}, id="short"),
        pytest.param(
            {"policy": "vlcache", "budget": 0.1, "min_prompt_tokens": 2000, "every": 1000},
            id="a bound that is not reached",
        ),
    ],
)
def test_identical_to_stock(
    model: Path, stock: list[list[Any]], kv_compress: dict[str, Any] | None
) -> None:
    assert stock_reference.run(model, kv_compress) == stock


def test_text_only_requests_are_identical_among_evicted_ones(
    model: Path, stock: list[list[Any]]
) -> None:
    outputs = stock_reference.run(model, {"policy": "vlcache", "budget": 0.2})
    requests = stock_reference.mixed_requests()
    text_only = [i for i, r in enumerate(requests) if "multi_modal_data" not in r]
    assert len(text_only) == 3
    for i in text_only:
        assert outputs[i][0] == stock[i][0]
        assert outputs[i][1] == pytest.approx(stock[i][1], abs=1e-5)
    with_image = [i for i in range(len(requests)) if i not in text_only]
    assert any(outputs[i][0] != stock[i][0] for i in with_image), "nothing was evicted"


def test_a_stock_engine_after_one_with_eviction_is_stock(model: Path) -> None:
    """In the same process: nothing of ours is left behind."""

    def classes(settings: dict[str, Any] | None) -> list[type]:
        with harness.engine(model, settings) as llm:
            worker = harness.scheduler(llm), llm.llm_engine.engine_core.engine_core.model_executor
            layers = worker[1].driver_worker.worker.compilation_config.static_forward_context
            layer = next(v for v in layers.values() if hasattr(v, "attn_backend"))
            return [type(worker[0]), type(layer.impl), layer.attn_backend]

    before, during, after = classes(None), classes({"policy": "vlcache"}), classes(None)
    assert all(cls.__module__.startswith("vl_cache_vllm.") for cls in during)
    assert all(cls.__module__.startswith("vllm.") for cls in before)
    assert after == before


def test_dummy_batches_disturb_nobody(model: Path) -> None:
    """As a data-parallel engine runs them while its peers work."""
    requests = stock_reference.mixed_requests()[:2]

    def outputs(dummies: bool) -> dict[str, list[int]]:
        done = {}
        with harness.engine(model, {"policy": "vlcache", "budget": 0.2}) as llm:
            engine = llm.llm_engine
            for i, request in enumerate(requests):
                engine.add_request(str(i), request, harness.greedy(12))
            executor = engine.engine_core.engine_core.model_executor
            while engine.has_unfinished_requests():
                done |= {o.request_id: harness.token_ids(o) for o in engine.step() if o.finished}
                if dummies:
                    executor.driver_worker.worker.execute_dummy_batch()
            assert harness.eviction_stats(llm).evicted == 1
        return done

    assert outputs(dummies=True) == outputs(dummies=False)


def test_a_trace_file_that_cannot_be_written_fails_at_start(model: Path) -> None:
    settings = {"policy": "vlcache", "trace": {"path": "/nonexistent/folder/trace"}}
    with (
        pytest.raises(ValueError, match=r"cannot write its trace\.path"),
        harness.engine(model, settings),
    ):
        pass


def test_max_tokens_1_is_left_alone(model: Path) -> None:
    with harness.engine(model, {"policy": "vlcache", "budget": 0.1}) as llm:
        request = harness.image_request("llava", "One token, please.", [1])
        llm.generate([request], harness.greedy(1), use_tqdm=False)
        stats = harness.eviction_stats(llm)
        assert stats.evicted == 0
        assert stats.skipped == {"no_decode": 1}
