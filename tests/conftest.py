# SPDX-License-Identifier: Apache-2.0
"""Environment of the whole test run; must act before vLLM is imported.

The runner is a property of the run: plain ``pytest`` uses V1, and with
``VLLM_USE_V2_MODEL_RUNNER=1`` (V2 through Triton's interpreter) the tests marked ``both_runners``
run on V2. ``make test`` does both.
"""

import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "both_runners: also run on the V2 model runner")
    config.addinivalue_line("markers", "server: starts a real server process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
        skip = pytest.mark.skip(reason="runner-neutral or V1 only; runs in the V1 run")
        for item in items:
            if "both_runners" not in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny checkpoints are generated, once per run."""
    return tmp_path_factory.mktemp("models")
