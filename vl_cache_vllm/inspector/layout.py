# SPDX-License-Identifier: Apache-2.0
"""Positions of visual tokens on a panel, shared by the picture and the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vl_cache_vllm.policy import PatchGrid

# Size of panels whose tokens have no known position in the image: image left, tokens right.
HEIGHT = 300.0
WIDTH = 900.0
GAP = 16.0


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(frozen=True)
class Cells:
    """Tokens at ``grid.first + row * grid.row_stride + column``, drawn edge to edge in a box."""

    grid: PatchGrid
    box: Box


@dataclass(frozen=True)
class Panel:
    """One image and its tokens.

    ``kind`` is "overlay" (cells cover the image), "tiles" (several grids whose positions in the
    image are unknown) or "strip" (layout unknown, tokens in prompt order).
    """

    kind: str
    width: float
    height: float
    picture: Box | None
    cells: tuple[Cells, ...]

    @property
    def partly_seen(self) -> bool:
        """Whether the image of an overlay was cropped or padded, so that cells do not match it."""
        return self.kind == "overlay" and self.picture != self.cells[0].box


def seen_area(width: int, height: int, processor: Any) -> Box:
    """The area of an image that the model sees, in pixels. It may include padding.

    Args:
        width, height: size of the image in pixels.
        processor: the model's Hugging Face image processor, or None. Centre crops (CLIP) and
            padding to a square (LLaVA) are recognised; otherwise the result is the whole image.
    """
    whole = Box(0.0, 0.0, float(width), float(height))
    if callable(getattr(processor, "pad_to_square", None)) and getattr(processor, "do_pad", False):
        side = max(width, height)
        return Box((width - side) / 2, (height - side) / 2, side, side)
    if not getattr(processor, "do_center_crop", False):
        return whole
    crop_width, crop_height = _extents(getattr(processor, "crop_size", None), width, height)
    if crop_width is None or crop_height is None:
        return whole
    resized_width, resized_height = float(width), float(height)
    if getattr(processor, "do_resize", True):
        to = _extents(getattr(processor, "size", None), width, height)
        if to[0] is None or to[1] is None:
            return whole
        resized_width, resized_height = to
    seen_width = crop_width * width / resized_width
    seen_height = crop_height * height / resized_height
    return Box((width - seen_width) / 2, (height - seen_height) / 2, seen_width, seen_height)


def _extents(size: Any, width: int, height: int) -> tuple[float, float] | tuple[None, None]:
    """Image width and height after resizing to a processor's ``size``, or None if unknown."""

    def entry(name: str) -> float | None:
        value = size.get(name) if hasattr(size, "get") else getattr(size, name, None)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    if (short := entry("shortest_edge")) and entry("longest_edge") is None:
        scale = short / min(width, height)
        return width * scale, height * scale
    fixed_width, fixed_height = entry("width"), entry("height")
    if fixed_width and fixed_height:
        return fixed_width, fixed_height
    return None, None


def panel(
    visual: tuple[int, int], grids: Sequence[PatchGrid], size: tuple[int, int] | None, area: Box
) -> Panel:
    """How to draw an image's tokens.

    Args:
        visual: (first, end) positions of the image's tokens.
        grids: patch grids of this image.
        size: width and height of the image in pixels, or None if there is none.
        area: the area of the image that the model sees.
    """
    if len(grids) == 1 and size is not None:
        left, top = min(0.0, area.left), min(0.0, area.top)
        return Panel(
            "overlay",
            max(size[0], area.right) - left,
            max(size[1], area.bottom) - top,
            Box(-left, -top, *map(float, size)),
            (Cells(grids[0], Box(area.left - left, area.top - top, area.width, area.height)),),
        )
    picture = None
    left = 0.0
    if size is not None:
        scale = min(HEIGHT / size[1], WIDTH / 3 / size[0])
        picture = Box(0.0, 0.0, size[0] * scale, size[1] * scale)
        left = picture.right + GAP
    space = Box(left, 0.0, WIDTH - left, HEIGHT)
    cells = _tiles(grids, space) if grids else _strips(*visual, space)
    bottom = max(c.box.bottom for c in cells)
    right = max(c.box.right for c in cells)
    height = max(bottom, picture.height if picture else 0.0)
    return Panel("tiles" if grids else "strip", right, height, picture, cells)


def _tiles(grids: Sequence[PatchGrid], space: Box) -> tuple[Cells, ...]:
    """Arrange grids in rows, all at the same scale."""
    columns = math.ceil(math.sqrt(len(grids) * space.width / space.height))
    columns = min(columns, len(grids))
    rows = math.ceil(len(grids) / columns)
    wide, tall = max(g.columns for g in grids), max(g.rows for g in grids)
    gap = GAP / 2
    cell = min(
        ((space.width + gap) / columns - gap) / wide, ((space.height + gap) / rows - gap) / tall
    )
    return tuple(
        Cells(
            grid,
            Box(
                space.left + (i % columns) * (wide * cell + gap),
                space.top + (i // columns) * (tall * cell + gap),
                grid.columns * cell,
                grid.rows * cell,
            ),
        )
        for i, grid in enumerate(grids)
    )


def _strips(first: int, end: int, space: Box) -> tuple[Cells, ...]:
    """Tokens in prompt order, in separated lines, so that they are not mistaken for an image."""
    count = end - first
    line = min(count, max(32, math.ceil(math.sqrt(8 * count))))
    cell = space.width / line
    pitch = min(2.0 * cell, space.height / math.ceil(count / line))
    return tuple(
        Cells(
            PatchGrid(start, 1, min(line, end - start), line),
            Box(
                space.left,
                space.top + row * pitch,
                min(line, end - start) * cell,
                0.75 * pitch,
            ),
        )
        for row, start in enumerate(range(first, end, line))
    )
