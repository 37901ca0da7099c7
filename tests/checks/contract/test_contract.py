# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM satisfies the contract, and violations are reported with exact messages."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from checks.contract.__main__ import main, violations
from checks.contract.rows import (
    Abstract,
    Called,
    Defined,
    Exists,
    Extends,
    Has,
    Never,
    Overridden,
    Row,
    Steps,
)
from checks.contract.sources import NotFoundError, Sources, installed, signature
from checks.contract.table import CONTRACT
from vl_cache_vllm import hooks

ROOT = Path(__file__).parents[3] / "vl_cache_vllm"


@pytest.fixture(scope="module")
def vllm() -> Sources:
    return Sources(installed())


def test_the_installed_vllm_satisfies_the_contract(vllm: Sources) -> None:
    assert violations(vllm) == []


HOST = {
    "__init__.py": "from .engine import Engine as Engine\n",
    "base.py": """
from abc import ABC, abstractmethod
from functools import cache

class Base(ABC):
    pool: list[int] | None = None

    def __init__(self, size):
        self.size, self.rows = size, {}

    @abstractmethod
    def output(self): ...

    def allocate(self, request, num_tokens, limit=None, *, boundaries) -> list[int]:
        return []

@cache
def chosen(name):
    return name
""",
    "engine.py": '''
from enum import Enum
from typing import TYPE_CHECKING

import torch

import host.base
from host.base import Base
from host.base import *

if TYPE_CHECKING:
    from host.base import Base as Other

LIMIT = 4

class Kind(Enum):
    CPU = "cpu"

class Engine(Base, torch.nn.Module):
    @staticmethod
    def add(parser, flags=()):
        """free(a) comes last"""
        return parser

    def step(self, request):
        # free(request) comes last
        for blocks in self.rows:
            self.free(request)
        self.allocate(
            request,
            num_tokens=3,
            boundaries=(),
        )
        return self.output()
''',
}

ROWS: tuple[Row, ...] = (
    Exists("host:Engine"),
    Exists("host.engine:Other"),
    Exists("host.engine:chosen"),
    Exists("host.engine:host.base.Base"),
    Has("host.engine:Engine", "pool size rows add"),
    Has("host.engine:Kind", "CPU"),
    Defined("host.engine:LIMIT", "LIMIT = 4"),
    Defined("host.engine:Engine.pool", "pool: ... | None = None"),
    Called("host:Engine", "size"),
    Called("host.engine:Engine.add", "parser, flags="),
    Called("host.base:chosen.cache_clear"),
    Overridden(
        "host.engine:Engine.allocate",
        "request, num_tokens, limit=, *, boundaries",
        "list[int]",
    ),
    Overridden("host.engine:Engine.step", "request, ..."),
    Extends("host.engine:Engine", "host.base:Base"),
    Abstract("host.base:Base", "output"),
    Steps(
        "host.engine:Engine.step",
        ("self.free(", "self.allocate(...boundaries=", "self.output()"),
    ),
    Never("host.engine:Engine.add", "free("),
)


def lines(folder: Path, changes: tuple[tuple[str, str, str], ...]) -> list[str]:
    """Violations in the example host after changes (file, old, new)."""
    host = folder / "host"
    host.mkdir()
    files = dict(HOST)
    for file, old, new in changes:
        assert old in files[file], "the change would change nothing"
        files[file] = files[file].replace(old, new)
    for file, text in files.items():
        (host / file).write_text(text)
    return [line for row in ROWS for line in row.violations(Sources(host))]


