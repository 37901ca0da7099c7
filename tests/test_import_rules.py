# SPDX-License-Identifier: Apache-2.0
"""The import rule of docs/design.md ("Layers of the code"), read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = "vl_cache_vllm"
SOURCES = sorted((ROOT / PRODUCT).rglob("*.py"))


def package_of(path: Path) -> str:
    """The dotted package that relative imports of a file start from."""
    return ".".join(path.relative_to(ROOT).parent.parts)


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads; functions' bodies included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield child
        yield from run_time_nodes(child)


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all modules (or names of modules) imported at run time."""
    modules = set()
    for node in run_time_nodes(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from a.b import c` may import the module a.b.c.
            modules.update((base, *(f"{base}.{alias.name}" for alias in node.names)))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None))
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            modules.add(str(node.args[0].value))
    return modules


def imports_of(path: Path) -> set[str]:
    return imported_modules(ast.parse(path.read_text(encoding="utf-8")), package_of(path))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def offences(sources: list[Path], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources
        for module in sorted(imports_of(path))
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
    top = tuple(f"{PRODUCT}.{module}" for module in ("plugin", "hooks", "cli", "support"))
    assert offences(layer(name), top) == []


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
    found = imported_modules(ast.parse(source), "pkg.sub")
    assert found == {
        "a.b",
        "c",
        "c.d",
        "pkg.sub",
        "pkg.sub.f",
        "pkg.g",
        "pkg.g.h",
        "shown",
        "late",
        "late.name",
        "dynamic.module",
    }
    assert "vllm.v1.request" in imports_of(ROOT / PRODUCT / "core" / "block_manager.py")
    assert f"{PRODUCT}.ops.page_pool" in imports_of(ROOT / PRODUCT / "ops" / "compact.py")
    assert not any(
        within(m, f"{PRODUCT}.worker") for m in imports_of(ROOT / PRODUCT / "attention" / "cpu.py")
    )
    assert len(SOURCES) > 20
