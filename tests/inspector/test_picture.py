# SPDX-License-Identifier: Apache-2.0
"""The picture: drawn for every kind of prompt, with patches at the right positions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from tests.helpers.made_up import inspection
from vl_cache_vllm.inspector.layout import Box, panel
from vl_cache_vllm.inspector.picture import MARKER, _draw, shown_layers, write_picture
from vl_cache_vllm.policy import PatchGrid


def test_shown_layers() -> None:
    assert shown_layers(1) == [0]
    assert shown_layers(12) == list(range(12))
    many = shown_layers(32)
    assert len(many) == 12
    assert (many[0], many[-1]) == (0, 31)
    assert set(np.diff(many)) <= {2, 3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 30, "num_heads": 3},
        {"visual": (), "grids": ()},
        {"grids": ()},
        {"grids": ((2, 2, 4, 4), (10, 2, 4, 4))},
        {"visual": ((0, 4), (4, 8), (8, 12), (12, 16), (16, 20)), "grids": ((0, 2, 2, 2),)},
    ],
    ids=["plain", "deep", "text", "strip", "tiles", "five-images"],
)
def test_it_is_drawn(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "picture.png"
    write_picture(inspection(**changes), path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width == 1400
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert colours.std() > 5
    kept = np.round(np.array(to_rgb("#d97706")) * 255)
    assert (np.abs(colours - kept).max(axis=1) < 3).sum() > 1000  # bars


@pytest.mark.parametrize(
    "area",
    [Box(0, 0, 60, 40), Box(10, 0, 40, 40), Box(0, -10, 60, 60)],
    ids=["whole", "cropped", "padded"],
)
def test_patches_are_where_they_belong(area: Box) -> None:
    """A kept patch is marked, and nothing else is."""
    made = panel((5, 11), [PatchGrid(5, 2, 3, 3)], (60, 40), area)
    values = np.zeros(20)
    values[5 + 3 + 1] = 1.0  # row 1, column 1
    figure = Figure(figsize=(made.width / 10, made.height / 10), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    _draw(axis, made, Image.new("RGB", (60, 40), "black"), values, 1.0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(float)
    left, top = min(0, area.left), min(0, area.top)
    for row in range(2):
        for column in range(3):
            x = area.left - left + (column + 0.5) * area.width / 3
            y = area.top - top + (row + 0.5) * area.height / 2
            red, _, blue = pixels[int(10 * y), int(10 * x)]
            amber = np.array(to_rgb(MARKER)) * 255
            if (row, column) == (1, 1):
                assert red > blue + 50
                assert pixels[int(10 * y), int(10 * x)] == pytest.approx(0.38 * amber, abs=3)
            else:
                assert red == pytest.approx(blue, abs=3)
    assert pixels.shape[:2] == (10 * made.height, 10 * made.width)
