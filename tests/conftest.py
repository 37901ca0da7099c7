# SPDX-License-Identifier: Apache-2.0
"""Environment of the whole test run; must act before vLLM is imported.

The runner is a property of the run: plain ``pytest`` uses V1, and with
``VLLM_USE_V2_MODEL_RUNNER=1`` (V2 through Triton's interpreter) the tests marked ``both_runners``
run on V2. ``make test`` does both. With a GPU there is the second run only, without the
interpreter: eviction needs V2 there.
"""

import os
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if torch.cuda.is_available() else "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
if torch.cuda.is_available():
    os.environ["VL_CACHE_VLLM_TRY_GPU"] = "1"
elif os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

E2E = Path(__file__).parent / "e2e"

# A property test names how many examples CI tries, the same ones in every run. With
# `--hypothesis-profile=soak` it tries others, and many more of them.
settings.register_profile("soak", max_examples=20_000, print_blob=True)


def examples(number: int, **more: Any) -> settings:
    """Settings of a property test."""
    is_soak = settings.get_current_profile_name() == "soak"
    if os.environ.get("TRITON_INTERPRET") == "1":  # a thousand times slower than a kernel is
        number = -(-number // 10)
    number = settings.default.max_examples if is_soak else number
    return settings(max_examples=number, deadline=None, derandomize=not is_soak, **more)


def histories(number: int) -> settings:
    """Settings of a test of random histories."""
    return examples(number, stateful_step_count=50, suppress_health_check=list(HealthCheck))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep this run's tests, the quick ones first and those with servers last."""
    is_second_run = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    chosen, others = [], []
    for item in items:
        if E2E in item.path.parents:
            item.add_marker("slow")
        in_second_only = "interpreter" in item.keywords
        in_second = "both_runners" in item.keywords or (
            in_second_only and not torch.cuda.is_available()
        )
        is_chosen = in_second if is_second_run else not in_second_only
        (chosen if is_chosen else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = sorted(chosen, key=lambda item: ("server" in item.keywords, "slow" in item.keywords))


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny checkpoints are generated, once per run."""
    return tmp_path_factory.mktemp("models")
