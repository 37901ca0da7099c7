# SPDX-License-Identifier: Apache-2.0
"""Policies keep the tokens that NVIDIA's kvpress keeps, where their definitions agree.

A real engine against kvpress on transformers, one checkpoint, per layer and KV head. The rows of
docs/policies.md, "Parity with kvpress", are tests here, differences too.

Prompts are whole blocks, since ours would keep the tokens behind the last one as well.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from testing import tiny_models
from testing.engine import engine, greedy, image_request, read_trace
from testing.presses import (
    BasePress,
    Kept,
    ObservedAttentionPress,
    PerLayerCompressionPress,
    Presser,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
    ratio,
)

BLOCK = 32
PROSE = "Once upon a time there was a cache that kept everything, and it was always full. " * 12

# Scores of two programs differ by float32 rounding; tokens whose scores differ by less, relative
# to them, are tied, and either may be kept.
ROUNDING = 2e-5


@dataclass(frozen=True)
class Case:
    """A prompt and the settings of its request."""

    prompt: dict[str, Any]
    budget: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Image.Image]:
        images = self.prompt.get("multi_modal_data", {}).get("image", [])
        return images if isinstance(images, list) else [images]


class Evicted(NamedTuple):
    """What an engine kept of a case."""

    case: Case
    prompt_token_ids: list[int]
    kept_tokens: list[int]  # [layers]
    positions: list[list[list[int]]]  # [layers][KV heads]

    @property
    def tokens(self) -> int:
        return len(self.prompt_token_ids)


def with_image(kind: str, characters: int, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    return image_request(kind, PROSE[:characters], seeds)


def window(size: int, kernel: int) -> dict[str, int]:
    """SnapKV's two parameters."""
    return {"max_observation_tokens": size, "pooling": kernel}


def text(characters: int) -> dict[str, Any]:
    """A prompt of as many tokens."""
    return {"prompt": PROSE[:characters]}


def in_whole_blocks(model: Path, case: Case) -> Case:
    """The case with less prose."""
    processor = AutoProcessor.from_pretrained(model)
    prompt = case.prompt["prompt"]
    ids = processor(text=prompt, images=case.images or None, return_tensors="pt")["input_ids"]
    words = max((PROSE[:n] for n in range(len(PROSE)) if PROSE[:n] in prompt), key=len)
    shorter = prompt.replace(words, words[: len(words) - ids.shape[1] % BLOCK])
    return replace(case, prompt={**case.prompt, "prompt": shorter})


Build = Callable[..., Path]
Keep = Callable[..., Kept]
Evict = Callable[..., list[Evicted]]


@pytest.fixture(scope="module")
def checkpoint(models_dir: Path) -> Build:
    def build(kind: str = "llava", **shape: int) -> Path:
        name = "-".join(["kvpress", kind, *map(str, shape.values())])
        return tiny_models.build(kind, models_dir / name, **shape)

    return build


@pytest.fixture(scope="module")
def keep() -> Keep:
    load = functools.cache(Presser)

    def run(model: Path, press: BasePress, evicted: Evicted, attention: str = "eager") -> Kept:
        """What a press keeps of an evicted prompt."""
        presser = load(model, attention)
        inputs = presser.inputs(evicted.case.prompt["prompt"], evicted.case.images)
        assert inputs["input_ids"][0].tolist() == evicted.prompt_token_ids
        return presser.press(press, inputs)

    return run


@pytest.fixture
def evict(tmp_path: Path) -> Evict:
    def run(model: Path, policy: str, cases: list[Case], **settings: Any) -> list[Evicted]:
        """One engine reads all cases."""
        cases = [in_whole_blocks(model, case) for case in cases]
        trace = tmp_path / "trace.jsonl"
        settings |= {"policy": policy, "trace": {"path": str(trace), "positions": True}}
        parameters = [
            greedy(2, extra_args={"kv_budget": case.budget, "kv_policy_options": case.options})
            for case in cases
        ]
        with engine(model, settings, block_size=BLOCK) as llm:
            outputs = llm.generate([case.prompt for case in cases], parameters, use_tqdm=False)
        records = {key.split("-")[0]: record for key, record in read_trace(trace).items()}
        assert len(records) == len(cases)
        assert all(record["evicted_tokens"] == record["tokens"] for record in records.values())
        evicted = []
        for case, output in zip(cases, outputs, strict=True):
            record = records[output.request_id]
            kept = record["kept_tokens"], record["kept_positions"]
            evicted.append(Evicted(case, output.prompt_token_ids, *kept))
        return evicted

    return run


def uniform_ratio(evicted: Evicted) -> float:
    (kept_tokens,) = set(evicted.kept_tokens)
    return ratio(kept_tokens, evicted.tokens)


