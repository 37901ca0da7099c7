# SPDX-License-Identifier: Apache-2.0
"""Whether a prompt can be evicted, and to how many blocks: pure functions of host-side integers.

The scheduler decides with them. The worker uses the same functions only to know which prompts to
observe; the scheduler tells it which of them are evicted (`vl_cache_vllm.messages`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.math_utils import cdiv

from vl_cache_vllm.config import KVCompressConfig

VISUAL_MODALITIES = frozenset({"image", "video", "vision_chunk"})


class Skip(Enum):
    """Why a request keeps its full cache (docs/adr/0004)."""

    TEXT_ONLY = "text_only"
    NO_POST_VISION_TOKENS = "no_post_vision_tokens"
    SHORT_PROMPT = "short_prompt"
    NO_SAVING = "no_saving"
    POOL_TOO_SMALL = "pool_too_small"
    NO_DECODE = "no_decode"
    STREAMING_INPUT = "streaming_input"
    NO_PRESSURE = "no_pressure"
    NO_OBSERVATION_ROOM = "no_observation_room"
    SHORT_OUTPUT = "short_output"
    HANDED_OVER = "handed_over"


@dataclass(frozen=True)
class EvictionPlan:
    """The blocks of one prompt before and after eviction."""

    prompt_tokens: int  # E: tokens computed when the prefill ends
    prompt_blocks: int  # N
    kept_blocks: int  # M; 0: not evicted
    skip: Skip | None = None


def whole_blocks(tokens: int, block_size: int) -> int:
    """Tokens in whole blocks: what an eviction of the first ``tokens`` replaces."""
    return tokens // block_size * block_size


def visual_ranges(features: Sequence[MultiModalFeatureSpec]) -> tuple[tuple[int, int], ...]:
    """(first, end) positions of each image or video of a prompt.

    Structural tokens inside an image's placeholder range (row breaks, end markers) belong to it.
    """
    return tuple(
        (f.mm_position.offset, f.mm_position.offset + f.mm_position.length)
        for f in features
        if f.modality in VISUAL_MODALITIES
    )


def post_vision_start(
    config: KVCompressConfig, features: Sequence[MultiModalFeatureSpec]
) -> int | None:
    """Position after the last visual token of a prompt.

    Returns None for prompts without images or videos, or 0 if ``text`` is set and the prompt is
    text only.
    """
    ends = (end for _, end in visual_ranges(features))
    return max(ends, default=0 if config.text and not features else None)


def plan_eviction(
    config: KVCompressConfig,
    block_size: int,
    prompt_tokens: int,
    vision_end: int | None,
    usable_blocks: int | None = None,
    num_prompt_tokens: int | None = None,
) -> EvictionPlan:
    """Decide whether a prompt is evicted and to how many blocks.

    Args:
        config: budget and minimum length.
        block_size: tokens per block.
        prompt_tokens: E, tokens to compute before decoding. After a preemption they include
            generated tokens.
        vision_end: result of `post_vision_start`.
        usable_blocks: blocks of the pool; the prompt, its kept blocks and the first decode block
            must fit together. None: not checked (the worker does not know the number).
        num_prompt_tokens: the request's prompt without generated tokens, so that a preemption does
            not change the decision. None: ``prompt_tokens``.

    Returns:
        A plan; its ``kept_blocks`` is 0, with the reason, where eviction would not save at least
        one block at every later length.
    """
    num_blocks = cdiv(prompt_tokens, block_size)
    kept = config.kept_blocks(num_blocks, block_size)
    own_tokens = prompt_tokens if num_prompt_tokens is None else num_prompt_tokens
    skip = None
    if vision_end is None:
        skip = Skip.TEXT_ONLY
    elif vision_end >= own_tokens:
        skip = Skip.NO_POST_VISION_TOKENS
    elif own_tokens < config.min_prompt_tokens:
        skip = Skip.SHORT_PROMPT
    elif kept >= prompt_tokens // block_size:
        # Whole blocks are replaced; the last one stays if it is not full.
        skip = Skip.NO_SAVING
    elif usable_blocks is not None and num_blocks + kept + 1 > usable_blocks:
        skip = Skip.POOL_TOO_SMALL
    return EvictionPlan(prompt_tokens, num_blocks, 0 if skip else kept, skip)
