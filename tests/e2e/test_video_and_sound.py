# SPDX-License-Identifier: Apache-2.0
"""Prompts with videos and with sound beside images, against the oracle of the model matrix."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import LLM, RequestOutput

import testing.random_weights  # noqa: F401  registers the load format
from checks import matrix
from testing import engine as harness
from testing import model_zoo
from testing.attention_recorder import Record, after_hit, recording
from testing.engine import read_trace
from testing.tiny_models import random_image

FRAMES = 8
QWEN = "<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"
# Texts of a video and of an image in a prompt, and the grids of a video: one for each pair of
# frames where the processor states them.
KINDS = {
    "qwen2.5-vl": (*QWEN, FRAMES // 2),
    "qwen3-vl": (*QWEN, FRAMES // 2),
    "llava-onevision": ("<video>\n", "<image>\n", 0),
    "internvl": ("<video>\n", "<IMG_CONTEXT>\n", 0),
    "nemotron-nano-vl": ("<video>\n", "<image>\n", 0),
}


def video(seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture that moves, with what vLLM's loader says of it."""
    picture = np.asarray(random_image(seed).convert("RGB"))
    frames = np.stack([np.roll(picture, 9 * frame, axis=1) for frame in range(FRAMES)])
    return frames, {
        "fps": 2.0,
        "duration": FRAMES / 2,
        "total_num_frames": FRAMES,
        "frames_indices": [*range(FRAMES)],
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def request(kind: str, parts: str, question: str, text: str = "") -> dict[str, Any]:
    """A prompt of videos (v) and images (i), a text before each, followed by a question."""
    texts = dict(zip("vi", KINDS[kind], strict=False))
    data = {
        "video": [video(10 + number) for number in range(parts.count("v"))],
        "image": [random_image(50 + number) for number in range(parts.count("i"))],
    }
    return {
        "prompt": "".join(text + str(texts[part]) for part in parts) + question,
        "multi_modal_data": {name: found for name, found in data.items() if found},
    }


Ask = Callable[..., tuple[RequestOutput, list[Record], dict[str, Any]]]


@contextlib.contextmanager
def engine(kind: str, models_dir: Path, trace: Path, **kwargs: Any) -> Iterator[tuple[LLM, Ask]]:
    """An engine, and what asks it: the arguments are those of `request` without the kind."""
    settings = {"policy": "vlcache", "budget": matrix.BUDGET}
    with harness.engine(
        model_zoo.build(kind, models_dir / kind),
        settings | {"trace": {"path": str(trace), "positions": True}},
        load_format="random",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=128 << 20,
        limit_mm_per_prompt={"image": 2, "video": 2},
        **kwargs,
    ) as llm:

        def ask(
            parts: str, question: str = matrix.QUESTION, text: str = ""
        ) -> tuple[RequestOutput, list[Record], dict[str, Any]]:
            with recording(llm) as layers:
                (output,) = llm.generate(
                    [request(kind, parts, question, text)],
                    harness.greedy(matrix.NUM_TOKENS),
                    use_tqdm=False,
                )
            return output, layers, list(read_trace(trace).values())[-1]

        yield llm, ask


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"nemotron-nano-vl"}))
def test_videos_are_exact(models_dir: Path, tmp_path: Path, kind: str) -> None:
    with engine(kind, models_dir, tmp_path / "trace") as (llm, ask):
        for parts in ("v", "vv", "iv", "vi"):
            llm.reset_prefix_cache()  # a record must contain the whole prompt
            output, layers, record = ask(parts)
            assert len(record["visual"]) == len(parts)
            grids = sum(KINDS[kind][2] if part == "v" else 1 for part in parts)
            assert len(record["grids"]) == (grids if KINDS[kind][2] else 0)
            row = matrix.compare(layers, len(output.prompt_token_ids), record["vision_end"], record)
            assert row is not None

        # The next question about the same video and image continues from the prefix cache.
        second, _, cached = ask("vi", "And then? " + matrix.QUESTION)
        assert second.num_cached_tokens == cached["vision_end"] // 32 * 32
        llm.reset_prefix_cache()
        fresh, _, expected = ask("vi", "And then? " + matrix.QUESTION)
        assert fresh.num_cached_tokens == 0
        assert cached["kept_positions"] == expected["kept_positions"]
        assert harness.token_ids(second) == harness.token_ids(fresh)


