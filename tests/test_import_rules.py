# SPDX-License-Identifier: Apache-2.0
"""Import rules between the layers of the product and between the folders of the repository.

The rules are checked against the source with `ast`; no module is imported. docs/design.md
("Layers of the code") gives the reasons.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = "vl_cache_vllm"
SOURCES = sorted((ROOT / PRODUCT).rglob("*.py"))
# Folders outside the product, each with those that it may not import.
OUTSIDE: dict[str, tuple[str, ...]] = {
    "testing": ("tests", "checks", "benchmarks", "evaluation", "training"),
    "checks": ("tests", "benchmarks", "evaluation"),
    "evaluation": ("tests", "checks", "benchmarks"),
    "benchmarks": ("tests", "checks", "evaluation"),
    "training": ("tests", "checks", "benchmarks", "evaluation", "testing", PRODUCT),
}


def package_of(path: Path) -> str:
    """The dotted package that relative imports of a file start from."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def nodes_of(node: ast.AST, for_types: bool = False, functions: bool = True) -> Iterator[ast.AST]:
    """All nodes below ``node``.

    Args:
        for_types: include what only a type checker reads.
        functions: include the bodies of functions, which run later than the module.
    """
    for child in ast.iter_child_nodes(node):
        if not functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if not for_types and isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from nodes_of(other, for_types, functions)
            continue
        yield child
        yield from nodes_of(child, for_types, functions)


def imports(tree: ast.AST, package: str, **which: bool) -> Iterator[tuple[str, str]]:
    """Each imported module with the name taken from it, or ``""``; ``which``: see `nodes_of`."""
    for node in nodes_of(tree, **which):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), ""


def imported_modules(tree: ast.AST, package: str, **which: bool) -> set[str]:
    """Dotted names of all imported modules; ``from a.b import c`` may import ``a.b.c``."""
    found = set(imports(tree, package, **which))
    return {base for base, _ in found} | {f"{base}.{name}" for base, name in found if name}


def imports_of(path: Path, **which: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imported_modules(tree, package_of(path), **which)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def offences(
    sources: Iterable[Path], forbidden: Iterable[str], for_types: bool = False
) -> list[str]:
    """One line for each import of a forbidden package."""
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources
        for module in sorted(imports_of(path, for_types=for_types))
        if any(within(module, package) for package in forbidden)
    ]


def layer(name: str) -> list[Path]:
    sources = sorted((ROOT / PRODUCT / name).rglob("*.py"))
    assert sources, f"no layer {name}"
    return sources


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        (
            "ops",
            ("vllm", *(f"{PRODUCT}.{upper}" for upper in ("core", "worker", "attention"))),
        ),
        (
            "policy",
            ("vllm", *(f"{PRODUCT}.{upper}" for upper in ("core", "worker", "attention"))),
        ),
        ("core", (f"{PRODUCT}.worker", f"{PRODUCT}.attention", "vllm.v1.worker")),
        ("attention", (f"{PRODUCT}.worker", f"{PRODUCT}.core")),
    ],
    ids=["ops", "policy", "core", "attention"],
)
def test_layers_import_downwards(name: str, forbidden: tuple[str, ...]) -> None:
    assert offences(layer(name), forbidden) == []


@pytest.mark.parametrize("name", ["ops", "policy", "core", "attention"])
def test_lower_layers_do_not_know_who_installs_them(name: str) -> None:
    modules = ["plugin", "install", "cli", "support"]
    if name != "attention":  # attention.registration reads the class paths of its backends
        modules.append("hooks")
    assert offences(layer(name), [f"{PRODUCT}.{module}" for module in modules]) == []


def test_the_worker_does_not_know_who_installs_it() -> None:
    assert offences(layer("worker"), [f"{PRODUCT}.install", f"{PRODUCT}.plugin"]) == []


def test_attention_does_not_know_the_worker_even_as_a_type() -> None:
    forbidden = [f"{PRODUCT}.worker", f"{PRODUCT}.core"]
    assert offences(layer("attention"), forbidden, for_types=True) == []


def test_the_table_of_hooks_imports_nothing_of_ours() -> None:
    assert offences([ROOT / PRODUCT / "hooks.py"], [PRODUCT], for_types=True) == []