def share_of_equal_heads(evicted: Evicted, kept: Kept) -> float:
    """Of all layers' KV heads, how many keep exactly the same tokens."""
    ours, theirs = (
        [head for layer in positions for head in layer]
        for positions in (evicted.positions, kept.positions)
    )
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def assert_same(evicted: Evicted, kept: Kept) -> None:
    """The same number of tokens, and the same tokens but for ties."""
    for ours, theirs, scores in zip(evicted.positions, kept.positions, kept.scores, strict=True):
        for a, b, of_head in zip(ours, theirs, scores, strict=True):
            assert len(a) == len(b)
            if differ := sorted(set(a) ^ set(b)):
                tied = of_head[differ]
                assert tied.max() - tied.min() <= ROUNDING * tied.max(), (differ, tied)
    assert share_of_equal_heads(evicted, kept) > 0.5, "ties are rare"


def assert_other(evicted: Evicted, kept: Kept) -> None:
    """Most heads keep other tokens, so that `assert_same` decides something."""
    assert share_of_equal_heads(evicted, kept) < 0.5


@pytest.mark.parametrize("kind", ["llava", "qwen2.5-vl"])
def test_snapkv(kind: str, checkpoint: Build, keep: Keep, evict: Evict) -> None:
    cases = [
        Case(with_image(kind, 100), 0.2),
        Case(with_image(kind, 300, [1]), 0.5, window(64, 5)),
        Case(with_image(kind, 20, [2, 3]), 0.1, window(40, 7)),  # reaches into the second image
        Case(with_image(kind, 200, [4]), 0.25, window(1, 1)),
        Case(text(450), 0.25),
        Case(text(610), 0.4, window(16, 3)),
    ]
    model = checkpoint(kind)
    evicted = evict(model, "snapkv", cases, text=True)
    for attention in ("eager", "sdpa"):
        for one in evicted:
            size = one.case.options.get("max_observation_tokens", 32)
            kernel = one.case.options.get("pooling", 5)
            make = functools.partial(SnapKVPress, uniform_ratio(one))
            assert_same(one, keep(model, make(size, kernel), one, attention))
            assert_other(one, keep(model, make(size + 16, kernel), one, attention))
            assert_other(one, keep(model, make(size, kernel + 2), one, attention))


def test_snapkv_with_fewer_tokens_than_its_window(
    checkpoint: Build, keep: Keep, evict: Evict
) -> None:
    """Ours keeps the window's last tokens; in kvpress all of the window score the same."""
    model = checkpoint()
    (evicted,) = evict(model, "snapkv", [Case(text(320), 0.1, window(64, 5))], text=True)
    kept = keep(model, SnapKVPress(uniform_ratio(evicted), 64, 5), evicted)
    last = list(range(evicted.tokens - BLOCK, evicted.tokens))
    assert all(head == last for layer in evicted.positions for head in layer)
    assert all(len(set(scores[:, -64:].flatten().tolist())) == 1 for scores in kept.scores)
    assert all(min(head) >= evicted.tokens - 64 for layer in kept.positions for head in layer)


def test_streamingllm(checkpoint: Build, keep: Keep, evict: Evict) -> None:
    cases = [
        Case(with_image("llava", 100), 0.2),
        Case(with_image("llava", 33, [1, 2]), 0.1, {"sink_tokens": 8}),
        Case(text(450), 0.25),
        Case(text(610), 0.4, {"sink_tokens": 0}),
    ]
    model = checkpoint()
    for evicted in evict(model, "streamingllm", cases, text=True):
        sinks = evicted.case.options.get("sink_tokens", 4)
        make = functools.partial(StreamingLLMPress, uniform_ratio(evicted))
        assert share_of_equal_heads(evicted, keep(model, make(sinks), evicted)) == 1
        assert share_of_equal_heads(evicted, keep(model, make(sinks + 1), evicted)) == 0


def test_pyramidkv(checkpoint: Build, keep: Keep, evict: Evict) -> None:
    """With kvpress's beta chosen so that its last layer gets what ours does, window included."""
    beta, size, tokens = 3.0, 16, 640
    options = window(size, 5) | {"beta": beta}
    cases = [
        Case(with_image("llava", tokens - 256 - len("USER: \n ASSISTANT:")), 0.25, options),
        Case(text(tokens), 0.25, options),
    ]
    model = checkpoint()
    mean = tokens / 4
    theirs = mean / (size + (mean - size) / beta)
    for evicted in evict(model, "pyramidkv", cases, text=True):
        assert evicted.kept_tokens == [256, 192, 128, 64]
        pyramid = functools.partial(PyramidKVPress, 0.75, size, 5)
        assert_same(evicted, keep(model, pyramid(beta=theirs), evicted))
        kept = keep(model, pyramid(beta=beta), evicted)
        assert [len(layer[0]) for layer in kept.positions] != evicted.kept_tokens


