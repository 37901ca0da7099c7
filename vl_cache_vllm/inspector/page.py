# SPDX-License-Identifier: Apache-2.0
"""The report of an inspection: one HTML file without external resources."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from vl_cache_vllm.inspector.layout import Box
from vl_cache_vllm.inspector.request import Inspection
from vl_cache_vllm.inspector.trace import levels

FOLDER = Path(__file__).parent
MAX_SIDE = 1600  # pixels of an embedded picture


def write_page(inspection: Inspection, path: Path) -> None:
    """Write the HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True
    )
    eviction = inspection.eviction
    visual, text = eviction.kept_by_kind()
    page = environment.get_template("page.html").render(
        inspection=inspection,
        eviction=eviction,
        visual=visual.tolist(),
        text=text.tolist(),
        pictures=[_uri(image) for image in inspection.images],
        data=payload(inspection),
        css=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        js=Markup((FOLDER / "page.js").read_text(encoding="utf-8")),
    )
    path.write_text(page, encoding="utf-8")


def payload(inspection: Inspection) -> dict[str, Any]:
    """The data that the page's script draws.

    ``kept``, ``attention`` and ``scores`` are base64 of arrays ``[num_layers, num_kv_heads,
    prompt_tokens]``. ``kept`` has one bit for each token, the first token in the most significant
    bit of a byte. The other two have one byte for each token, as returned by `levels`.
    """
    eviction = inspection.eviction
    return {
        "layers": eviction.layers,
        "heads": eviction.num_kv_heads,
        "tokens": eviction.prompt_tokens,
        "keptTokens": eviction.kept_tokens,
        "density": eviction.density,
        "kept": _base64(np.packbits(eviction.kept)),
        "attention": _levels(eviction.attention),
        "scores": _levels(eviction.scores),
        "visual": eviction.visual,
        "texts": _without_visual(inspection),
        "panels": [
            {
                "kind": panel.kind,
                "partlySeen": panel.partly_seen,
                "size": [panel.width, panel.height],
                "picture": None if panel.picture is None else _box(panel.picture),
                "cells": [
                    {"grid": dataclasses.astuple(cells.grid), "box": _box(cells.box)}
                    for cells in panel.cells
                ],
            }
            for panel in inspection.panels()
        ],
    }


def _without_visual(inspection: Inspection) -> list[str]:
    """The text of each text token, in prompt order."""
    visual = inspection.eviction.is_visual()
    return [t for t, seen in zip(inspection.tokens, visual, strict=True) if not seen]


def _levels(values: np.ndarray) -> dict[str, Any]:
    quantised, low, high = levels(values)
    return {"levels": _base64(quantised), "low": low, "high": high}


def _box(box: Box) -> list[float]:
    return [round(value, 3) for value in dataclasses.astuple(box)]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _uri(image: Image.Image) -> str:
    """A data URI with at most `MAX_SIDE` pixels a side: the smaller of PNG and JPEG."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    encoded = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        encoded.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(encoded)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
