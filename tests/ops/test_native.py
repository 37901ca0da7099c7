# SPDX-License-Identifier: Apache-2.0
"""Whether the C++ operators are there and who serves."""

import shutil
import sysconfig

import pytest
import torch

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
    for name in ("observe", "select", "compact", "layer_tables"):
        assert hasattr(torch.ops.vl_cache, name)


@needs_library
def test_what_they_do_not_expect_is_an_error() -> None:
    wide = torch.zeros(2, 3, 4, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.ops.vl_cache.observe(
            CPU.expand(1, 2, 4), wide, 2, 1.0, 0.01, 0.0, wide[..., 0], wide.sum(), None
        )
