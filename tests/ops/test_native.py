# SPDX-License-Identifier: Apache-2.0
"""The C++ operators: whether they are built, which implementation runs, and their registration."""

import shutil
import sysconfig
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vl_cache_vllm.ops import dispatch, native

COMPILER = (sysconfig.get_config_var("CXX") or "g++").split()[0]
CPU = torch.zeros(1)
needs_library = pytest.mark.skipif(
    not native.is_built(), reason="the C++ operators have not been built"
)


def test_where_there_is_a_compiler_they_are_built() -> None:
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no {COMPILER}")
    assert native.is_built()


def test_who_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    served = dispatch.implementation_for
    assert served(torch.device("cpu")) == ("cpp" if native.is_built() else "torch")
    assert served(torch.device("cuda")) == "triton"
    assert served(torch.device("meta")) == "torch"
    with dispatch.use("torch"):
        assert served(torch.device("cpu")) == served(torch.device("cuda")) == "torch"
    monkeypatch.setattr(native, "_library", None)
    assert served(torch.device("cpu")) == "torch"


def test_they_cannot_serve_unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", None)
    with pytest.raises(RuntimeError, match="have not been built"), dispatch.use("cpp"):
        pass


@needs_library
def test_they_are_torch_operators() -> None:
    assert {
        "observe",
        "select",
        "rank",
        "look_ahead",
        "compact",
        "layer_tables",
    } == native.OPERATIONS
    for name in native.OPERATIONS:
        assert hasattr(torch.ops.vl_cache, name)


def arguments(name: str) -> tuple[Any, ...]:
    """A small valid call: 2 layers, 2 KV heads, 4 tokens per block, 8 elements per key."""
    int64 = torch.int64
    if name == "observe":
        query, key = torch.rand(3, 4, 8), torch.rand(2, 9, 8)
        dense_entries = torch.zeros((), dtype=int64)
        return query, key, 6, 0.3, 0.01, 0.0, torch.zeros(2, 9), dense_entries, torch.rand(2, 3)
    if name == "select":
        ends, kept = torch.tensor([8, 9]), torch.tensor([8, 8])  # no entry without a meaning
        return torch.rand(2, 2, 9), ends, kept, 0.1, 8, torch.arange(9)
    if name == "compact":
        index = torch.arange(32).view(4, 8)
        positions = torch.arange(8, dtype=torch.int32).expand(2, 2, 8).contiguous()
        source_pages = torch.tensor([[0, 1, 2], [4, 5, 6]], dtype=torch.int32)
        kept = torch.tensor([3]), torch.tensor([1, 1])
        return torch.rand(8, 2, 64), index, index + 32, source_pages, *kept, positions, 0, 4, 1
    if name == "rank":
        return (torch.rand(2, 2, 9),)
    if name == "look_ahead":
        return torch.rand(2, 2, 9), torch.rand(4).double(), torch.rand(4).double(), 0.5
    assert name == "layer_tables"
    evicted = torch.tensor([8]), torch.tensor([[3]]), torch.tensor([[1, 1]])
    return (
        torch.arange(5, dtype=torch.int32)[None],
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([10], dtype=torch.int32),
        *evicted,
        *(4, 5, 1),
        torch.zeros(2, 1, 2, dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, 1, dtype=int64),
    )


@needs_library
@pytest.mark.parametrize("name", sorted(native.OPERATIONS))
def test_they_are_registered_correctly(name: str) -> None:
    """`torch.library.opcheck` tests the schema, what is written, and the fake implementation."""
    operator = getattr(torch.ops.vl_cache, name).default
    checks = torch.library.opcheck(operator, arguments(name))
    assert set(checks.values()) == {"SUCCESS"}, checks


@needs_library
@pytest.mark.parametrize("name", sorted(native.OPERATIONS))
def test_fakes_return_what_the_operators_return(name: str) -> None:
    operator = getattr(torch.ops.vl_cache, name)
    real = operator(*arguments(name))
    with FakeTensorMode():
        fake = operator(*arguments(name))
    if name not in ("select", "rank", "look_ahead"):
        assert real is fake is None
        return
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)
    meta = operator(*(one.to("meta") if hasattr(one, "to") else one for one in arguments(name)))
    assert meta.shape == real.shape and meta.device.type == "meta"


@needs_library
def test_what_they_do_not_expect_is_an_error() -> None:
    wide = torch.zeros(2, 3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.ops.vl_cache.observe(
            CPU.expand(1, 2, 4), wide, 2, 1.0, 0.01, 0.0, wide[..., 0], wide.sum(), None
        )


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take its arguments for others."""
    assert native._load() is not None
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    with pytest.warns(UserWarning, match="built from other sources.*build it again"):
        assert native._load() is None