@pytest.mark.parametrize(
    ("kind", "method", "rate"),
    [
        pytest.param("qwen2.5-vl", "evs", 0.5, marks=pytest.mark.both_runners),
        pytest.param("qwen3-vl", "evs", 0.5, marks=pytest.mark.both_runners),
        # As many tokens are gone as are in time stamps: all lengths are those of whole videos.
        ("qwen3-vl", "vidcom2", 60 / 352),
    ],
)
def test_pruned_videos_are_exact(
    models_dir: Path, tmp_path: Path, kind: str, method: str, rate: float
) -> None:
    """They have no grids.

    There is text before each, because vLLM's positions of pruned videos need some: as many tokens
    as a time stamp has, and after a video of Qwen2.5-VL as many as are pruned. The next question
    has other positions with the prefix cache than without, also in plain vLLM; so it is not
    compared with a fresh one, but with the oracle.
    """
    text = (3 * matrix.QUESTION)[:420]
    pruning = {"video_pruning_rate": rate, "video_pruning_method": method}
    with engine(kind, models_dir, tmp_path / "trace", **pruning) as (llm, ask):
        if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0":
            # vLLM's V1 runner sets this when it loads a model, which that for CPUs does otherwise.
            worker: Any = llm.llm_engine.model_executor.driver_worker.worker
            worker.model_runner.is_multimodal_pruning_enabled = True
        for parts in ("v", "vv", "iv", "vi"):
            llm.reset_prefix_cache()
            output, layers, record = ask(parts, text=text)
            assert output.prompt_token_ids is not None
            length, end = len(output.prompt_token_ids), record["vision_end"]
            assert length - end == len("E" + matrix.QUESTION)
            assert len(record["visual"]) == len(parts)
            assert len(record["grids"]) == parts.count("i")
            assert matrix.compare(layers, length, end, record) is not None

        more = "And then? "
        second, others, cached = ask("vi", more + matrix.QUESTION, text)
        assert second.num_cached_tokens == end // 32 * 32
        layers = after_hit(others, layers, second.num_cached_tokens)
        assert matrix.compare(layers, length + len(more), end, cached) is not None


@pytest.mark.parametrize("rate", [0.0, 0.5], ids=["whole", "pruned"])
def test_videos_beside_mamba_are_exact(models_dir: Path, tmp_path: Path, rate: float) -> None:
    kind, dtype, lengths = "nemotron-nano-vl", "bfloat16", []
    with engine(
        kind,
        models_dir,
        tmp_path / "trace",
        dtype=dtype,
        trust_remote_code=True,
        enable_prefix_caching=False,
        video_pruning_rate=rate,
    ) as (_, ask):
        for parts in ("v", "iv"):
            output, layers, record = ask(parts)
            assert output.prompt_token_ids is not None
            length, end = len(output.prompt_token_ids), record["vision_end"]
            assert length - end == len("\n" + matrix.QUESTION)
            assert matrix.compare(layers, length, end, record, dtype) is not None
            first, last = record["visual"][-1]
            lengths.append(last - first)
    # Of 8 frames of 49 tokens, half are pruned; their time stamps and marks stay.
    assert lengths == [679 - round(rate * 8 * 49)] * 2


def test_sound_counts_as_text(models_dir: Path, tmp_path: Path) -> None:
    """Its tokens after the image are observed like the question, and those before it are kept or
    lost like all others."""
    trace, kind = tmp_path / "trace", "qwen2.5-omni"
    settings = {"policy": "vlcache", "budget": matrix.BUDGET}
    image = model_zoo.prompt_for(kind, "", 1)
    sound = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    samples = np.random.default_rng(0).standard_normal(2 * 16000).astype(np.float32)
    with harness.engine(
        model_zoo.build(kind, models_dir / kind),
        settings | {"trace": {"path": str(trace), "positions": True}},
        load_format="random",
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1, "audio": 1},
    ) as llm:
        ends = []
        for prompt in (image + sound, sound + image):
            data = {"image": [random_image(5)], "audio": [(samples, 16000)]}
            one: Any = {"prompt": prompt + matrix.QUESTION, "multi_modal_data": data}
            with recording(llm) as layers:
                (output,) = llm.generate([one], harness.greedy(matrix.NUM_TOKENS), use_tqdm=False)
            record = list(read_trace(trace).values())[-1]
            ((_, end),) = record["visual"]
            assert record["vision_end"] == end
            assert output.prompt_token_ids is not None
            row = matrix.compare(layers, len(output.prompt_token_ids), end, record)
            assert row is not None
            ends.append(end)
        assert ends[0] < ends[1]  # sound after the image is observed, sound before it is not
