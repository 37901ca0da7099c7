# SPDX-License-Identifier: Apache-2.0
"""What a release contains: the sdist, the wheel built from it, and this wheel installed."""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

import vl_cache_vllm

pytestmark = pytest.mark.slow  # builds and installs distributions

ROOT = Path(__file__).parent.parent
PRODUCT = "vl_cache_vllm"
NOT_COPIED = shutil.ignore_patterns(
    ".*", "__pycache__", "*.so", "*.egg-info", "build", "models", "results"
)
BUILD = "import sys; from setuptools import build_meta; print(build_meta.{}(sys.argv[1]))"


@dataclass
class Release:
    sdist: Path
    wheel: Path

    def __post_init__(self) -> None:
        with tarfile.open(self.sdist) as archive:
            names = [member.name for member in archive.getmembers() if member.isfile()]
        self.sdist_files = {name.partition("/")[2] for name in names}
        with zipfile.ZipFile(self.wheel) as archive:
            self.wheel_files = set(archive.namelist())
            self.info = f"{self.wheel.name.split('-cp')[0]}.dist-info"
            self.metadata = archive.read(f"{self.info}/METADATA").decode()
            self.entry_points = archive.read(f"{self.info}/entry_points.txt").decode()


def build(kind: str, source: Path, target: Path) -> Path:
    """Build in ``source`` with the installed setuptools: no network, no isolation."""
    command = [sys.executable, "-c", BUILD.format(kind), str(target)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """From a copy of the repository with all its folders; the wheel from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=ignored)
    (folder / "dist").mkdir()
    sdist = build("build_sdist", source, folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    return Release(sdist, build("build_wheel", unpacked, folder / "dist"))


def ignored(folder: str, names: list[str]) -> set[str]:
    """Also links, such as one to kernels/ that lets an editor find them."""
    return {
        *NOT_COPIED(folder, names),
        *(name for name in names if (Path(folder) / name).is_symlink()),
    }


def sources() -> set[str]:
    """Files of the product as they are called in a wheel."""
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / PRODUCT).rglob("*")
        if path.is_file() and path.suffix in (".py", ".typed", ".html", ".css", ".js")
    }
    kernels = {f"{PRODUCT}/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    return {name for name in files if f"{PRODUCT}/kernels/" not in name} | kernels


def test_wheel(release: Release) -> None:
    assert {f"{PRODUCT}/py.typed", f"{PRODUCT}/inspector/page.js"} <= sources()
    native = f"{PRODUCT}/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    info = {
        f"{release.info}/{name}"
        for name in (
            "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt",
        )
    }  # fmt: skip
    assert release.wheel_files == sources() | {native} | info


def test_sdist(release: Release) -> None:
    wanted = {
        "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "PKG-INFO", "README.md",
        "pyproject.toml", "setup.cfg", "setup.py",
    }  # fmt: skip
    native = {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*") if path.is_file()}
    kernels = {name for name in sources() if name.startswith(f"{PRODUCT}/kernels/")}
    wanted |= native | (sources() - kernels)
    wanted |= {name.removeprefix(f"{PRODUCT}/") for name in kernels}
    metadata = {name for name in release.sdist_files if ".egg-info/" in name}
    assert release.sdist_files - metadata == wanted


def test_metadata(release: Release) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata: Message = Parser().parsestr(release.metadata)
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == vl_cache_vllm.__version__
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert metadata.get_payload().startswith("# vl-cache-vllm\n")
    parser = configparser.ConfigParser(delimiters="=")
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(release.entry_points)
    groups = {name: dict(parser[name]) for name in parser.sections()}
    assert groups == {**project["entry-points"], "console_scripts": project["scripts"]}


def test_files_of_the_repository_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == vl_cache_vllm.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["references"][0]["url"] == project["urls"]["Paper"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]
    assert f"ruff=={hooks['rev'].removeprefix('v')}" in project["optional-dependencies"]["dev"]
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [form.stem for form in forms] == ["bug", "config", "model", "policy", "vllm-release"]
    for form in forms:
        content = yaml.safe_load(form.read_text())
        if form.stem != "config":
            assert content["name"] and content["description"]
            ids = [part["id"] for part in content["body"]]
            assert len(ids) == len(set(ids))


@pytest.fixture(scope="module")
def clean_python(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment: this one's packages by links, except ours; and the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    (target,) = folder.glob("lib/python3*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.removeprefix("__editable__").strip("_.").startswith(PRODUCT):
            (target / path.name).symlink_to(path)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", target, release.wheel], check=True)
    return folder / "bin" / "python"


CLEAN = """
import sys
from importlib.metadata import version
from pathlib import Path
from vllm.plugins import load_plugins_by_group

assert "vl_cache" in load_plugins_by_group("vllm.general_plugins")
import vl_cache_vllm
from vl_cache_vllm import plugin
from vl_cache_vllm.ops import native
from vl_cache_vllm.policy import POLICIES

assert Path(vl_cache_vllm.__file__).is_relative_to(sys.prefix), vl_cache_vllm.__file__
assert version("vl-cache-vllm") == vl_cache_vllm.__version__
print(*POLICIES)
sys.argv = ["vllm", "serve", "--help=kv-compress"]
from vllm.entrypoints.cli.main import main
main()
"""


def test_the_wheel_works_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [clean_python, "-c", CLEAN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    policies = set(project["entry-points"]["vl_cache_vllm.policies"])
    assert set(result.stdout.splitlines()[0].split()) == policies
    for flag in ("", "-budget", "-when", "-text", "-config"):
        assert f"--kv-compress{flag} " in result.stdout, result.stdout
