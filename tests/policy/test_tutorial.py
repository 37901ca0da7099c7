# SPDX-License-Identifier: Apache-2.0
"""The example of docs/policies.md, installed as its reader would install it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example was installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    files = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.+?)^```", DOCUMENT.read_text(), re.M | re.S)
    assert [name for name, _ in files] == ["keep_edges.py", "pyproject.toml"]
    for name, text in files:
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(target)]
    subprocess.run([*command, str(source)], check=True, timeout=120)
    return target


def run(installed: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_it_is_found_with_its_parameters(installed: Path) -> None:
    code = """
import torch
from vl_cache_vllm.config import KVCompressConfig, describe_settings
from vl_cache_vllm.policy import Prompt
config = KVCompressConfig.from_dict({"policy": "keep-edges", "strength": 3, "budget": 0.2})
print(config.policy.layer_weights(torch.ones(4, dtype=torch.float64), 0.2, Prompt(100)).tolist())
print(describe_settings())
"""
    result = run(installed, code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[3.0, 1.0, 1.0, 3.0]\n")
    assert (
        "\n- POLICY keep-edges:\n- max_observation_tokens (default 8): Number of" in result.stdout
    )


def test_its_own_check_speaks(installed: Path) -> None:
    code = """
from vl_cache_vllm.config import KVCompressConfig
KVCompressConfig.from_dict({"policy": "keep-edges", "strength": -1})
"""
    result = run(installed, code)
    assert result.returncode != 0
    assert "ValueError: strength must be positive, got -1.0" in result.stderr
