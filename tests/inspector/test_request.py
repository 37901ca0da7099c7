# SPDX-License-Identifier: Apache-2.0
"""The parts of a request that need no engine."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.made_up import inspection
from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.inspector.request import _reason, token_texts


def test_texts_of_tokens_add_up() -> None:
    text = "Grüße, 你好!"
    ids = list(text.encode())

    def decode(part: list[int]) -> str:
        return bytes(part).decode(errors="ignore")

    texts = token_texts(ids, decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert texts[ids.index(0xC3) : ids.index(0xC3) + 2] == ["", "ü"]


@pytest.mark.parametrize(
    ("settings", "tokens", "has_images", "max_tokens", "expected"),
    [
        ({}, 500, True, 1, "--max-tokens 1"),
        ({"evict_after": 8}, 500, True, 9, "so --max-tokens must be at least 10, got 9"),
        ({"evict_after": 8}, 500, True, 20, "and the output has 7"),
        ({}, 500, False, 8, "the prompt has no image"),
        ({"min_prompt_tokens": 600}, 500, True, 8, "fewer than min_prompt_tokens, 600"),
        ({}, 40, True, 8, "40 prompt tokens are 2 blocks of 32, and a budget of 0.1 keeps 1"),
        ({"budget": 1.0}, 500, True, 8, "keeps 16 of them: no block would be freed"),
        ({}, 3000, True, 8, "3000 prompt tokens are 94 blocks of 32, too many for a pool of 100"),
        ({"when": "pressure"}, 500, True, 8, "remove the flag"),
        ({}, 500, True, 8, "no text follows the image"),
    ],
)
def test_reason_why_a_request_was_not_evicted(
    settings: dict[str, Any], tokens: int, has_images: bool, max_tokens: int, expected: str
) -> None:
    cache = SimpleNamespace(block_size=32, num_gpu_blocks=100)
    llm: Any = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))
    )
    config = KVCompressConfig.from_dict({"policy": "vlcache", **settings})
    assert config is not None
    reason = _reason(llm, config, tokens, has_images, max_tokens, 7)
    assert "kept its full cache" in reason
    assert expected in reason


def test_settings_that_differ_from_the_defaults() -> None:
    assert inspection().settings() == [("pooling", 3)]
