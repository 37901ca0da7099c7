# SPDX-License-Identifier: Apache-2.0
"""Run one request with vLLM's offline API, once with eviction and once with the full cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from vllm import SamplingParams

from vl_cache_vllm.config import REQUEST_BUDGET, KVCompressConfig, get_kv_compress_config
from vl_cache_vllm.core.admission import Skip, plan_eviction
from vl_cache_vllm.inspector.history import Held, history
from vl_cache_vllm.inspector.layout import Box, Panel, panel, seen_area
from vl_cache_vllm.inspector.trace import Eviction

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

_CONTEXT = 8  # tokens before one that its text may depend on


class NotEvicted(ValueError):  # noqa: N818 - names the outcome; it is not a failure
    """The request kept its full cache; the message gives the reason."""


@dataclass(frozen=True)
class Inspection:
    """Everything that the picture and the page show."""

    model: str
    config: KVCompressConfig
    question: str
    answer: str
    full_answer: str  # output with the full cache
    cut: tuple[bool, bool]  # whether the two outputs ended at max_tokens
    names: tuple[str, ...]  # of the images
    images: tuple[Image.Image, ...]
    areas: tuple[Box, ...]  # the areas of the images that the model sees
    eviction: Eviction
    history: tuple[Held, ...]  # all evictions in their order
    tokens: tuple[str, ...]  # text of each token; meaningless for visual ones

    def panels(self) -> list[Panel]:
        """The layout of the visual tokens of each image."""
        result = []
        for i, visual in enumerate(self.eviction.visual):
            known = len(self.images) == len(self.eviction.visual)
            size = self.images[i].size if known else None
            area = self.areas[i] if known else Box(0, 0, 1, 1)
            result.append(panel(visual, self.eviction.grids_of(i), size, area))
        return result

    def settings(self) -> list[tuple[str, Any]]:
        """Settings that differ from their defaults, without budget and trace."""
        defaults = KVCompressConfig(policy=type(self.config.policy)())
        changed = dataclasses.replace(
            self.config, budget=defaults.budget, trace=defaults.trace
        ).flat()
        return [(k, v) for k, v in changed.items() if v != defaults.flat()[k]]


def inspect_request(
    llm: LLM,
    trace: Path,
    model: str,
    question: str,
    images: Sequence[tuple[str, Image.Image]],
    processor: Any,
    max_tokens: int,
) -> Inspection:
    """Run a request with eviction and again with the full cache.

    Args:
        llm: an engine with eviction that traces positions and scores.
        trace: the trace file of the engine.
        model: the name of the model, for display.
        question: the text of the user message; the model's chat template is applied.
        images: (name, RGB image), placed before the text.
        processor: the model's Hugging Face image processor, or None.
        max_tokens: maximum number of output tokens.

    Raises:
        NotEvicted: if the request kept its full cache.
    """
    content: list[dict[str, Any]] = [
        {"type": "image_pil", "image_pil": image} for _, image in images
    ]
    messages: Any = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    def ask(extra: dict[str, Any] | None) -> RequestOutput:
        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=extra)
        (output,) = llm.chat(messages, parameters, use_tqdm=False)
        return output

    output = ask(None)
    config = get_kv_compress_config(llm.llm_engine.vllm_config)
    assert config is not None
    lines = trace.read_text().splitlines() if trace.exists() else []
    ids = output.prompt_token_ids
    assert ids is not None
    if not lines:
        generated = len(output.outputs[0].token_ids)
        raise NotEvicted(_reason(llm, config, len(ids), bool(images), max_tokens, generated))
    records = [json.loads(line) for line in lines]
    eviction, evictions = Eviction.from_records(records), history(records, len(ids))
    # A request may be evicted only when it has generated some tokens.
    ids = [*ids, *output.outputs[0].token_ids][: eviction.prompt_tokens]
    full = ask({REQUEST_BUDGET: 1.0})
    tokenizer = llm.get_tokenizer()
    answers = (output.outputs[0], full.outputs[0])
    return Inspection(
        model,
        config,
        question,
        answers[0].text,
        answers[1].text,
        (answers[0].finish_reason == "length", answers[1].finish_reason == "length"),
        tuple(name for name, _ in images),
        tuple(image for _, image in images),
        tuple(seen_area(*image.size, processor) for _, image in images),
        eviction,
        evictions,
        tuple(token_texts(ids, tokenizer.decode)),
    )


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """The text that each token adds to the text of the preceding tokens."""
    texts = []
    for i in range(len(ids)):
        before = list(ids[max(0, i - _CONTEXT) : i])
        texts.append(decode([*before, ids[i]])[len(decode(before)) :])
    return texts


def _reason(
    llm: LLM,
    config: KVCompressConfig,
    prompt_tokens: int,
    has_images: bool,
    max_tokens: int,
    generated: int,
) -> str:
    """The reason why a request was not evicted, derived without access to the engine core."""
    cache = llm.llm_engine.vllm_config.cache_config
    block_size, blocks = cache.block_size, cache.num_gpu_blocks
    plan = plan_eviction(
        config,
        block_size,
        prompt_tokens,
        0 if has_images or config.text else None,
        None if blocks is None else blocks - 1,
    )
    prompt = f"{prompt_tokens} prompt tokens are {plan.prompt_blocks} blocks of {block_size}"
    smaller = f"use a longer prompt, a --block-size below {block_size} or a smaller budget"
    kept = config.kept_blocks(plan.prompt_blocks, block_size)
    minimum = config.policy.min_kept_tokens
    floor = f" with min_kept_tokens {minimum}" if minimum else ""
    reasons = {
        Skip.TEXT_ONLY: "the prompt has no image: add --image (or --kv-compress-text with a policy "
        "that evicts text)",
        Skip.SHORT_PROMPT: f"the prompt has {prompt_tokens} tokens, fewer than min_prompt_tokens, "
        f"{config.min_prompt_tokens}",
        Skip.NO_SAVING: f"{prompt}, and a budget of {config.budget}{floor} keeps {kept} of them: "
        f"no block would be freed; {smaller}",
        Skip.POOL_TOO_SMALL: f"{prompt}, too many for a pool of {blocks}: increase "
        "--kv-cache-memory-bytes",
    }
    after = config.policy.evict_after
    waits = f"policy {config.policy.name} evicts after {after} generated tokens (evict_after)"
    if max_tokens < 2:
        why = "with --max-tokens 1 there are no decode steps"
    elif max_tokens < 2 + after:
        why = f"{waits}, so --max-tokens must be at least {2 + after}, got {max_tokens}"
    elif plan.skip is not None:
        why = reasons[plan.skip]
    elif config.when == "pressure":
        why = "--kv-compress-when pressure evicts only while blocks are scarce: remove the flag"
    elif generated <= after:
        why = f"{waits}, and the output has {generated}"
    else:
        why = "no text follows the image in this model's chat template, so the window is empty"
    return f"the request kept its full cache, so there is nothing to show: {why}"