def test_a_host_that_satisfies_all_rows(tmp_path: Path) -> None:
    assert lines(tmp_path, ()) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            [("engine.py", "def add(", "def put(")],
            [
                "host.engine:Engine.add: expected it to exist, found nothing of that name in "
                "Engine",
                "host.engine:Engine.add: expected to be callable as (parser, flags=), found "
                "nothing of that name in Engine",
                "host.engine:Engine.add: expected no `free(` in it, found nothing of that name in "
                "Engine",
            ],
            id="renamed method",
        ),
        pytest.param(
            [("base.py", "self.size, self.rows = size, {}", "self.rows = {}")],
            ["host.engine:Engine.size: expected it to exist, found nothing of that name in Engine"],
            id="missing attribute",
        ),
        pytest.param(
            [("base.py", "pool: list[int] | None = None", "pool: list[int]")],
            [
                "host.engine:Engine.pool: expected `pool: ... | None = None`, found "
                "`pool: list[int]`"
            ],
            id="other type",
        ),
        pytest.param(
            [("engine.py", '    CPU = "cpu"', '    GPU = "gpu"')],
            ["host.engine:Kind.CPU: expected it to exist, found nothing of that name in Kind"],
            id="missing member",
        ),
        pytest.param(
            [("base.py", "limit=None, *, boundaries)", "*, limit=None)")],
            [
                "host.engine:Engine.allocate: expected parameters (request, num_tokens, limit=, "
                "*, boundaries), found (request, num_tokens, *, limit=)"
            ],
            id="changed parameters",
        ),
        pytest.param(
            [("base.py", "-> list[int]", "-> tuple[int, ...]")],
            ["host.engine:Engine.allocate: expected it to return list[int], found tuple[int, ...]"],
            id="other result",
        ),
        pytest.param(
            [("base.py", "__init__(self, size)", "__init__(self, size, shape)")],
            ["host:Engine: expected to be callable as (size), found (size, shape)"],
            id="new required parameter",
        ),
        pytest.param(
            [
                ("engine.py", "self.free(request)", "pass"),
                ("engine.py", "return self.output()", "self.free(request); return self.output()"),
            ],
            [
                "host.engine:Engine.step: expected `self.free(` before "
                "`self.allocate(...boundaries=`, found it after"
            ],
            id="swapped calls",
        ),
        pytest.param(
            [("engine.py", "boundaries=(),", "")],
            ["host.engine:Engine.step: expected `self.allocate(...boundaries=` in it, found none"],
            id="dropped keyword",
        ),
        pytest.param(
            [("engine.py", "return parser", "return free(parser)")],
            ["host.engine:Engine.add: expected no `free(` in it, found `free(`"],
            id="new call",
        ),
        pytest.param(
            [("base.py", "    def allocate", "    @abstractmethod\n    def allocate")],
            ["host.base:Base: expected no abstract methods but (output), found (allocate output)"],
            id="new abstract method",
        ),
        pytest.param(
            [("base.py", "@cache\n", "")],
            [
                "host.base:chosen.cache_clear: expected to be callable as (), found no such "
                "attribute, decorators ()"
            ],
            id="no longer cached",
        ),
        pytest.param(
            [("engine.py", "LIMIT = 4", "LIMIT = 5")],
            ["host.engine:LIMIT: expected `LIMIT = 4`, found `LIMIT = 5`"],
            id="other constant",
        ),
        pytest.param(
            [("engine.py", "class Engine(Base, ", "class Engine(Kind, ")],
            [
                "host.engine:Engine.pool: expected it to exist, found nothing of that name in "
                "Engine",
                "host.engine:Engine.size: expected it to exist, found nothing of that name in "
                "Engine",
                "host.engine:Engine.rows: expected it to exist, found nothing of that name in "
                "Engine",
                "host.engine:Engine.pool: expected `pool: ... | None = None`, found nothing of "
                "that name in Engine",
                "host:Engine: expected to be callable as (size), found ()",
                "host.engine:Engine.allocate: expected parameters (request, num_tokens, limit=, "
                "*, boundaries), found nothing of that name in Engine",
                "host.engine:Engine: expected it to derive from host.base:Base, found Kind",
            ],
            id="other base",
        ),
    ],
)
def test_what_a_change_is_reported_as(
    tmp_path: Path, changes: list[tuple[str, str, str]], expected: list[str]
) -> None:
    assert lines(tmp_path, tuple(changes)) == expected


def test_a_module_that_moved(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "__init__.py").write_text("from .engine import Engine\n")
    host = Sources(tmp_path / "host")
    assert [*Exists("host.engine:Engine").violations(host)] == [
        "host.engine:Engine: expected it to exist, found no module host.engine"
    ]
    assert [*Has("host:Engine", "a b").violations(host)] == [
        "host:Engine: expected it to exist, found Engine is imported from host.engine, which is "
        "not there"
    ]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vllm"
    folder.mkdir()
    for file in ("__init__.py", "_version.py"):
        (folder / file).write_text("__version__ = version = '9.1'\n")
    assert main([str(folder)]) == 1
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == (
        "plugin.py: vllm.plugins:DEFAULT_PLUGINS_GROUP: expected "
        "`DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'`, found no module vllm.plugins"
    )
    assert last.startswith("vLLM 9.1: ")
    assert main([str(tmp_path)]) == 2
    assert "is not the folder of a Python package" in capsys.readouterr().err
    monkeypatch.setattr("checks.contract.__main__.installed", lambda: folder)
    monkeypatch.setattr("checks.contract.__main__.CONTRACT", {"cli.py": (Exists("vllm"),)})
    assert main([]) == 0
    assert capsys.readouterr().out == "vLLM 9.1: 0 of 1 expectations not met\n"


# The table is complete.

SOURCES = sorted(ROOT.rglob("*.py"))


