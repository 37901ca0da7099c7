# SPDX-License-Identifier: Apache-2.0
"""The check's engines on a CPU: Triton through its interpreter, a stand-in for FlashAttention."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from tests.helpers import flash_attention
from tests.helpers.mutated_kernels import Fault, planted
from vl_cache_vllm import hooks
from vl_cache_vllm.self_check import engines
from vl_cache_vllm.self_check.engines import EngineRun, EngineSetup, Step
from vl_cache_vllm.self_check.model import ModelSize
from vl_cache_vllm.self_check.rows import Row, failing

SCALE = engines.Scale(
    ModelSize(num_layers=2, num_heads=4, head_size=16, image_size=112),
    "float32",
    output_len=3,
    arguments=(("max_model_len", 512), ("kv_cache_memory_bytes", 1 << 24)),
)


@contextlib.contextmanager
def attention_of(backend: str) -> Iterator[None]:
    """A GPU backend of vLLM's on the CPU, under ours and without it."""
    vllm_path = AttentionBackendEnum[backend].value
    register_backend(AttentionBackendEnum.CPU_ATTN, vllm_path)
    selector._cached_get_attn_backend.cache_clear()
    try:
        with mock.patch.dict(hooks.CPU_BACKENDS, CPU_ATTN=hooks.GPU_BACKENDS[backend]):
            yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def runs_of(setups: list[EngineSetup], folder: Path) -> dict[EngineSetup, EngineRun]:
    return {one: engines.run(one, SCALE, folder / str(i)) for i, one in enumerate(setups)}


def assert_all_pass(rows: list[Row]) -> None:
    assert [row for row in rows if not row.passed] == []
    for row in rows:
        if row.name == "attention against float32":
            assert row.error < 1e-4
            assert "of 0 outputs" not in row.note
        elif row.name.startswith("log-prob"):
            assert row.error < 1e-3


@pytest.mark.interpreter
@pytest.mark.slow
def test_engines_with_triton_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's kernel that writes K and V asks for its tile size.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    # The interpreter is slow: one evicted request beside one that is not.
    whole, mixed = engines._whole(SCALE)[:1], engines._mixed(SCALE)[1:3]
    monkeypatch.setattr(engines, "_whole", lambda _: whole)
    monkeypatch.setattr(engines, "_mixed", lambda _: mixed)
    monkeypatch.setattr(engines, "NUM_EVICTED", 1)
    with attention_of("TRITON_ATTN"):
        rows = [*engines.compare(runs_of([EngineSetup(None)], tmp_path))]
    assert_all_pass(rows)
    assert len(rows) == 2


