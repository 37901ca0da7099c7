# SPDX-License-Identifier: Apache-2.0
"""Draw docs/images/mechanism.svg: how M blocks are divided among the layers.

    python tools/draw_mechanism.py

The picture has its own background, so that it is readable on light and on dark pages.
"""

from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "images" / "mechanism.svg"
WIDTH, HEIGHT = 920, 350
PAGE = 34  # side of a page, with its gap
TOP = 84
LEFT, RIGHT = 84, 570

NUM_BLOCKS, NUM_IMAGE_BLOCKS = 8, 6
KEPT_BLOCKS = ("A", "B", "C")
KEPT_PAGES = (6, 3, 2, 1)  # of each layer; their sum is M x L
NUM_LAYERS = len(KEPT_PAGES)

# class: colours on a light and on a dark background
COLOURS = {
    "background": ("#ffffff", "#161b22"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "image": ("#b6d7f5", "#1f4b78"),
    "text": ("#d1d9e0", "#484f58"),
    "A": ("#f6c26b", "#8a5a00"),
    "B": ("#9fd8a4", "#1f6b33"),
    "C": ("#d9b8f0", "#6b3fa0"),
}


def rect(x: float, y: float, width: float, height: float, name: str) -> str:
    fill = COLOURS[name][0]
    return (
        f'<rect class="{name}" x="{x}" y="{y}" width="{width}" height="{height}" rx="4" '
        f'fill="{fill}"/>'
    )


def text(x: float, y: float, content: str, name: str = "ink", size: int = 14, **more: str) -> str:
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return (
        f'<text class="{name}" x="{x}" y="{y}" font-size="{size}" fill="{COLOURS[name][0]}"'
        f"{attributes}>{content}</text>"
    )


def line(points: str, name: str = "ink", **more: str) -> str:
    attributes = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return (
        f'<polyline class="{name}-line" points="{points}" fill="none" '
        f'stroke="{COLOURS[name][0]}" stroke-width="2"{attributes}/>'
    )


def row_labels(x: float) -> list[str]:
    return [
        text(x - 10, TOP + layer * PAGE + 21, f"layer {layer}", "muted", text_anchor="end")
        for layer in range(NUM_LAYERS)
    ]


def before() -> list[str]:
    """N blocks, each one page of every layer; the third block has a frame."""
    parts = [
        text(LEFT, 34, f"After prefill: N = {NUM_BLOCKS} blocks", size=17, font_weight="bold"),
        text(LEFT, 58, "one block = one page in every layer", "muted"),
        *row_labels(LEFT),
    ]
    for block in range(NUM_BLOCKS):
        name = "image" if block < NUM_IMAGE_BLOCKS else "text"
        for layer in range(NUM_LAYERS):
            parts.append(rect(LEFT + block * PAGE, TOP + layer * PAGE, PAGE - 4, PAGE - 4, name))
    x, y, height = LEFT + 2 * PAGE - 3, TOP - 3, NUM_LAYERS * PAGE + 2
    corners = ((x, y), (x + PAGE + 2, y), (x + PAGE + 2, y + height), (x, y + height), (x, y))
    parts.append(line(" ".join(f"{a},{b}" for a, b in corners)))
    bottom = TOP + NUM_LAYERS * PAGE + 18
    end_of_image = LEFT + NUM_IMAGE_BLOCKS * PAGE
    parts.append(text(LEFT, bottom, "image tokens", "muted"))
    parts.append(text(end_of_image, bottom, "text", "muted"))
    return parts


def after() -> list[str]:
    """M blocks; their M x L pages in block order, layer after layer."""
    kept = len(KEPT_BLOCKS)
    title = f"After eviction: M = {kept} blocks"
    subtitle = f"M x L = {kept} x {NUM_LAYERS} = {kept * NUM_LAYERS} pages, divided by attention"
    parts = [
        text(RIGHT, 34, title, size=17, font_weight="bold"),
        text(RIGHT, 58, subtitle, "muted"),
        *row_labels(RIGHT),
    ]
    index = 0
    for layer, pages in enumerate(KEPT_PAGES):
        y = TOP + layer * PAGE
        for page in range(pages):
            x = RIGHT + page * PAGE
            block = KEPT_BLOCKS[index // NUM_LAYERS]
            parts.append(rect(x, y, PAGE - 4, PAGE - 4, block))
            label = f"{block}{index % NUM_LAYERS}"
            parts.append(text(x + 15, y + 20, label, size=13, text_anchor="middle"))
            index += 1
    x = RIGHT + max(KEPT_PAGES) * PAGE + 8
    parts.append(text(x, TOP + 21, "dense attention", "muted"))
    parts.append(text(x, TOP + 3 * PAGE + 21, "sparse attention", "muted"))
    parts.append(
        text(RIGHT, TOP + NUM_LAYERS * PAGE + 18, "A0: page 0 of block A, and so on", "muted")
    )
    return parts


def arrows() -> list[str]:
    y = TOP + 2 * PAGE - 2
    start, end = LEFT + NUM_BLOCKS * PAGE + 14, RIGHT - 72
    middle = (start + end) / 2
    low = TOP + NUM_LAYERS * PAGE + 66
    freed = NUM_BLOCKS - len(KEPT_BLOCKS)
    parts = [
        text(middle, y - 12, "evict", size=15, text_anchor="middle", font_weight="bold"),
        text(middle, y + 24, "M = ceil(budget x N)", "muted", size=12, text_anchor="middle"),
        line(f"{start},{y} {end},{y}"),
        line(f"{end - 8},{y - 6} {end},{y} {end - 8},{y + 6}"),
        text(LEFT, low + 5, f"N - M = {freed} blocks return to vLLM's block pool:", size=15),
    ]
    pool = LEFT + 362
    for block in range(freed):
        parts.append(rect(pool + block * PAGE, low - 15, PAGE - 4, PAGE - 4, "image"))
    after_pool = pool + freed * PAGE + 12
    parts.append(text(after_pool, low + 5, "room for more running sequences", size=15))
    note = "The scheduler fixes M. The device divides the M x L pages among the layers."
    parts.append(text(LEFT, low + 44, note, "muted"))
    return parts


def style() -> str:
    """Colours of a dark page; the attributes of the elements are those of a light one."""
    rules = []
    for name, (_, dark) in COLOURS.items():
        rules.append(f".{name} {{ fill: {dark} }} .{name}-line {{ stroke: {dark} }}")
    return f"<style>@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}</style>"


def draw() -> str:
    title = "An evicted request keeps M blocks, whose pages are divided unevenly among the layers"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="sans-serif">'
    )
    background = rect(0, 0, WIDTH, HEIGHT, "background")
    parts = [head, f"<title>{title}</title>", style(), background, *before(), *after(), *arrows()]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(draw())
