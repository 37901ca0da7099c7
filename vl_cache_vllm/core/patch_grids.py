# SPDX-License-Identifier: Apache-2.0
"""Where the visual tokens of a prompt lie in their images, as far as vLLM's features tell."""

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt

import torch
from transformers import PretrainedConfig
from vllm.config import ModelConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vl_cache_vllm.core.admission import VISUAL_MODALITIES
from vl_cache_vllm.policy import PatchGrid

# Their images, or the tiles of them, are square, and structural tokens stand between tiles.
_SQUARES = frozenset({"llava", "vipllava", "idefics3", "smolvlm"})

Runs = list[tuple[int, int]]  # (first position, length) of adjacent visual tokens


def patch_grids(
    features: Sequence[MultiModalFeatureSpec], model: ModelConfig
) -> tuple[PatchGrid, ...]:
    """The grids of a prompt's images and videos, in order; none for an image not understood.

    Which layout a model has is decided by the model alone, never by what a request's features
    carry: vLLM leaves their data out where the prefix cache covers an image. Known are

    - models with M-RoPE (Qwen-VL and its kin): their processors state the grid, and vLLM keeps it;
    - Pixtral's encoder: every row ends with a token of its own;
    - square images and tiles (LLaVA-1.5, Idefics3, SmolVLM).
    """
    vision = getattr(model.hf_config, "vision_config", None)
    grids: list[PatchGrid] = []
    for feature in features:
        if feature.modality not in VISUAL_MODALITIES:
            continue
        ranges = feature.mm_position.extract_embeds_range()
        runs = [(first, last - first + 1) for first, last in ranges]
        if model.uses_mrope:
            if feature.modality != "video" or not _prunes_videos(model):
                grids += _stated(feature, runs, _stated_merge(model.hf_config))
        elif getattr(vision, "model_type", None) == "pixtral":
            grids += _rows(runs, feature.mm_position.offset + feature.mm_position.length)
        elif model.hf_config.model_type in _SQUARES:
            grids += _squares(runs)
    return tuple(grids)


def _prunes_videos(model: ModelConfig) -> bool:
    """Whether a video's tokens are others than its grid says, be they as many.

    vLLM prunes some after the encoder, and then counts Qwen3-VL's time stamps among the visual.
    """
    multimodal = model.multimodal_config
    return multimodal is not None and multimodal.is_multimodal_pruning_enabled()


def _stated_merge(hf_config: PretrainedConfig) -> int | None:
    """Patches along each side of a visual token; None where the configuration does not say.

    Qwen2.5-Omni and Qwen3-Omni keep the vision configuration inside that of their thinker.
    """
    for config in (hf_config, getattr(hf_config, "thinker_config", None)):
        vision = getattr(config, "vision_config", None)
        if merge := getattr(vision, "spatial_merge_size", None):
            return merge
    return None


def _counted_merge(patches: Sequence[tuple[int, int, int]], num_tokens: int) -> int | None:
    """The same from the numbers alone: Isaac has another name for it; None where they leave doubt.

    Several frames leave doubt, because a model may also merge patches of consecutive frames.
    """
    if not num_tokens or any(frames != 1 for frames, _, _ in patches):
        return None
    num_patches = sum(height * width for _, height, width in patches)
    merge = isqrt(num_patches // num_tokens)
    return merge if merge**2 * num_tokens == num_patches else None


def _stated(feature: MultiModalFeatureSpec, runs: Runs, merge: int | None) -> list[PatchGrid]:
    """Frame by frame; none where the tokens are others than the processor says."""
    element = feature.data.get(f"{feature.modality}_grid_thw") if feature.data else None
    if element is None or not isinstance(element.data, torch.Tensor):
        return []
    positions = [first + i for first, length in runs for i in range(length)]
    patches = element.data.reshape(-1, 3).tolist()
    merge = merge or _counted_merge(patches, len(positions))
    if not merge:
        return []
    grids, taken = [], 0
    for frames, height, width in patches:
        if height % merge or width % merge:
            return []
        rows, columns = height // merge, width // merge
        for _ in range(frames):
            own = positions[taken : taken + rows * columns]
            if len(own) < rows * columns or not own or own[-1] - own[0] != len(own) - 1:
                return []
            grids.append(PatchGrid(own[0], rows, columns, columns))
            taken += len(own)
    return grids if taken == len(positions) else []


def _rows(runs: Runs, end: int) -> list[PatchGrid]:
    """Runs of one length, one token apart, as the rows of one grid.

    None where the last row has no end: LightOnOCR has Pixtral's encoder, and leaves the ends out.
    """
    if not runs or sum(runs[-1]) == end:
        return []
    start, columns = runs[0]
    apart = all(after == (before[0] + columns + 1, columns) for before, after in pairwise(runs))
    return [PatchGrid(start, len(runs), columns, columns + 1)] if apart else []


def _squares(runs: Runs) -> list[PatchGrid]:
    """Each run as a square; none unless all are."""
    if any(isqrt(length) ** 2 != length for _, length in runs):
        return []
    return [PatchGrid(first, isqrt(n), isqrt(n), isqrt(n)) for first, n in runs]