def used_names(tree: ast.AST) -> Iterator[str]:
    """All names of vLLM that a file imports or reads from imported modules, as targets."""
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names if is_vllm(a.name)}
        elif isinstance(node, ast.ImportFrom) and is_vllm(node.module or ""):
            for alias in node.names:
                if is_module(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                else:
                    yield f"{node.module}:{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in modules:
            yield f"{modules[ast.unparse(node.value)]}:{node.attr}"


def is_vllm(module: str) -> bool:
    return module.split(".")[0] == "vllm"


def is_module(name: str) -> bool:
    path = installed().parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def targets(rows: tuple[Row, ...]) -> set[str]:
    return {target for row in rows for target in (row.target, getattr(row, "base", row.target))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_in_the_table(path: Path) -> None:
    known = targets(CONTRACT.get(str(path.relative_to(ROOT)), ()))
    used = set(used_names(ast.parse(path.read_text(encoding="utf-8"))))
    missing = {
        name for name in used if not any(t == name or t.startswith(f"{name}.") for t in known)
    }
    assert missing == set()


def test_imports_are_seen() -> None:
    """Without this, the test above could pass because it finds no imports."""
    source = """
import vllm
from vllm import envs
from vllm.v1.request import Request
def late():
    from vllm.v1.attention import selector
    return vllm.__version__, envs.VLLM_X, selector.choose(), Request
"""
    assert set(used_names(ast.parse(source))) == {
        "vllm:__version__",
        "vllm.envs:VLLM_X",
        "vllm.v1.request:Request",
        "vllm.v1.attention.selector:choose",
    }


def test_the_table_names_files_that_exist() -> None:
    assert set(CONTRACT) <= {str(path.relative_to(ROOT)) for path in SOURCES}


def test_every_hook_is_in_the_table() -> None:
    known = {
        f"{row.target}.{name}"
        for rows in CONTRACT.values()
        for row in rows
        for name in (row.names.split() if isinstance(row, Has) else ())
    } | {target for rows in CONTRACT.values() for target in targets(rows)}
    # The release of LMCache is checked at start-up.
    assert {hook.target for hook in hooks.HOOKS if hook.target.startswith("vllm.")} <= known
    assert {":".join(worker.rsplit(".", 1)) for worker in hooks.WORKERS} <= {
        target.rpartition(".")[0] for target in known
    }


def overriding_methods(vllm: Sources) -> Iterator[tuple[str, str, inspect.Signature, ast.AST]]:
    """(class, method, its signature, vLLM's method) for each method that this package overrides."""
    ours = Sources(ROOT)
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
        module = ours.module(name)
        if module is None:
            continue
        for class_name, node in module.names.items():
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                origin = module.names.get(ast.unparse(base))
                if not isinstance(origin, ast.ImportFrom) or not is_vllm(origin.module or ""):
                    continue
                theirs = vllm.members(vllm.find(f"{origin.module}:{ast.unparse(base)}"))
                for method, symbol in ours.members(ours.find(f"{name}:{class_name}")).items():
                    if isinstance(symbol.node, ast.FunctionDef) and method in theirs:
                        found = theirs[method].node
                        assert found is not None
                        yield class_name, method, signature(ours, symbol), found


def fits(ours: inspect.Signature, parameters: str) -> bool:
    """Whether a signature accepts the parameters of a row, by position and by name."""
    is_open = parameters.endswith("...")
    text = parameters.removesuffix("...").removesuffix(", ").replace("=", "=0")
    (function,) = ast.parse(f"def f({text}): ...").body
    assert isinstance(function, ast.FunctionDef)
    positional = [argument.arg for argument in function.args.args]
    keywords = {argument.arg: 0 for argument in function.args.kwonlyargs}
    more = {"_and_whatever_else": 0} if is_open else {}
    try:
        ours.bind(*positional, *more, **keywords)
        ours.bind(**dict.fromkeys(positional), **keywords, **more)
    except TypeError:
        return False
    return True


def test_every_method_that_we_override_is_in_the_table_and_fits(vllm: Sources) -> None:
    rows = {
        vllm.find(row.target).node: row
        for rows in CONTRACT.values()
        for row in rows
        if isinstance(row, Overridden)
    }
    found = [*overriding_methods(vllm)]
    names = {f"{cls}.{method}" for cls, method, _, _ in found}
    assert {
        "EvictionBlockManager.allocate_new_blocks",
        "AsyncEvictionScheduler._get_local_prefix_cache_hit",
        "EvictionCPUWorker.execute_model",
    } <= names
    unlisted = [f"{cls}.{method}" for cls, method, _, node in found if node not in rows]
    assert unlisted == []
    unfit = [
        f"{cls}.{method}"
        for cls, method, ours, node in found
        if not fits(ours, rows[node].parameters)
    ]
    assert unfit == []


def test_what_fits() -> None:
    def method(request, limit=None, *args, **kwargs) -> None: ...

    def strict(request, limit=None, *, boundaries) -> None: ...

    assert fits(inspect.signature(method), "request, limit=, ...")
    assert fits(inspect.signature(strict), "request, limit=, *, boundaries")
    assert not fits(inspect.signature(strict), "request, limit=, ...")
    assert not fits(inspect.signature(strict), "request, *, limits, boundaries")
    assert not fits(inspect.signature(strict), "request, limit=, other=, *, boundaries")


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is not the folder of a Python package"):
        Sources(tmp_path)
