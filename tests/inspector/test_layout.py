# SPDX-License-Identifier: Apache-2.0
"""Positions of tokens, and the area that the model sees, compared with its own processor."""

import itertools
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, LlavaImageProcessor, Qwen2VLImageProcessor

from vl_cache_vllm.inspector.layout import Box, Panel, panel, seen_area
from vl_cache_vllm.policy import PatchGrid

RAW = {"do_rescale": False, "do_normalize": False}
SIZES = [(300, 200), (200, 300), (240, 240), (900, 100)]


def coordinates(width: int, height: int) -> Image.Image:
    """A picture whose red says the column and green the row, 0 to 200; blue is 255 everywhere."""
    red, green = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    pixels = np.stack((red, green, np.full_like(red, 255)), axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **RAW
        ),
        CLIPImageProcessor(
            size={"shortest_edge": 96}, crop_size={"height": 64, "width": 64}, **RAW
        ),
        CLIPImageProcessor(
            size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64}, **RAW
        ),
        CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, **RAW),
        LlavaImageProcessor(
            do_pad=True,
            size={"height": 64, "width": 64},
            crop_size={"height": 64, "width": 64},
            **RAW,
        ),
    ],
    ids=["crop", "crop-more", "stretch-crop", "stretch", "pad"],
)
def test_seen_area_is_what_the_processor_passes_on(processor: Any, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.asarray(processor(coordinates(*size), return_tensors="np")["pixel_values"])[0]
    area = seen_area(*size, processor)
    inside = 0
    for row, column in itertools.product(range(4, 64, 4), repeat=2):
        x = area.left + (column + 0.5) / 64 * area.width
        y = area.top + (row + 0.5) / 64 * area.height
        red, green, blue = (float(v) for v in pixels[:, row, column])
        margin_x, margin_y = area.width / 32, area.height / 32
        if margin_x < x < width - margin_x and margin_y < y < height - margin_y:
            inside += 1
            assert red == pytest.approx(200 * x / width, abs=4)
            assert green == pytest.approx(200 * y / height, abs=4)
        elif min(x, width - x) < -margin_x or min(y, height - y) < -margin_y:
            assert blue != pytest.approx(255, abs=60)  # padding
    assert inside > 4


class Odd:
    do_center_crop = True
    crop_size = None
    size: ClassVar[dict[str, int]] = {"longest_edge": 10}


@pytest.mark.parametrize(
    "processor", [None, Odd(), Qwen2VLImageProcessor()], ids=["none", "odd", "qwen"]
)
def test_seen_area_is_the_whole_image_where_nothing_is_known(processor: Any) -> None:
    assert seen_area(300, 200, processor) == Box(0, 0, 300, 200)


def covers(made: Panel) -> list[int]:
    """The tokens of all cells; they lie within the panel, apart from each other and the picture."""
    boxes = [cells.box for cells in made.cells]
    if made.kind != "overlay" and made.picture is not None:
        boxes.append(made.picture)
    for box in boxes:
        assert box.left >= 0
        assert box.top >= 0
        assert box.right <= made.width + 1e-6
        assert box.bottom <= made.height + 1e-6
    for a, b in itertools.combinations(boxes, 2):
        apart = a.right <= b.left + 1e-6 or b.right <= a.left + 1e-6
        assert apart or a.bottom <= b.top + 1e-6 or b.bottom <= a.top + 1e-6
    return sorted(t for c in made.cells for t in c.grid.positions("cpu").flatten().tolist())  # type: ignore[arg-type]


def test_one_grid_lies_over_what_is_seen() -> None:
    grid = PatchGrid(3, 2, 5, 6)
    whole = panel((3, 15), [grid], (300, 200), Box(0, 0, 300, 200))
    assert (whole.kind, whole.width, whole.height) == ("overlay", 300, 200)
    assert whole.picture == whole.cells[0].box == Box(0, 0, 300, 200)
    assert not whole.partly_seen
    cropped = panel((3, 15), [grid], (300, 200), Box(50, 0, 200, 200))
    assert (cropped.width, cropped.height) == (300, 200)
    assert cropped.cells[0].box == Box(50, 0, 200, 200)
    padded = panel((3, 15), [grid], (300, 200), Box(0, -50, 300, 300))
    assert (padded.width, padded.height) == (300, 300)
    assert padded.picture == Box(0, 50, 300, 200)
    assert padded.cells[0].box == Box(0, 0, 300, 300)
    assert cropped.partly_seen
    assert padded.partly_seen
    assert covers(padded) == [3, 4, 5, 6, 7, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("size", [None, (300, 200), (100, 1000), (4000, 30)], ids=str)
@pytest.mark.parametrize("count", [2, 5, 13])
def test_tiles_lie_side_by_side(count: int, size: tuple[int, int] | None) -> None:
    grids = [PatchGrid(10 + 12 * i, 3, 4, 4) for i in range(count)]
    made = panel((10, 10 + 12 * count), grids, size, Box(0, 0, 1, 1))
    assert made.kind == "tiles"
    assert covers(made) == list(range(10, 10 + 12 * count))
    for cells in made.cells:
        assert cells.box.width / 4 == pytest.approx(cells.box.height / 3)
        assert cells.box.width == pytest.approx(made.cells[0].box.width)


@pytest.mark.parametrize("size", [None, (300, 200), (100, 1000)], ids=str)
@pytest.mark.parametrize("count", [1, 31, 33, 166, 2880])
def test_strips_show_every_token_once(count: int, size: tuple[int, int] | None) -> None:
    made = panel((7, 7 + count), [], size, Box(0, 0, 1, 1))
    assert made.kind == "strip"
    assert covers(made) == list(range(7, 7 + count))
    assert all(cells.grid.rows == 1 for cells in made.cells)


def test_a_grid_without_a_picture_is_a_tile() -> None:
    assert panel((0, 4), [PatchGrid(0, 2, 2, 2)], None, Box(0, 0, 1, 1)).kind == "tiles"
