# SPDX-License-Identifier: Apache-2.0
"""Prompts with videos and with sound beside images, against the oracle of the model matrix."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import testing.random_weights  # noqa: F401  registers the load format
from checks import matrix
from testing import engine as harness
from testing import model_zoo
from testing.attention_recorder import recording
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


def request(kind: str, parts: str, question: str) -> dict[str, Any]:
    """A prompt of videos (v) and images (i), followed by a question."""
    texts = dict(zip("vi", KINDS[kind], strict=False))
    data = {
        "video": [video(10 + number) for number in range(parts.count("v"))],
        "image": [random_image(50 + number) for number in range(parts.count("i"))],
    }
    return {
        "prompt": "".join(str(texts[part]) for part in parts) + question,
        "multi_modal_data": {name: found for name, found in data.items() if found},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_videos_are_exact(models_dir: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    settings = {"policy": "vlcache", "budget": matrix.BUDGET}
    with harness.engine(
        model_zoo.build(kind, models_dir / kind),
        settings | {"trace": {"path": str(trace), "positions": True}},
        load_format="random",
        max_model_len=4096,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=128 << 20,
        limit_mm_per_prompt={"image": 2, "video": 2},
    ) as llm:

        def ask(parts: str, question: str = matrix.QUESTION) -> tuple[Any, Any, dict[str, Any]]:
            with recording(llm) as layers:
                (output,) = llm.generate(
                    [request(kind, parts, question)],
                    harness.greedy(matrix.NUM_TOKENS),
                    use_tqdm=False,
                )
            return output, layers, list(read_trace(trace).values())[-1]

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
