# SPDX-License-Identifier: Apache-2.0
"""Patch grids from vLLM's features, model family by model family."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig, MultiModalConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from testing import model_zoo
from vl_cache_vllm.core.patch_grids import patch_grids
from vl_cache_vllm.policy import PatchGrid


def model(kind: str, mrope: bool = False, pruning_rate: float = 0.0, **vision: Any) -> Any:
    """What is asked of a ``ModelConfig``."""
    hf_config = SimpleNamespace(model_type=kind, vision_config=SimpleNamespace(**vision))
    multimodal = MultiModalConfig(video_pruning_rate=pruning_rate)
    return SimpleNamespace(hf_config=hf_config, uses_mrope=mrope, multimodal_config=multimodal)


LLAVA = model("llava", model_type="clip_vision_model")
PIXTRAL = model("llava", model_type="pixtral")
IDEFICS = model("idefics3")
QWEN = model("qwen2_vl", mrope=True, spatial_merge_size=2)
UNSAID = model("isaac", mrope=True, pixel_shuffle_scale_factor=2)
PRUNING = model("qwen3_vl", mrope=True, pruning_rate=0.5, spatial_merge_size=2)
OMNI = model("qwen2_5_omni", mrope=True)
OMNI.hf_config = SimpleNamespace(model_type="qwen2_5_omni", thinker_config=QWEN.hf_config)


def feature(
    offset: int,
    mask: str,
    *grids: tuple[int, int, int],
    modality: str = "image",
) -> MultiModalFeatureSpec:
    """``mask``: a letter for each token, "v" for visual ones."""
    is_embed = torch.tensor([letter == "v" for letter in mask])
    data = None
    if grids:
        config = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        stated = torch.tensor(grids)[None]  # of one item
        (element,) = config.build_elems(f"{modality}_grid_thw", stated)
        data = MultiModalKwargsItem({f"{modality}_grid_thw": element})
    position = PlaceholderRange(
        offset, len(mask), is_embed=None if bool(is_embed.all()) else is_embed
    )
    return MultiModalFeatureSpec(data, modality, "hash", position)


def test_a_square_image() -> None:
    assert patch_grids([feature(5, "v" * 576)], LLAVA) == (PatchGrid(5, 24, 24, 24),)


def test_stated_grids_are_merged() -> None:
    features = [feature(4, "v" * 12, (1, 6, 8)), feature(40, "v" * 6, (1, 4, 6))]
    assert patch_grids(features, QWEN) == (PatchGrid(4, 3, 4, 4), PatchGrid(40, 2, 3, 3))


def test_frames_of_a_video() -> None:
    (first, second) = patch_grids([feature(4, "v" * 12, (2, 4, 6), modality="video")], QWEN)
    assert (first, second) == (PatchGrid(4, 2, 3, 3), PatchGrid(10, 2, 3, 3))
    apart = feature(4, "ttvvvvvvttvvvvvv", (2, 4, 6), modality="video")
    assert patch_grids([apart], QWEN) == (PatchGrid(6, 2, 3, 3), PatchGrid(14, 2, 3, 3))


@pytest.mark.parametrize("of", [OMNI, UNSAID], ids=["nested", "unsaid"])
def test_a_merge_that_the_vision_configuration_does_not_say(of: Any) -> None:
    assert patch_grids([feature(4, "v" * 16, (1, 8, 8))], of) == (PatchGrid(4, 4, 4, 4),)


def test_frames_of_a_nested_configuration() -> None:
    """The sound of a video stands between its frames, and is not visual."""
    video = feature(4, "svvvvvvaavvvvvvae", (2, 4, 6), modality="video")
    assert patch_grids([video], OMNI) == (PatchGrid(5, 2, 3, 3), PatchGrid(13, 2, 3, 3))


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_a_merge_counted(merge: int) -> None:
    image = feature(4, "v" * 6, (1, 2 * merge, 3 * merge))
    assert patch_grids([image], UNSAID) == (PatchGrid(4, 2, 3, 3),)


@pytest.mark.parametrize(
    ("tokens", "grid"),
    [
        (32, (1, 8, 8)),  # two patches a token
        (48, (1, 8, 8)),  # a fraction of a patch
        (128, (1, 8, 8)),
        (16, (4, 4, 4)),  # 2 x 2 patches, or the same patch of four frames
        (9, (1, 3, 12)),  # rows that do not divide
        (4, (1, 1, 16)),
    ],
)
def test_numbers_that_leave_doubt(tokens: int, grid: tuple[int, int, int]) -> None:
    assert patch_grids([feature(4, "v" * tokens, grid)], UNSAID) == ()


def test_a_merge_that_is_said_is_not_counted() -> None:
    """Three quarters of a video's tokens may be pruned: what is left looks like merge 4."""
    pruned = feature(4, "v" * 16, (1, 16, 16))
    assert patch_grids([pruned], QWEN) == ()
    assert patch_grids([pruned], OMNI) == ()


