# SPDX-License-Identifier: Apache-2.0
"""The pretrained language model behind vLLM: the plain model's outputs, and eviction."""

import argparse

import pytest
import torch
from transformers import AutoTokenizer

from evaluation import accuracy, sweep
from evaluation.benches import PretrainedBench
from evaluation.offline import OfflinePretrained
from evaluation.pretrained import build_model
from evaluation.pretrained.tasks import PretrainedCase, pretrained_cases
from testing.engine import greedy, read_trace, running_llm, token_ids
from vl_cache_vllm.config import KVCompressConfig

CASES = 10


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> PretrainedBench:
    return PretrainedBench(build_model.build(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="module")
def cases(bench: PretrainedBench) -> list[PretrainedCase]:
    """Facts and needles of one document, which share its prefill."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    found = pretrained_cases(tokenizer, "tune", ["fact", "needle"], ["completion", "chat"], 4)
    return [case for case in found if case.group == found[0].group][:CASES]


def options(**changes: object) -> argparse.Namespace:
    parser = accuracy._parser()
    parser.set_defaults(**accuracy.PRETRAINED_DEFAULTS)
    return argparse.Namespace(**{**vars(parser.parse_args(["--quiet"])), **changes})
