# SPDX-License-Identifier: Apache-2.0
"""StreamingLLM keeps sinks and the most recent tokens, whatever is attended to."""

import pytest
import torch

from vl_cache_vllm.ops.select import select
from vl_cache_vllm.policy import POLICIES, Attention, Prompt
from vl_cache_vllm.policy.streamingllm import StreamingLLMPolicy


@pytest.mark.parametrize(
    ("sinks", "kept", "expected"),
    [
        (4, 6, [0, 1, 2, 3, 8, 9]),
        (4, 3, [0, 1, 2]),
        (0, 3, [7, 8, 9]),
        (1, 4, [0, 7, 8, 9]),
        (50, 2, [0, 1]),
    ],
)
def test_kept_tokens(sinks: int, kept: int, expected: list[int]) -> None:
    policy, prompt = StreamingLLMPolicy(sink_tokens=sinks), Prompt(10, ((2, 5),))
    scores = policy.token_scores(Attention(torch.rand(2, 3, 10)), prompt)
    precedence = policy.precedence(prompt, scores.device)
    positions = select(
        scores,
        torch.full((2,), scores.shape[2]),
        torch.tensor([kept, kept]),
        policy.recent_ratio,
        kept,
        precedence,
    )
    assert positions.tolist() == [[expected] * 3] * 2


def test_looks_at_one_query_only() -> None:
    assert POLICIES["streamingllm"] is StreamingLLMPolicy
    assert StreamingLLMPolicy().observation_start(500, 1000) == 999


def test_bad_sinks() -> None:
    with pytest.raises(ValueError, match="sink_tokens must be at least 0, got -1"):
        StreamingLLMPolicy(sink_tokens=-1)
