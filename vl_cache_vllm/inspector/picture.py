# SPDX-License-Identifier: Apache-2.0
"""The static picture of an inspection (PNG)."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vl_cache_vllm.inspector.layout import Panel
from vl_cache_vllm.inspector.request import Inspection
from vl_cache_vllm.inspector.trace import histogram

WIDTH = 14.0  # inches
MAX_LAYERS = 12  # drawn separately
MAX_IMAGES = 4
MAX_TEXT = 400  # characters of a question or an output
VISUAL, TEXT, EVICTED, INK = "#d97706", "#0f766e", "#9ca3af", "#1f2937"
VEIL = "#ffffff"
MARKER = "#f59e0b"
_TOKENS = LinearSegmentedColormap.from_list("tokens", ["#e5e7eb", MARKER])
_PATCHES = LinearSegmentedColormap.from_list("patches", [VEIL, "#fbda9f"])  # marker over white


def write_picture(inspection: Inspection, path: Path) -> None:
    """Write the PNG file."""
    eviction = inspection.eviction
    shown = _shown_images(inspection)
    panels = inspection.panels()
    layers = shown_layers(eviction.num_layers)
    aspects = [panels[i].width / panels[i].height for i in shown]
    groups = min(6, len(layers), max(1, round(8 / sum(aspects)))) if shown else 1
    lines = -(-len(layers) // groups)
    small = WIDTH / (groups * sum(aspects)) * 0.92 + 0.3 if shown else 0.0
    heights = [4.0, lines * small, 3.3] if shown else [2.6, 3.3]

    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{inspection.model}, {inspection.config.policy.name}: what the cache kept",
        fontsize=15,
        color=INK,
        parse_math=False,
    )
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    if shown:
        texts, maps = parts[0].subfigures(1, 2, width_ratios=[1, 1.7])
        _overview(maps, inspection, panels, shown)
        _small_maps(parts[1], inspection, panels, shown, layers, groups, aspects)
    else:
        texts = parts[0]
    _texts(texts, inspection, 46 if shown else 120)
    _charts(parts[-1], inspection)
    figure.savefig(path, dpi=100)


def shown_layers(num_layers: int) -> list[int]:
    """At most `MAX_LAYERS` layers, evenly spaced, including the first and the last one."""
    count = min(num_layers, MAX_LAYERS)
    return [round(i * (num_layers - 1) / max(1, count - 1)) for i in range(count)]


def _shown_images(inspection: Inspection) -> list[int]:
    """The images with the most kept tokens, at most `MAX_IMAGES`, in prompt order."""
    share = inspection.eviction.kept_share()
    counts = [share[first:end].sum() for first, end in inspection.eviction.visual]
    return sorted(sorted(range(len(counts)), key=lambda i: -counts[i])[:MAX_IMAGES])


def _draw(axis: Axes, panel: Panel, image: Any, values: np.ndarray, most: float) -> None:
    """Draw a panel with evicted patches dimmed; ``values`` of all prompt tokens, 0 to ``most``."""
    axis.set(xlim=(0, panel.width), ylim=(panel.height, 0), xticks=[], yticks=[])
    axis.set_aspect("equal")
    axis.set_frame_on(False)
    if panel.picture is not None and image is not None:
        p = panel.picture
        if panel.kind == "overlay":  # areas outside the model's view stay grey
            axis.add_patch(Rectangle((0, 0), panel.width, panel.height, color="#d1d5db", zorder=-1))
        axis.imshow(image, extent=(p.left, p.right, p.bottom, p.top), interpolation="antialiased")
    if panel.kind == "overlay":
        seen = panel.cells[0].box
        for left, top, right, bottom in (
            (0, 0, panel.width, seen.top),
            (0, seen.bottom, panel.width, panel.height),
            (0, seen.top, seen.left, seen.bottom),
            (seen.right, seen.top, panel.width, seen.bottom),
        ):
            if right - left > 1e-6 and bottom - top > 1e-6:
                unseen = Rectangle((left, top), right - left, bottom - top)
                unseen.set(facecolor="#6b7280", alpha=0.75)
                axis.add_patch(unseen)
    for cells in panel.cells:
        own = values[cells.grid.positions("cpu").numpy()] / most  # type: ignore[arg-type]
        box = cells.box
        overlay = _tinted(own) if panel.kind == "overlay" else _TOKENS(own)
        axis.imshow(
            overlay, extent=(box.left, box.right, box.bottom, box.top), interpolation="nearest"
        )
    if panel.kind == "overlay":
        axis.add_patch(Rectangle((0, 0), panel.width, panel.height, fill=False, ec="#d1d5db", lw=1))
    axis.set(xlim=(0, panel.width), ylim=(panel.height, 0))


def _tinted(own: np.ndarray) -> np.ndarray:
    """RGBA of a marker colour over kept patches and a white veil over evicted ones."""
    veil, marker = 0.75 * (1 - own), 0.38 * own
    alpha = marker + veil * (1 - marker)
    colour = marker[..., None] * np.array(to_rgb(MARKER))
    colour = colour + (veil * (1 - marker))[..., None] * np.array(to_rgb(VEIL))
    return np.concatenate((colour / np.maximum(alpha, 1e-9)[..., None], alpha[..., None]), axis=-1)


def _overview(figure: Any, inspection: Inspection, panels: list[Panel], shown: list[int]) -> None:
    share = inspection.eviction.kept_share()
    most = max(1e-9, *(share[slice(*inspection.eviction.visual[i])].max() for i in shown))
    aspect = max(panels[i].width / panels[i].height for i in shown)

    def size(columns: int) -> float:
        return min(8 / columns / aspect, 3.6 / -(-len(shown) // columns))

    columns = max(range(1, len(shown) + 1), key=size)
    axes = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).ravel()
    for axis, i in zip(axes, shown, strict=False):
        _draw(axis, panels[i], _image(inspection, i), share, most)
        axis.set_title(_caption(inspection, panels[i], i), fontsize=8.5, color=INK)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    overlay = all(panels[i].kind == "overlay" for i in shown)
    colours = ScalarMappable(Normalize(0, most), _PATCHES if overlay else _TOKENS)
    bar = figure.colorbar(colours, ax=list(axes), shrink=0.8, format=PercentFormatter(1))
    bar.set_label("fraction of layers x KV heads that keep it", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _small_maps(
    figure: Any,
    inspection: Inspection,
    panels: list[Panel],
    shown: list[int],
    layers: list[int],
    groups: int,
    aspects: list[float],
) -> None:
    eviction = inspection.eviction
    lines = -(-len(layers) // groups)
    axes = figure.subplots(
        lines, groups * len(shown), squeeze=False, width_ratios=aspects * groups
    ).reshape(-1, len(shown))
    for row, axis_row in enumerate(axes):
        if row >= len(layers):
            for axis in axis_row:
                axis.set_axis_off()
            continue
        layer = layers[row]
        share = eviction.kept_share(layer)
        for axis, i in zip(axis_row, shown, strict=True):
            _draw(axis, panels[i], _image(inspection, i), share, 1.0)
        axis_row[0].set_title(
            f"layer {eviction.layers[layer]}: "
            f"{eviction.kept_tokens[layer]} of {eviction.prompt_tokens}",
            fontsize=9,
            color=INK,
            loc="left",
        )


def _image(inspection: Inspection, index: int) -> Any:
    known = len(inspection.images) == len(inspection.eviction.visual)
    return inspection.images[index] if known else None


def _caption(inspection: Inspection, panel: Panel, index: int) -> str:
    first, end = inspection.eviction.visual[index]
    kept = inspection.eviction.kept_share()[first:end].sum()
    name = f"image {index + 1}: {kept:.0f} of {end - first} kept"
    notes = {
        "overlay": "\ngrey: cropped or padding" if panel.partly_seen else "",
        "tiles": "\npositions of the tiles in the image unknown",
        "strip": "\nlayout unknown: tokens in prompt order",
    }
    return name + notes[panel.kind]


def _texts(figure: Any, inspection: Inspection, width: int) -> None:
    eviction, config = inspection.eviction, inspection.config
    settings = ", ".join(f"{name} {value}" for name, value in inspection.settings())
    same = inspection.answer == inspection.full_answer
    tokens = sum(eviction.kept_tokens) / eviction.num_layers
    entries = [
        ("question", inspection.question),
        (f"output with {eviction.retained:.0%} of the cache", inspection.answer),
        ("output with the full cache", "the same" if same else inspection.full_answer),
        (
            "budget",
            f"{config.budget:.0%} requested, {eviction.kept_blocks} of {eviction.prompt_blocks} "
            f"blocks of {eviction.block_size} kept: {eviction.retained:.1%}",
        ),
        (
            "tokens",
            f"{eviction.prompt_tokens} in the prompt, {tokens:.0f} kept by a KV head on average; "
            f"{eviction.num_layers} layers, {eviction.num_kv_heads} KV heads",
        ),
        ("policy", config.policy.name + (f": {settings}" if settings else ", default settings")),
    ]
    axis = figure.add_subplot()
    axis.set_axis_off()
    y = 1.0
    step = 0.165 / figure.bbox.height * figure.dpi
    for name, value in entries:
        value = value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "…"
        lines = [part for line in value.splitlines() for part in textwrap.wrap(line, width)] or [
            "(nothing)"
        ]
        own: dict[str, Any] = dict(va="top", parse_math=False, transform=axis.transAxes)
        axis.text(0, y, name, fontsize=8.5, color="#6b7280", **own)
        y -= step * 1.05
        for line in lines[:6]:
            axis.text(0, y, line, fontsize=10.5, color=INK, **own)
            y -= step * 1.25
        y -= step * 0.6


def _charts(figure: Any, inspection: Inspection) -> None:
    eviction = inspection.eviction
    bars, attention, scores = figure.subplots(1, 3)
    seen, text = eviction.kept_by_kind()
    x = np.arange(eviction.num_layers)
    bars.bar(x, seen, color=VISUAL, label="visual")
    bars.bar(x, text, bottom=seen, color=TEXT, label="text")
    mean = float(np.mean(eviction.kept_tokens))
    bars.axhline(mean, color=INK, lw=1, ls="--", label=f"mean, {mean:.0f}")
    bars.set(title="Tokens kept per KV head", xlabel="layer", ylabel="tokens")
    shown = shown_layers(eviction.num_layers)
    bars.set_xticks(shown, [str(eviction.layers[layer]) for layer in shown])
    bars.set_ylim(0, 1.28 * max(eviction.kept_tokens))
    bars.legend(fontsize=8, ncols=3, frameon=False, loc="upper center")
    for axis, values, title in (
        (attention, eviction.attention, "Attention received"),
        (scores, eviction.scores, "Score used for ranking"),
    ):
        counted = histogram(values, eviction.kept)
        for shares, zero, colour, name in (
            (counted.evicted, counted.zero[1], EVICTED, "evicted"),
            (counted.kept, counted.zero[0], VISUAL, "kept"),
        ):
            label = f"{name} ({zero:.0%} at zero)" if zero else name
            axis.stairs(shares, counted.edges, fill=True, color=colour, alpha=0.45)
            axis.stairs(shares, counted.edges, color=colour, lw=1.5, label=label)
        axis.set(title=title, xscale="log", ylabel="fraction of the group")
        axis.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axis.set_ylim(0, axis.get_ylim()[1] * 1.15)
        axis.legend(fontsize=8, ncols=2, frameon=False, loc="upper left")
        axis.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    for axis in (bars, attention, scores):
        axis.title.set_fontsize(11)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
        axis.set_axisbelow(True)
