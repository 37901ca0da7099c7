# SPDX-License-Identifier: Apache-2.0
"""Deployment recipes: command lines that vLLM with our flags reads, after a check of the GPU."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.test_cli import make_arg_parser
from vl_cache_vllm import cli
from vl_cache_vllm.config import get_kv_compress_config
from vl_cache_vllm.core.connectors import SUPPORTED, configured_connectors
from vl_cache_vllm.self_check.record import COMMAND
from vl_cache_vllm.support import TRY_GPU

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples" / "kubernetes").glob("*.yaml"))
CACHE_MOUNT = {"name": "vllm-cache", "mountPath": "/root/.cache/vllm"}
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


def is_prefill_server(container: dict[str, Any]) -> bool:
    """Whether a container only computes prompts for others: unmodified vLLM may do that."""
    return '"kv_role": "kv_producer"' in str(container.get("args"))


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
        if is_prefill_server(container):
            assert config is None
            continue
        assert config is not None
        budgets.add((parsed.model_tag, config.policy.name, config.budget))
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert "shm" in names
    assert len(budgets) == 1  # every node is told the same


def pods(node: Any) -> list[dict[str, Any]]:
    """All pod specifications below a node of a manifest."""
    if isinstance(node, list):
        return [one for item in node for one in pods(item)]
    if not isinstance(node, dict):
        return []
    found = [node] if "containers" in node else []
    return found + [one for item in node.values() for one in pods(item)]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_check_runs_before_containers_with_gpus(path: Path) -> None:
    found = pods([*yaml.safe_load_all(path.read_text())])
    found = [pod for pod in found if not is_prefill_server(pod["containers"][0])]
    assert found
    for pod in found:
        (server,), (check,) = pod["containers"], pod["initContainers"]
        assert check["command"] == [COMMAND, "--if-needed"]
        assert check["image"] == server["image"]
        for container in (server, check):
            assert int(container["resources"]["limits"]["nvidia.com/gpu"]) >= 1
            assert CACHE_MOUNT in container["volumeMounts"]
        assert CACHE_MOUNT["name"] in {volume["name"] for volume in pod["volumes"]}
        assert TRY_GPU not in str(pod)


@pytest.mark.parametrize(
    ("name", "indent", "starts"),
    [
        (
            "docs/deployment.md",
            "    ",
            [
                *["docker run", "docker run", COMMAND, "vllm serve"],
                *[COMMAND, "vllm serve"],  # LMCache
                *["vllm serve", COMMAND, "vllm serve"],  # disaggregated prefill
            ],
        ),
        ("docs/quickstart.md", "    ", [COMMAND, "vllm serve", "vllm serve"]),
        ("Dockerfile", "#   ", ["docker run", "docker run"]),
    ],
)
def test_commands_for_gpus_check_first(name: str, indent: str, starts: list[str]) -> None:
    found = [
        (match[0], line)
        for line in commands(ROOT / name, indent)
        if (match := re.search(rf"docker run|vllm serve|^ +{COMMAND}", line))
    ]
    assert [start.strip() for start, _ in found] == starts
    docker = [line for start, line in found if start == "docker run"]
    assert all("--gpus" in line and " -v vllm-cache:/root/.cache/vllm " in line for line in docker)
    if docker:
        assert f"--entrypoint {COMMAND} vl-cache-vllm --if-needed" in docker[0]
        assert "--kv-compress" in docker[1]
    assert TRY_GPU not in "".join(line for _, line in found)


def test_the_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "deployment",
        "disaggregated-prefill",
        "leader-worker-set",
    ]


def test_disaggregated_prefill_is_accepted() -> None:
    """The connectors of the example are supported, and their configuration is vLLM's."""
    path = ROOT / "examples" / "kubernetes" / "disaggregated-prefill.yaml"
    roles = []
    for container in containers([*yaml.safe_load_all(path.read_text())]):
        if "args" in container:
            parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(container["args"])
            transfer = parsed.kv_transfer_config
            parts = configured_connectors(transfer)
            assert {part["kv_connector"] for part in parts} <= SUPPORTED.keys()
            roles.append(transfer.kv_role)
    assert roles == ["kv_producer", "kv_consumer"]
