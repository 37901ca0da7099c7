# SPDX-License-Identifier: Apache-2.0
"""Reads vLLM's Python sources with `ast`, without importing them, so any release can be checked."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class NotFoundError(LookupError):
    """A name does not exist; the message says which part of it."""


def installed() -> Path:
    """The folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@dataclass(frozen=True, eq=False)
class Module:
    name: str
    package: str  # base of its relative imports
    names: dict[str, ast.AST]  # definitions and imports at top level; the last one of each name
    stars: tuple[str, ...]  # modules from which it imports ``*``


@dataclass(frozen=True, eq=False)
class Symbol:
    """What a name refers to: a module (``node`` is None) or a definition in it."""

    module: Module
    node: ast.AST | None = None
    owner: ast.ClassDef | None = None  # the class that defines it in its body or methods

    @property
    def is_method(self) -> bool:
        """Whether a call through the class or an instance binds the first parameter."""
        return (
            self.owner is not None
            and isinstance(self.node, _FUNCTIONS)
            and "staticmethod" not in map(ast.unparse, self.node.decorator_list)
        )


class Sources:
    """The Python sources of a package.

    Args:
        folder: the folder of the package, installed or from an unpacked wheel; its name is the
            name of the package.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "__init__.py").is_file():
            raise NotFoundError(f"{folder} is not the folder of a Python package")
        self.folder = folder
        self.module = functools.cache(self._module)
        self._members: dict[ast.AST, dict[str, Symbol]] = {}

    @property
    def version(self) -> str:
        """The version that the build wrote into ``_version.py``."""
        for line in (self.folder / "_version.py").read_text(encoding="utf-8").splitlines():
            if line.startswith("__version__ ="):
                return str(ast.literal_eval(line.rpartition("=")[2].strip()))
        return "unknown"

    def find(self, target: str) -> Symbol:
        """The definition of ``module:qualified.name``; follows imports and base classes.

        Raises:
            NotFoundError: if there is none.
        """
        name, _, path = target.partition(":")
        module = self.module(name)
        if module is None:
            raise NotFoundError(f"no module {name}")
        symbol = Symbol(module)
        for part in path.split(".") if path else ():
            symbol = self._step(symbol, part)
        return symbol

    def bases(self, cls: Symbol) -> Iterator[Symbol]:
        """The base classes of a class that belong to the same package, nearest first."""
        assert isinstance(cls.node, ast.ClassDef)
        for base in cls.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            try:
                symbol = Symbol(cls.module)
                for part in ast.unparse(expression).split("."):
                    symbol = self._step(symbol, part)
            except NotFoundError:
                continue  # of another package
            if isinstance(symbol.node, ast.ClassDef):
                yield symbol
                yield from self.bases(symbol)

    def _module(self, name: str) -> Module | None:
        path = self.folder.parent.joinpath(*name.split("."))
        package = (path / "__init__.py").is_file()
        file = path / "__init__.py" if package else path.with_suffix(".py")
        if name.split(".")[0] != self.folder.name or not file.is_file():
            return None
        names: dict[str, ast.AST] = {}
        stars = []
        for node in _statements(ast.parse(file.read_bytes()).body):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                stars.append(_absolute(node, name if package else name.rpartition(".")[0]))
            else:
                names.update(dict.fromkeys(_defined(node), node))
        return Module(name, name if package else name.rpartition(".")[0], names, tuple(stars))

    def _step(self, symbol: Symbol, name: str) -> Symbol:
        if symbol.node is None:
            return self._in_module(symbol.module, name)
        if not isinstance(symbol.node, ast.ClassDef):
            return _attribute(symbol, name)
        found = self.members(symbol).get(name)
        if found is None:
            raise NotFoundError(f"nothing of that name in {symbol.node.name}")
        return found

    def _in_module(self, module: Module, name: str) -> Symbol:
        node = module.names.get(name)
        if isinstance(node, ast.ImportFrom):
            origin = _absolute(node, module.package)
            (original,) = (a.name for a in node.names if (a.asname or a.name) == name)
            source = self.module(origin)
            if source is None:
                raise NotFoundError(f"{name} is imported from {origin}, which is not there")
            return self._in_module(source, original)
        if isinstance(node, ast.Import):
            whole = [a.name for a in node.names if a.asname == name]
            if (source := self.module(whole[0] if whole else name)) is not None:
                return Symbol(source)
        elif node is not None:
            return Symbol(module, node)
        if (source := self.module(f"{module.name}.{name}")) is not None:
            return Symbol(source)
        for star in module.stars:
            if (source := self.module(star)) is not None:
                try:
                    return self._in_module(source, name)
                except NotFoundError:
                    pass
        raise NotFoundError(f"nothing of that name in {module.name}")

    def members(self, cls: Symbol) -> dict[str, Symbol]:
        """Methods, fields and assigned attributes of a class and its bases, by name."""
        assert cls.node is not None
        if cls.node in self._members:
            return self._members[cls.node]
        result = self._members[cls.node] = {}
        for symbol in (cls, *self.bases(cls)):
            assert isinstance(symbol.node, ast.ClassDef)
            own: dict[str, ast.AST] = {}
            for statement in _statements(symbol.node.body):
                own.update(dict.fromkeys(_defined(statement), statement))
            for method in [node for node in own.values() if isinstance(node, _FUNCTIONS)]:
                for name, node in _assigned_attributes(method):
                    own.setdefault(name, node)
            for name, node in own.items():
                result.setdefault(name, Symbol(symbol.module, node, symbol.node))
        return result


def signature(sources: Sources, symbol: Symbol) -> inspect.Signature:
    """The parameters that a caller passes; every default is ``...``.

    For a method they exclude the first parameter. For a class they are those of its constructor.
    """
    if isinstance(symbol.node, ast.ClassDef):
        init = sources.members(symbol).get("__init__")
        if init is not None:
            return signature(sources, init)
        return inspect.Signature(_dataclass_parameters(sources, symbol))
    if not isinstance(symbol.node, _FUNCTIONS):
        raise NotFoundError("no function")
    arguments = symbol.node.args
    kinds = inspect.Parameter
    first_keyword = len(arguments.posonlyargs)
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    parameters = [
        kinds(
            a.arg,
            kinds.POSITIONAL_ONLY if i < first_keyword else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if i < first_default else ...,
        )
        for i, a in enumerate(positional)
    ]
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(a.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters[1:] if symbol.is_method else parameters)


def text_of(call: inspect.Signature) -> str:
    """A signature in the notation of the table: ``request, num_tokens, limit=, *, boundaries``."""
    return str(call).strip("()").replace("=Ellipsis", "=")


def body_of(symbol: Symbol) -> str:
    """The statements of a function, one a line, without comments, docstring and formatting."""
    if not isinstance(symbol.node, _FUNCTIONS):
        raise NotFoundError("no function")
    body = symbol.node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return "\n".join(map(ast.unparse, body))


def abstract_methods(sources: Sources, cls: Symbol) -> list[str]:
    """The methods that a subclass must define."""
    return sorted(
        name
        for name, member in sources.members(cls).items()
        if isinstance(member.node, _FUNCTIONS)
        and any("abstractmethod" in ast.unparse(d) for d in member.node.decorator_list)
    )


def _attribute(symbol: Symbol, name: str) -> Symbol:
    """An attribute of a function or value. Only ``cache_clear`` of a cached function is known."""
    decorators = " ".join(map(ast.unparse, getattr(symbol.node, "decorator_list", ())))
    if name != "cache_clear" or "cache" not in decorators:
        raise NotFoundError(f"no such attribute, decorators ({decorators})")
    return Symbol(symbol.module, ast.parse("def cache_clear(): ...").body[0])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, including those inside if, try and with."""
    for node in body:
        yield node
        for attribute in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
                yield from _statements(getattr(node, attribute, []))


def _defined(node: ast.stmt) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import():
            return [alias.asname or alias.name.split(".")[0] for alias in node.names]
        case ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.AnnAssign():
            return [ast.unparse(node.target)]
        case ast.Assign():
            parts = (part for target in node.targets for part in ast.walk(target))
            return [part.id for part in parts if isinstance(part, ast.Name)]
    return []


def _assigned_attributes(method: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(method):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                    yield part.attr, node


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    parents = parents[: len(parents) - node.level + 1]
    return ".".join([*parents, *([node.module] if node.module else [])])


def _dataclass_parameters(sources: Sources, cls: Symbol) -> list[inspect.Parameter]:
    """Constructor parameters of a class without ``__init__``: its annotated fields, as keywords."""
    parameters = {}
    for symbol in reversed((cls, *sources.bases(cls))):
        assert isinstance(symbol.node, ast.ClassDef)
        for node in symbol.node.body:
            if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
                name = ast.unparse(node.target)
                default = inspect.Parameter.empty if node.value is None else ...
                parameters[name] = inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default
                )
    return list(parameters.values())
