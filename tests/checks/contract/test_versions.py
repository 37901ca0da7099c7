# SPDX-License-Identifier: Apache-2.0
"""With an unsupported vLLM, users get a message, and serving without eviction works."""

import argparse
import logging
import multiprocessing
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vl_cache_vllm import hooks, plugin
from vl_cache_vllm.support import unsupported_version
from vl_cache_vllm.warn import warn_once

RANGE = "this version of vl-cache-vllm supports >={},<{}".format(*hooks.SUPPORTED_VLLM)
REASON = f"vLLM 0.99.0: {RANGE}"


class ForeignArgs:
    """`EngineArgs` of a future vLLM that still has these methods."""

    additional_config: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        vars(self).update(given)

    @staticmethod
    def add_cli_args(parser: Any, *, style: str = "new") -> Any:
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace, style: str = "new") -> "ForeignArgs":
        return cls(additional_config=getattr(args, "additional_config", {}))

    def create_engine_config(self) -> str:
        return "vLLM's own"


class RenamedArgs:
    """`EngineArgs` without `from_cli_args`."""

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        return parser

    def create_engine_config(self) -> str:
        return "vLLM's own"


@pytest.fixture
def told() -> Iterator[list[str]]:
    """Messages that a user sees at vLLM's default log level."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vl_cache")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    warn_once.cache_clear()
    yield messages
    warn_once.cache_clear()
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replace `EngineArgs` by a class, with vLLM reporting version 0.99."""
    monkeypatch.setattr("vllm.__version__", "0.99.0")

    def use(cls: type | None) -> Any:
        module = ModuleType("vllm.engine.arg_utils")
        if cls is not None:
            module.EngineArgs = type("EngineArgs", (cls,), {})  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", module)
        return getattr(module, "EngineArgs", None)

    yield use


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.dev3+gabc", "0.32.0+cpu", "0.33.0"])
def test_supported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    assert unsupported_version() is None


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "0.34.0rc1", "1.0", "dev"])
def test_unsupported(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    assert unsupported_version() == f"vLLM {version}: {RANGE}"


def test_plain_serving_goes_on(foreign: Any, told: list[str]) -> None:
    engine_args = foreign(ForeignArgs)
    plugin.register()
    parser = engine_args.add_cli_args(argparse.ArgumentParser(), style="old")
    for _ in range(2):
        args = engine_args.from_cli_args(parser.parse_args([]), style="old")
        assert args.create_engine_config() == "vLLM's own"
    assert told == [f"KV compression is not available with {REASON}"]


@pytest.mark.parametrize("how", ["flags", "additional_config"])
def test_eviction_is_refused(how: str, foreign: Any, told: list[str]) -> None:
    engine_args = foreign(ForeignArgs)
    plugin.register()
    parser = engine_args.add_cli_args(argparse.ArgumentParser())
    args = engine_args.from_cli_args(parser.parse_args(["--kv-compress=vlcache"]))
    if how == "additional_config":
        args = engine_args(additional_config={"kv_compress": {"policy": "vlcache"}})
    with pytest.raises(ValueError) as raised:
        args.create_engine_config()
    assert str(raised.value) == f"--kv-compress vlcache cannot be used with {REASON}"
    assert told == []


def test_a_place_for_settings_that_is_gone(foreign: Any, told: list[str]) -> None:
    engine_args = foreign(ForeignArgs)
    plugin.register()
    assert engine_args().create_engine_config() == "vLLM's own"
    assert told == [f"KV compression is not available with {REASON}"]


@pytest.mark.parametrize("left", [RenamedArgs, None], ids=["no method", "no class"])
def test_no_place_for_the_flags(left: type | None, foreign: Any, told: list[str]) -> None:
    engine_args = foreign(left)
    plugin.register()
    plugin.register()
    if engine_args is not None:
        assert engine_args.add_cli_args is RenamedArgs.add_cli_args
        assert engine_args().create_engine_config() == "vLLM's own"
    assert told == [f"KV compression is not available, nor are its flags, with {REASON}"]


def test_a_supported_vllm_without_them_is_an_error(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    foreign(RenamedArgs)
    monkeypatch.setattr("vllm.__version__", "0.32.0")
    with pytest.raises(AttributeError):
        plugin.register()
    assert told == []


def test_engine_processes_do_not_repeat_it(
    foreign: Any, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    foreign(None)
    monkeypatch.setattr(multiprocessing, "parent_process", SimpleNamespace)
    plugin.register()
    assert told == []
