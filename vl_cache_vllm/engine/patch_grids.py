# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of a prompt lie in their images, as far as vLLM's features tell."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vl_cache_vllm.engine.admission import VISUAL_MODALITIES
from vl_cache_vllm.policy import PatchGrid


def patch_grids(features: Sequence[MultiModalFeatureSpec], hf_config: Any) -> tuple[PatchGrid, ...]:
    """The grids of a prompt's images and videos, in order; none for an image not understood.

    Known are images whose processor states the grid (the Qwen-VL family: ``image_grid_thw``), rows
    that end with a structural token (Pixtral), and square images or tiles (LLaVA, Idefics3). Not
    known are layouts of several resolutions (LLaVA-NeXT, LLaVA-OneVision).
    """
    vision = getattr(hf_config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None) or 1
    mixed = getattr(hf_config, "image_grid_pinpoints", None) is not None
    grids: list[PatchGrid] = []
    for feature in features:
        if feature.modality not in VISUAL_MODALITIES:
            continue
        ranges = feature.mm_position.extract_embeds_range()
        runs = [(first, last - first + 1) for first, last in ranges]
        stated = _stated_grid(feature)
        if stated is not None:
            frames, height, width = stated
            grids += _frames(runs, frames, height // merge, width // merge)
        elif not mixed:
            grids += _rows(runs) or _squares(runs)
    return tuple(grids)


def _stated_grid(feature: MultiModalFeatureSpec) -> tuple[int, int, int] | None:
    """Frames, rows and columns of patches, before they are merged."""
    element = feature.data.get(f"{feature.modality}_grid_thw") if feature.data else None
    if element is None or element.data is None:
        return None
    assert isinstance(element.data, torch.Tensor)
    frames, height, width = element.data.flatten().tolist()
    return frames, height, width


def _frames(
    runs: Sequence[tuple[int, int]], frames: int, rows: int, columns: int
) -> Iterator[PatchGrid]:
    """Of a stated grid, frame by frame; nothing where the tokens are others than it says."""
    positions = [first + i for first, length in runs for i in range(length)]
    size = rows * columns
    starts = positions[::size]
    whole = len(positions) == frames * size and all(
        positions[i * size + size - 1] == start + size - 1 for i, start in enumerate(starts)
    )
    if whole:
        yield from (PatchGrid(start, rows, columns, columns) for start in starts)


def _rows(runs: Sequence[tuple[int, int]]) -> list[PatchGrid]:
    """Runs of one length, one token apart, as the rows of one grid."""
    (start, columns), *others = runs
    apart = all(
        after[0] == before[0] + columns + 1 and after[1] == columns
        for before, after in pairwise(runs)
    )
    return [PatchGrid(start, len(runs), columns, columns + 1)] if others and apart else []


def _squares(runs: Sequence[tuple[int, int]]) -> list[PatchGrid]:
    """Each run as a square; none unless all are."""
    if any(isqrt(length) ** 2 != length for _, length in runs):
        return []
    return [PatchGrid(first, isqrt(n), isqrt(n), isqrt(n)) for first, n in runs]
