# SPDX-License-Identifier: Apache-2.0
"""Inspections without an engine, and the page's data read back."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vl_cache_vllm.config import KVCompressConfig
from vl_cache_vllm.inspector.history import history
from vl_cache_vllm.inspector.layout import seen_area
from vl_cache_vllm.inspector.request import Inspection
from vl_cache_vllm.inspector.trace import Eviction

BLOCK = 4


def record(
    num_layers: int = 3,
    num_heads: int = 2,
    visual: tuple[tuple[int, int], ...] = ((2, 18),),
    grids: tuple[tuple[int, ...], ...] = ((2, 4, 4, 4),),
    tokens: int = 26,
    seed: int = 0,
) -> dict[str, Any]:
    """A line of the trace, with as many kept tokens in layer l as l + 1 pages have."""
    rng = np.random.default_rng(seed)
    kept = [BLOCK * (1 + layer % 3) for layer in range(num_layers)]
    shape = (num_layers, num_heads, tokens)
    scores = rng.lognormal(0, 3, shape) * (rng.random(shape) > 0.2)
    return {
        "request_id": "0-abc",
        "rank": 0,
        "layers": [*range(num_layers)],
        "budget": 0.3,
        "eviction": 1,
        "tokens": tokens,
        "evicted_tokens": tokens // BLOCK * BLOCK,
        "cached_tokens": [tokens] * num_layers,
        "vision_end": max((end for _, end in visual), default=0),
        "block_size": BLOCK,
        "blocks": -(-tokens // BLOCK),
        "kept_blocks": 2,
        "density": rng.random(num_layers).tolist(),
        "kept_tokens": kept,
        "visual": [list(v) for v in visual],
        "grids": [list(g) for g in grids],
        "kept_positions": [
            [
                sorted(rng.permutation(tokens // BLOCK * BLOCK)[:count].tolist())
                for _ in range(num_heads)
            ]
            for count in kept
        ],
        "attention": rng.random(shape).tolist(),
        "scores": scores.tolist(),
    }


def record_again(
    before: dict[str, Any], tokens: int, kept_pages: Sequence[int], seed: int
) -> dict[str, Any]:
    """The line of the eviction that follows another one."""
    rng = np.random.default_rng(seed)
    evicted = tokens // BLOCK * BLOCK
    since = evicted - before["evicted_tokens"]
    sizes = [kept + since for kept in before["kept_tokens"]]
    kept = [BLOCK * pages for pages in kept_pages]
    return before | {
        "eviction": before["eviction"] + 1,
        "tokens": tokens,
        "evicted_tokens": evicted,
        "cached_tokens": [size + tokens - evicted for size in sizes],
        "density": rng.random(len(sizes)).tolist(),
        "kept_tokens": kept,
        "visual": [],
        "kept_positions": [
            [
                sorted(rng.permutation(size)[:count].tolist())
                for _ in before["kept_positions"][layer]
            ]
            for layer, (size, count) in enumerate(zip(sizes, kept, strict=True))
        ],
    }


def inspection(later: Sequence[tuple[int, Sequence[int]]] = (), **changes: Any) -> Inspection:
    """Of one image of 80 x 40 pixels, unless the record says otherwise.

    Args:
        later: tokens and kept pages by layer of each eviction after the first.
        changes: of the first one's record.
    """
    line = record(**changes)
    lines = [line]
    for seed, (tokens, kept_pages) in enumerate(later):
        lines.append(record_again(lines[-1], tokens, kept_pages, seed))
    eviction = Eviction.from_records([line])
    images = tuple(Image.new("RGB", (80, 40), "white") for _ in eviction.visual)
    config = KVCompressConfig.from_dict({"policy": "vlcache", "budget": 0.3, "pooling": 3})
    assert config is not None
    return Inspection(
        model="made-up",
        config=config,
        question="What </script><b>is</b> $x_{1$?",
        answer="an answer",
        full_answer="another",
        cut=(True, False),
        names=tuple(f"{i}.png" for i in range(len(images))),
        images=images,
        areas=tuple(seen_area(*image.size, None) for image in images),
        eviction=eviction,
        history=history(lines, line["tokens"]),
        tokens=tuple(f"<{i}>\n" for i in range(eviction.prompt_tokens)),
    )


def page_data(path: Path) -> dict[str, Any]:
    """The page's data, with ``kept`` as bool and the levels as their values."""
    html = path.read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    data = json.loads(text)
    shape = (len(data["layers"]), data["heads"], data["tokens"])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(data["kept"]), np.uint8))
    data["kept"] = bits[: np.prod(shape)].reshape(shape).astype(bool)
    for name in ("attention", "scores"):
        own = data[name]
        levels = np.frombuffer(base64.b64decode(own["levels"]), np.uint8).reshape(shape)
        ratio = own["high"] / own["low"]
        own["values"] = np.where(levels > 0, own["low"] * ratio ** ((levels - 1.0) / 254), 0.0)
    return data


def token_at(panel: dict[str, Any], x: float, y: float) -> int:
    """The token that a page draws at a pixel of the original picture; -1 for none."""
    left, top, width, height = panel["picture"]
    x, y = left + x, top + y
    for cells in panel["cells"]:
        first, rows, columns, stride = cells["grid"]
        left, top, width, height = cells["box"]
        column, row = int((x - left) // (width / columns)), int((y - top) // (height / rows))
        if 0 <= row < rows and 0 <= column < columns:
            return first + row * stride + column
    return -1
