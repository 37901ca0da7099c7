# SPDX-License-Identifier: Apache-2.0
"""Deployment recipes: command lines that vLLM with our flags understands and GPUs do not refuse."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.test_cli import make_arg_parser
from vl_cache_vllm import cli
from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.support import TRY_GPU

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
VARIABLES = {
    "$(LWS_GROUP_SIZE)": "2",
    "$(LWS_WORKER_INDEX)": "1",
    "$(LWS_LEADER_ADDRESS)": "10.0.0.1",
}


def containers(node: Any) -> list[dict[str, Any]]:
    """All containers below a node of a manifest."""
    if isinstance(node, list):
        return [one for item in node for one in containers(item)]
    if not isinstance(node, dict):
        return []
    found = [*node.get("containers", [])]
    return found + [one for item in node.values() for one in containers(item)]


def commands(path: Path, indent: str) -> list[str]:
    """Commands of a file's indented blocks, each on one line."""
    text = path.read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(indent)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_command_lines(path: Path) -> None:
    found = containers([*yaml.safe_load_all(path.read_text())])
    found = [one for one in found if "args" in one]
    assert found
    budgets = set()
    for container in found:
        arguments = [str(argument) for argument in container["args"]]
        for variable, value in VARIABLES.items():
            arguments = [argument.replace(variable, value) for argument in arguments]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        cli.move_flags_to_additional_config(parsed)
        config = get_kv_compress_config(parsed)
        assert config is not None
        budgets.add((parsed.model_tag, config.policy.name, config.budget))
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert "shm" in names
    assert len(budgets) == 1  # every node is told the same


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_containers_with_gpus_are_let_through(path: Path) -> None:
    found = containers([*yaml.safe_load_all(path.read_text())])
    on_gpus = [one for one in found if "nvidia.com/gpu" in one["resources"]["limits"]]
    assert on_gpus
    for container in on_gpus:
        assert {"name": TRY_GPU, "value": "1"} in container.get("env", []), container["name"]


@pytest.mark.parametrize(
    ("name", "indent", "starts"),
    [
        ("docs/deployment.md", "    ", ["docker run", "ray start", "ray start", "vllm serve"]),
        ("Dockerfile", "#   ", ["docker run"]),
    ],
)
def test_commands_for_gpus_are_let_through(name: str, indent: str, starts: list[str]) -> None:
    found = [
        (match[0], line)
        for line in commands(ROOT / name, indent)
        if (match := re.search(r"docker run|ray start|vllm serve", line))
    ]
    assert [start for start, _ in found] == starts
    for start, line in found:
        variable, command = f"{TRY_GPU}=1", line.removeprefix(indent)
        if start == "docker run":
            assert "--gpus" in command and f" -e {variable} " in command
        else:
            assert command.startswith(f"{variable} {start} ")


def test_both_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["deployment", "leader-worker-set"]
