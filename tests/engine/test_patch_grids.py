# SPDX-License-Identifier: Apache-2.0
"""Patch grids from vLLM's features, model family by model family."""

from types import SimpleNamespace

import pytest
import torch
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    PlaceholderRange,
)

from vl_cache_vllm.engine.patch_grids import patch_grids
from vl_cache_vllm.policy import PatchGrid

LLAVA = SimpleNamespace(vision_config=SimpleNamespace(image_size=336))
QWEN = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))


def feature(
    offset: int,
    mask: str,
    grid: tuple[int, int, int] | None = None,
    modality: str = "image",
) -> MultiModalFeatureSpec:
    """``mask``: a letter for each token, "v" for visual ones."""
    is_embed = torch.tensor([letter == "v" for letter in mask])
    data = None
    if grid is not None:
        config = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        (element,) = config.build_elems(f"{modality}_grid_thw", torch.tensor([grid]))
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
    (first, second) = patch_grids([feature(4, "v" * 12, (2, 4, 6), "video")], QWEN)
    assert (first, second) == (PatchGrid(4, 2, 3, 3), PatchGrid(10, 2, 3, 3))
    apart = feature(4, "ttvvvvvvttvvvvvv", (2, 4, 6), "video")
    assert patch_grids([apart], QWEN) == (PatchGrid(6, 2, 3, 3), PatchGrid(14, 2, 3, 3))


@pytest.mark.parametrize("mask", ["v" * 11, "v" * 13, "vvvvvbvvvvvvv"])
def test_tokens_others_than_stated_have_no_grid(mask: str) -> None:
    assert patch_grids([feature(4, mask, (1, 6, 8))], QWEN) == ()


def test_rows_with_ends() -> None:
    assert patch_grids([feature(7, "vvvvbvvvvbvvvve")], LLAVA) == (PatchGrid(7, 3, 4, 5),)


def test_tiles_with_marks_between() -> None:
    tiles = feature(10, "ss" + "v" * 9 + "ss" + "v" * 9 + "s")
    assert patch_grids([tiles], LLAVA) == (PatchGrid(12, 3, 3, 3), PatchGrid(23, 3, 3, 3))


def test_unknown_layouts() -> None:
    assert patch_grids([feature(0, "v" * 7)], LLAVA) == ()
    next_config = SimpleNamespace(image_grid_pinpoints=[[336, 672]])
    assert patch_grids([feature(0, "v" * 576)], next_config) == ()
    assert patch_grids([feature(0, "v" * 9, modality="audio")], LLAVA) == ()


def test_one_unknown_image_does_not_hide_the_others() -> None:
    features = [feature(0, "v" * 7), feature(9, "v" * 9)]
    assert patch_grids(features, LLAVA) == (PatchGrid(9, 3, 3, 3),)


def test_positions() -> None:
    grid = PatchGrid(7, 2, 3, 4)
    assert grid.positions(torch.device("cpu")).tolist() == [[7, 8, 9], [11, 12, 13]]