def test_pyramidkv_whose_last_layer_has_little_more_than_its_window(
    checkpoint: Build, keep: Keep, evict: Evict
) -> None:
    """Beyond the window ours are pyramids still, where kvpress's budgets become uniform.

    The tokens are SnapKV's, with as many in each layer.
    """
    model = checkpoint()
    cases = [Case(with_image("llava", 350), 0.25), Case(text(640), 0.25)]
    for evicted in evict(model, "pyramidkv", cases, text=True):
        assert evicted.kept_tokens == sorted(evicted.kept_tokens, reverse=True)
        assert evicted.kept_tokens[0] > evicted.kept_tokens[-1]
        pyramid = keep(model, PyramidKVPress(0.75, 32, 5, beta=20), evicted)
        assert len({len(layer[0]) for layer in pyramid.positions}) == 1
        ratios = [ratio(n, evicted.tokens) for n in evicted.kept_tokens]
        per_layer = PerLayerCompressionPress(SnapKVPress(0.5, 32, 5), ratios)
        assert_same(evicted, keep(model, per_layer, evicted))


@dataclass
class AccumulatedAttentionPress(ObservedAttentionPress):
    """Sums where its parent takes the mean over the queries that see a key; keeps recent ones."""

    recent_tokens: int = 0

    def score(self, *arguments: Any) -> torch.Tensor:
        mean = super().score(*arguments)
        tokens = mean.shape[-1]
        scores = mean * torch.arange(tokens, 0, -1)
        scores[..., tokens - self.recent_tokens :] = torch.inf
        return scores


def test_h2o(checkpoint: Build, keep: Keep, evict: Evict) -> None:
    """Differs in two things: it sums, and half of the kept tokens are the last."""
    cases = [
        Case(with_image("llava", 100), 0.2, {"recent_ratio": 0.0}),
        Case(with_image("llava", 50, [1, 2]), 0.3),
        Case(text(450), 0.25, {"recent_ratio": 0.0}),
        Case(text(610), 0.4),
    ]
    model = checkpoint()
    for evicted in evict(model, "h2o", cases, text=True):
        share = uniform_ratio(evicted)
        recent = math.ceil(evicted.case.options.get("recent_ratio", 0.5) * evicted.kept_tokens[0])
        assert_same(evicted, keep(model, AccumulatedAttentionPress(share, recent), evicted))
        assert_other(evicted, keep(model, ObservedAttentionPress(share), evicted))
        if recent:
            assert_other(evicted, keep(model, AccumulatedAttentionPress(share), evicted))


def test_vlcache_is_snapkv_with_the_post_vision_tokens_as_window(
    checkpoint: Build, keep: Keep, evict: Evict
) -> None:
    """When they are kept, budgets are uniform and nothing is smoothed."""
    characters, kept_tokens = 46, 3 * BLOCK
    post_vision = characters + len("\n ASSISTANT:")
    uniform = {"uniform_mix": 1.0}
    forced = uniform | {"recent_ratio": post_vision / kept_tokens}
    cases = [
        Case(with_image("llava", characters, [seed]), 0.25, options)
        for seed, options in ((0, forced), (1, forced), (2, uniform))
    ]
    model = checkpoint()
    *same, other = evict(model, "vlcache", cases)
    press = SnapKVPress(uniform_ratio(other), post_vision, 1)
    for evicted in same:
        assert set(evicted.kept_tokens) == {kept_tokens}
        assert_same(evicted, keep(model, press, evicted))
    assert_other(other, keep(model, press, other))


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_one_query_is_tova_where_a_layer_has_one_kv_head(
    num_kv_heads: int, checkpoint: Build, keep: Keep, evict: Evict
) -> None:
    """TOVA averages over all heads of a layer, so that its KV heads keep the same tokens."""
    options = {"max_observation_tokens": 1, "uniform_mix": 1.0, "recent_ratio": 0.001}
    cases = [
        Case(with_image("llava", 100), 0.2, options),
        Case(with_image("llava", 50, [1, 2]), 0.3, options),
    ]
    model = checkpoint(num_kv_heads=num_kv_heads)
    for evicted in evict(model, "vlcache", cases):
        kept = keep(model, TOVAPress(uniform_ratio(evicted)), evicted)
        if num_kv_heads == 1:
            assert_same(evicted, kept)
        else:
            assert all(layer[0] == layer[1] for layer in kept.positions)
            assert_other(evicted, kept)
