# SPDX-License-Identifier: Apache-2.0
"""Kubernetes examples: what they start is a command line that vLLM with our flags understands."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.test_cli import make_arg_parser
from vl_cache_vllm import cli
from vl_cache_vllm.config import settings_of

EXAMPLES = sorted((Path(__file__).parent.parent / "examples" / "kubernetes").glob("*.yaml"))
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
        cli.fold(parsed)
        config = settings_of(parsed)
        assert config is not None
        budgets.add((parsed.model_tag, config.policy.name, config.budget))
        names = {mount["name"] for mount in container["volumeMounts"]}
        assert "shm" in names
    assert len(budgets) == 1  # every node is told the same


def test_both_examples_are_there() -> None:
    assert [path.stem for path in EXAMPLES] == ["deployment", "leader-worker-set"]
