# SPDX-License-Identifier: Apache-2.0
"""The kinds of expectations about a vLLM symbol: the rows of the table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from checks.contract.sources import (
    NotFoundError,
    Sources,
    Symbol,
    abstract_methods,
    body_of,
    signature,
    text_of,
)


@dataclass(frozen=True)
class Row:
    """The symbol exists.

    ``target`` is ``module:qualified.name``, or only the name of a module.
    """

    target: str

    def violations(self, sources: Sources) -> Iterator[str]:
        """One line for each violated expectation."""
        try:
            symbol = sources.find(self.target)
            yield from (f"{self.target}: {line}" for line in self.check(sources, symbol))
        except NotFoundError as error:
            yield f"{self.target}: expected {self}, found {error}"

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        """Like `violations`, for a symbol that exists and without its name."""
        return iter(())

    def num_facts(self) -> int:
        """The number of expectations in this row."""
        return 1

    def __str__(self) -> str:
        return "it to exist"


Exists = Row


@dataclass(frozen=True)
class Has(Row):
    """A class has these fields, methods, enum members or attributes assigned in its methods."""

    names: str  # separated by blanks

    def violations(self, sources: Sources) -> Iterator[str]:
        missing = [*Exists(self.target).violations(sources)]
        if missing:
            yield from missing
            return
        for name in self.names.split():
            yield from Exists(f"{self.target}.{name}").violations(sources)

    def num_facts(self) -> int:
        return len(self.names.split())


@dataclass(frozen=True)
class Defined(Row):
    """The definition of a field, attribute or constant has this text; for ``...`` see `Steps`."""

    text: str

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        found = ast.unparse(symbol.node) if symbol.node else "a module"
        if not _pattern(self.text).fullmatch(found):
            yield f"expected {self}, found `{found}`"

    def __str__(self) -> str:
        return f"`{self.text}`"


@dataclass(frozen=True)
class Called(Row):
    """This package calls it: ``x, y, key=`` are two positional arguments and a keyword."""

    call: str = ""
    returns: str | None = None  # the annotation

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        found = signature(sources, symbol)
        call = ast.parse(f"f({self.call.replace('=', '=0')})", mode="eval").body
        assert isinstance(call, ast.Call)
        try:
            found.bind(*call.args, **{str(keyword.arg): 0 for keyword in call.keywords})
        except TypeError:
            yield f"expected to be callable as ({self.call}), found ({text_of(found)})"
        yield from _check_return(symbol, self.returns)

    def __str__(self) -> str:
        return f"to be callable as ({self.call})"


@dataclass(frozen=True)
class Overridden(Row):
    """vLLM calls it and this package replaces it, so the parameters must be exactly these.

    ``parameters`` ends with ``...`` if the replacement accepts further parameters.
    """

    parameters: str
    returns: str | None = None  # the annotation

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        found = text_of(signature(sources, symbol))
        expected = self.parameters.removesuffix("...").removesuffix(", ")
        is_open = self.parameters.endswith("...")
        if not (found == expected or (is_open and f"{found},".startswith(f"{expected},"))) and (
            expected or not is_open
        ):
            yield f"expected parameters ({self.parameters}), found ({found})"
        yield from _check_return(symbol, self.returns)

    def __str__(self) -> str:
        return f"parameters ({self.parameters})"


@dataclass(frozen=True)
class Extends(Row):
    """A class derives from another one."""

    base: str

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        base = sources.find(self.base).node
        found = [s.node for s in sources.bases(symbol)] if symbol.node is not base else [base]
        if base not in found:
            names = ", ".join(cls.name for cls in found if isinstance(cls, ast.ClassDef))
            yield f"expected it to derive from {self.base}, found {names or 'no base of vLLM'}"

    def __str__(self) -> str:
        return f"it to derive from {self.base}"


@dataclass(frozen=True)
class Abstract(Row):
    """A class has no abstract methods other than these."""

    names: str  # separated by blanks

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        found = abstract_methods(sources, symbol)
        if not set(found) <= set(self.names.split()):
            yield f"expected {self}, found ({' '.join(found)})"

    def __str__(self) -> str:
        return f"no abstract methods but ({self.names})"


@dataclass(frozen=True)
class Steps(Row):
    """Each of these texts occurs in a function, and the first occurrences are in this order.

    ``...`` in a text stands for any text within a statement. Statements are compared as one line,
    independent of their formatting.
    """

    texts: tuple[str, ...]

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        body = body_of(symbol)
        before, last = None, -1
        for text in self.texts:
            match = _pattern(text).search(body)
            if match is None:
                yield f"expected `{text}` in it, found none"
                continue
            if match.start() < last:
                yield f"expected `{before}` before `{text}`, found it after"
            before, last = text, match.start()

    def __str__(self) -> str:
        return f"`{self.texts[0]}` in it"

    def num_facts(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Never(Row):
    """A text, with ``...`` as in `Steps`, does not occur in a function."""

    text: str

    def check(self, sources: Sources, symbol: Symbol) -> Iterator[str]:
        match = _pattern(self.text).search(body_of(symbol))
        if match is not None:
            yield f"expected {self}, found `{match.group()}`"

    def __str__(self) -> str:
        return f"no `{self.text}` in it"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, text.split("..."))))


def _check_return(symbol: Symbol, expected: str | None) -> Iterator[str]:
    annotation = getattr(symbol.node, "returns", None)
    found = "nothing" if annotation is None else ast.unparse(annotation)
    if expected is not None and found != expected:
        yield f"expected it to return {expected}, found {found}"