@pytest.mark.parametrize("tokens", [9, 12, 15])
def test_a_pruned_video_has_no_grid(tokens: int) -> None:
    """Nor where as many time stamps have come as tokens are gone."""
    features = [
        feature(4, "v" * tokens, (2, 4, 6), modality="video"),
        feature(40, "v" * 6, (1, 4, 6)),
    ]
    assert patch_grids(features, PRUNING) == (PatchGrid(40, 2, 3, 3),)


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize(
    "kind", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen2.5-omni", "glm4v", "glm-ocr"]
)
def test_processors_with_mrope(kind: str, modality: str, tmp_path: Path) -> None:
    """Of what vLLM's processor makes, all visual tokens have a place, in grids side by side."""
    path = str(model_zoo.build(kind, tmp_path / kind))
    config = ModelConfig(model=path, tokenizer=path, dtype="float32", max_model_len=2048)
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    processed = processor.get_dummy_mm_inputs({modality: 1})
    (item,), (place,) = (
        processed["mm_kwargs"][modality],
        processed["mm_placeholders"][modality],
    )
    grids = patch_grids([MultiModalFeatureSpec(item, modality, "hash", place)], config)
    visual = [p for first, last in place.extract_embeds_range() for p in range(first, last + 1)]
    assert visual and [p for grid in grids for p in grid.positions("cpu").flatten()] == visual
    frames, height, width = item[f"{modality}_grid_thw"].data.tolist()
    assert len(grids) == frames
    assert all(grid.rows * width == grid.columns * height for grid in grids)


@pytest.mark.parametrize("mask", ["v" * 11, "v" * 13, "vvvvvbvvvvvvv"])
def test_tokens_others_than_stated_have_no_grid(mask: str) -> None:
    assert patch_grids([feature(4, mask, (1, 6, 8))], QWEN) == ()


def test_grids_stated_row_by_row() -> None:
    """As some processors state a video's frames."""
    frames = feature(4, "v" * 12, (1, 4, 6), (1, 4, 6), modality="video")
    assert patch_grids([frames], QWEN) == (PatchGrid(4, 2, 3, 3), PatchGrid(10, 2, 3, 3))


def test_a_statement_that_is_gone_is_not_replaced_by_a_guess() -> None:
    """vLLM leaves the data of images out that the prefix cache covers."""
    assert patch_grids([feature(4, "v" * 9)], QWEN) == ()
    # Without M-RoPE it is gone after a hit, so it does not count before either.
    assert patch_grids([feature(4, "v" * 12, (1, 6, 8))], model("dots_ocr")) == ()


def test_rows_with_ends() -> None:
    assert patch_grids([feature(7, "vvvvbvvvvbvvvve")], PIXTRAL) == (PatchGrid(7, 3, 4, 5),)
    assert patch_grids([feature(7, "vvvve")], PIXTRAL) == (PatchGrid(7, 1, 4, 5),)
    assert patch_grids([feature(7, "vvvvbvvv")], PIXTRAL) == ()
    assert patch_grids([feature(7, "vvvv")], PIXTRAL) == ()  # LightOnOCR leaves the ends out


def test_tiles_with_marks_between() -> None:
    tiles = feature(10, "ss" + "v" * 9 + "s" + "v" * 9 + "s")
    assert patch_grids([tiles], IDEFICS) == (PatchGrid(12, 3, 3, 3), PatchGrid(22, 3, 3, 3))


@pytest.mark.parametrize("kind", ["llava_next", "internvl_chat", "kimi_vl", "minicpmv"])
def test_unknown_layouts(kind: str) -> None:
    """A number of tokens that happens to be a square is none."""
    assert patch_grids([feature(0, "v" * 1024)], model(kind)) == ()


def test_what_is_no_square_or_no_image() -> None:
    assert patch_grids([feature(0, "v" * 7)], LLAVA) == ()
    assert patch_grids([feature(0, "v" * 9, modality="audio")], LLAVA) == ()
    assert patch_grids([feature(0, "ttt")], LLAVA) == ()


def test_one_unknown_image_does_not_hide_the_others() -> None:
    features = [feature(0, "v" * 7), feature(9, "v" * 9)]
    assert patch_grids(features, LLAVA) == (PatchGrid(9, 3, 3, 3),)


def test_positions() -> None:
    grid = PatchGrid(7, 2, 3, 4)
    assert grid.positions(torch.device("cpu")).tolist() == [[7, 8, 9], [11, 12, 13]]
