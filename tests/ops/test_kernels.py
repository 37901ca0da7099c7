# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels as machine code: what compiles here runs on a GPU without spilling.

That they are right is tested with the operations, through the interpreter.
"""

import os

import pytest
import torch

from benchmarks import kernels

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled for the interpreter"
)


@needs_compiler
@pytest.mark.parametrize("architecture", kernels.ARCHITECTURES, ids=lambda sm: f"sm_{sm}")
@pytest.mark.parametrize("shape", ["0.5b", "7b-gqa"])
def test_all_compile_without_spilling(shape: str, architecture: int) -> None:
    found = [
        kernels.compile_for(one, architecture)
        for one in kernels.launches(kernels.ATTENTION_SHAPES[shape])
    ]
    assert {row["kernel"] for row in found} == {
        "layer_tables_kernel",
        "statistics_kernel",
        "columns_kernel",
        "apportion_kernel",
        "select_kernel",
        "compact_kernel",
    }
    for row in found:
        assert row["registers"] > 0
        assert row["spilled_bytes"] == 0, row


@needs_compiler
def test_a_ratio_of_recent_tokens_is_not_compiled_in() -> None:
    from vl_cache_vllm.kernels.select import select_kernel

    types = {one.name: one.annotation_type for one in select_kernel.params if not one.is_constexpr}
    assert types["recent_ratio"] == "fp64"


def test_the_benchmark_compares_every_operation() -> None:
    found = kernels.compare("torch", torch.device("cpu"))
    names = {
        operation.name
        for operation in kernels.SyntheticPrompt(
            kernels.ATTENTION_SHAPES["tiny"], 208, 16, torch.device("cpu")
        ).operations()
    }
    assert {row["operation"] for row in found} == {*names, "dense_entries"}


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    select = kernels.select
    calls = 0

    def wrong(*args: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return (select(*args) - calls // 3).clamp(min=0)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "select", wrong)
    with pytest.raises(AssertionError):
        kernels.compare("torch", torch.device("cpu"))