@pytest.mark.interpreter
@pytest.mark.slow
def test_engines_with_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All engines of the check pass, and planted faults fail the rows that they concern."""
    setups = engines.setups([None], graphs=False)
    reference, _, ours = setups
    with attention_of("FLASH_ATTN"), flash_attention.installed():
        runs = runs_of(setups, tmp_path)
        rows = [*engines.compare(runs)]
        assert_all_pass(rows)
        assert {row.name for row in rows} == {
            "attention against float32",
            "requests not evicted",
            "pages moved between layers",
            "kept tokens that differ",
            "log-probabilities of the same cache",
            "nothing evicted, against vLLM",
        }
        kept = runs[reference].kept.values()
        assert len({len(layer[0]) for layers in kept for layer in layers}) > 2

        def with_fault(name: str) -> set[str]:
            faulty = engines.run(ours, SCALE, tmp_path / name)
            rows = engines.compare({**runs, ours: faulty})
            assert {row.case for row in failing(rows)} <= {str(ours)}
            return {row.name for row in failing(engines.compare({**runs, ours: faulty}))}

        # Values are not moved to the kept blocks: the selection is right, the outputs are not.
        fault = Fault(
            "compact_kernel",
            "to_page + cell + to_token * value_token_stride, value",
            "to_page + cell + to_token * value_token_stride, 0 * value",
            frozenset(),
        )
        (tmp_path / "kernels").mkdir()
        with planted(fault, tmp_path / "kernels"):
            assert with_fault("compact") == {"log-probabilities of the same cache"}

        # Tokens are ranked upside down.
        fault = Fault("_keys", "ordered_bits(score)", "ordered_bits(-score)", frozenset())
        with planted(fault, tmp_path / "kernels"):
            assert "kept tokens that differ" in with_fault("select")

        # The last block of keys is left out.
        blocks = flash_attention.key_blocks
        monkeypatch.setattr(
            flash_attention,
            "key_blocks",
            lambda length, split, number: blocks(max(1, length - 16), split, number),
        )
        assert "attention against float32" in with_fault("attention")


# --------------------------------------------------------------------------------------------------
# The comparisons, each with a planted difference

TORCH, OURS = EngineSetup("FLASH_ATTN", operations="torch"), EngineSetup("FLASH_ATTN")
GRAPHS, PLAIN = EngineSetup("FLASH_ATTN", True), EngineSetup("FLASH_ATTN", evicts=False)


def outputs(shift: float = 0.0, token: int = 7) -> list[list[Step]]:
    later = Step(token, {token: -0.5 + shift, 8: -2.0})
    return [[Step(5, {5: -0.1, 6: -3.0}), later, later] for _ in range(5)]


def kept(layers: tuple[int, ...] = (32, 64), start: int = 0) -> dict[int, list[list[list[int]]]]:
    one = [[[*range(start, start + count)] for _ in range(2)] for count in layers]
    return dict.fromkeys(range(engines.NUM_EVICTED), one)


def a_run(**changes: Any) -> EngineRun:
    arguments: dict[str, Any] = {
        "kept": kept(),
        "mixed": outputs(),
        "whole": outputs(),
        "attention_error": 0.005,
        "attention_calls": 8,
    }
    return EngineRun(**arguments | changes)


def rows_of(**runs: EngineRun) -> list[Row]:
    names = {"torch": TORCH, "ours": OURS, "graphs": GRAPHS, "plain": PLAIN}
    found = {names[name]: a_run() for name in names}
    found[GRAPHS] = a_run(attention_error=math.nan)
    found |= {names[name]: one for name, one in runs.items()}
    return [*engines.compare(found)]


def wrong(**runs: EngineRun) -> set[tuple[str, str]]:
    return {(row.name, row.case) for row in failing(rows_of(**runs))}


def test_equal_engines_pass() -> None:
    rows = rows_of()
    assert not failing(rows)
    assert len(rows) == 14


@pytest.mark.parametrize("error", [0.03, math.nan, math.inf])
def test_wrong_attention(error: float) -> None:
    assert wrong(ours=a_run(attention_error=error)) == {
        ("attention against float32", "FLASH_ATTN, eager")
    }
    assert wrong(plain=a_run(attention_error=error)) == {
        ("attention against float32", "FLASH_ATTN, eager, without eviction")
    }


def test_a_request_that_is_not_evicted() -> None:
    fewer = kept()
    del fewer[1]
    assert ("requests not evicted", "FLASH_ATTN, eager") in wrong(ours=a_run(kept=fewer))
    assert ("requests not evicted", "FLASH_ATTN, eager, torch operations") in wrong(
        torch=a_run(kept=fewer)
    )


def test_one_page_may_move_between_layers() -> None:
    assert not wrong(ours=a_run(kept=kept((48, 48))))
    assert ("pages moved between layers", "FLASH_ATTN, eager") in wrong(
        ours=a_run(kept=kept((64, 32)))
    )


def test_other_tokens_are_kept() -> None:
    assert not wrong(ours=a_run(kept=kept(start=1)))  # 2 of 96 tokens
    assert ("kept tokens that differ", "FLASH_ATTN, eager") in wrong(ours=a_run(kept=kept(start=5)))


def test_other_outputs_of_the_same_cache() -> None:
    different = a_run(mixed=outputs(shift=-0.3))
    assert wrong(ours=different) == {
        ("log-probabilities of the same cache", "FLASH_ATTN, eager"),
        ("log-probabilities against eager", "FLASH_ATTN, graphs"),
    }
    assert wrong(graphs=a_run(mixed=outputs(token=9))) == {
        ("log-probabilities of the same cache", "FLASH_ATTN, graphs"),
        ("log-probabilities against eager", "FLASH_ATTN, graphs"),
    }
    # Where another token was kept, outputs may differ; requests that are not evicted may not.
    whole = outputs()[engines.NUM_EVICTED :]
    evicted = outputs(shift=-0.3)[: engines.NUM_EVICTED]
    elsewhere = a_run(kept=kept(start=1), mixed=evicted + whole)
    assert wrong(ours=elsewhere) == {("log-probabilities against eager", "FLASH_ATTN, graphs")}


def test_nothing_evicted_must_be_exact() -> None:
    assert wrong(ours=a_run(whole=outputs(shift=1e-3))) == {
        ("nothing evicted, against vLLM", "FLASH_ATTN, eager")
    }


def test_no_number_passes_for_none() -> None:
    assert math.isnan(engines.logprob_difference(outputs(math.nan), outputs()))
    assert math.isnan(engines.logprob_difference(outputs(), outputs(math.nan)))
    late = engines.logprob_difference([outputs(math.nan)[0], outputs()[0]], outputs()[:2])
    assert math.isnan(late)


def test_attention_of_the_last_tokens() -> None:
    """Against torch's own attention over contiguous keys and values."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(6, 2, 4, 16, generator=generator)
    query = torch.randn(3, 4, 8, generator=generator)
    pages = torch.tensor([4, 1, 5, 0], dtype=torch.int32)
    found = engines.attention(query, cache, pages, 10, 0.3)
    cells = torch.cat([cache[page] for page in pages.tolist()], 1)[:, :10]
    key, value = (part.repeat_interleave(2, 0)[None] for part in cells.split(8, -1))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key,
        value,
        attn_mask=torch.ones(3, 10, dtype=torch.bool).tril(7),
        scale=0.3,
    )
    torch.testing.assert_close(found, expected[0].transpose(0, 1))


def test_engines_of_a_gpu() -> None:
    found = engines.setups(["FLASH_ATTN", "TRITON_ATTN"])
    assert found[0].operations == "torch"
    assert all(setup.operations == "triton" for setup in found[1:])
    for backend in hooks.GPU_BACKENDS:
        for graphs in (True, False):
            for evicts in (True, False):
                assert EngineSetup(backend, graphs, evicts) in found