@pytest.mark.parametrize("folder", OUTSIDE)
def test_folders_outside_the_product(folder: str) -> None:
    sources = sorted((ROOT / folder).rglob("*.py"))
    assert sources, f"no folder {folder}"
    assert offences(sources, OUTSIDE[folder], for_types=True) == []


def test_the_product_imports_no_folder_outside_it() -> None:
    assert offences(SOURCES, ["tests", *OUTSIDE], for_types=True) == []


def module_name(path: Path) -> str:
    """The dotted name of a file; a package's for its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Iterable[Path], functions: bool) -> dict[str, set[str]]:
    """The modules among ``sources`` that each of them imports at run time.

    ``from a.b import c`` is an import of ``a.b.c`` where that is a module, and otherwise of
    ``a.b``. Parent packages, which Python imports implicitly, are not counted.
    """
    names = {module_name(path): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = imports(tree, package_of(path), functions=functions)
        targets = (f"{base}.{name}" if f"{base}.{name}" in names else base for base, name in found)
        graph[module] = {target for target in targets if target in names}
    return graph


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, or of one that imports itself.

    Tarjan's algorithm.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            start = stack.index(node)
            component = stack[start:]
            del stack[start:]
            if len(component) > 1 or node in graph[node]:
                found.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


@pytest.mark.parametrize("functions", [False, True], ids=["of modules", "with late imports"])
def test_no_import_cycles(functions: bool) -> None:
    found = cycles(import_graph(SOURCES, functions))
    assert not found, "\n".join(" -> ".join([*cycle, cycle[0]]) for cycle in found)


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "c"}}) == [["b", "c"]]
    assert cycles({"a": {"a"}, "b": {"a"}}) == [["a"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = import_graph(SOURCES, functions=False)
    assert len(graph) == len(SOURCES)
    assert f"{PRODUCT}.ops.page_pool" in graph[f"{PRODUCT}.ops.compact"]
    assert f"{PRODUCT}.ops" not in graph[f"{PRODUCT}.ops.compact"]


def test_operations_do_not_know_policies_or_settings() -> None:
    assert offences(layer("ops"), (f"{PRODUCT}.policy", f"{PRODUCT}.config")) == []


def test_settings_do_not_need_vllm() -> None:
    """`KVCompressConfig` is read where vLLM need not be importable yet, as in a parser."""
    files = [ROOT / PRODUCT / "config.py", ROOT / PRODUCT / "__init__.py"]
    assert offences(files, ("vllm",)) == []


def test_the_development_shim_is_no_dependency() -> None:
    kernels = sorted((ROOT / "kernels").rglob("*.py"))
    assert offences([*SOURCES, *kernels], ("vllm_cpu_shim",)) == []
    for path in SOURCES:
        assert "vllm_cpu_shim" not in path.read_text(encoding="utf-8"), path


def test_the_parser_sees_what_it_should() -> None:
    """The checks above pass vacuously if imports are missed."""
    source = """
import a.b
from c import d as e
from . import f
from ..g import h
if TYPE_CHECKING:
    import hidden
else:
    import shown
def function():
    from late import name
    importlib.import_module("dynamic.module")
"""
    tree = ast.parse(source)
    early = {"a.b", "c", "c.d", "pkg.sub", "pkg.sub.f", "pkg.g", "pkg.g.h", "shown"}
    late = {"late", "late.name", "dynamic.module"}
    assert imported_modules(tree, "pkg.sub") == early | late
    assert imported_modules(tree, "pkg.sub", functions=False) == early
    assert imported_modules(tree, "pkg.sub", for_types=True) == early | late | {"hidden"}
    assert "vllm.v1.request" in imports_of(ROOT / PRODUCT / "core" / "block_manager.py")
    assert f"{PRODUCT}.ops.page_pool" in imports_of(ROOT / PRODUCT / "ops" / "compact.py")
    assert not any(
        within(m, f"{PRODUCT}.worker") for m in imports_of(ROOT / PRODUCT / "attention" / "cpu.py")
    )
    assert len(SOURCES) > 20
