# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the embedded page reader behind a server, with the full cache and a tenth of it.

The document has four pages, and one question of each task is asked. Every output is checked, and
the number of blocks is read from the server's metrics.
"""

import json
import random
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evaluation.accuracy import MODEL
from evaluation.cases import LAYOUT, MAX_ANSWER_TOKENS
from testing.cli import make_parser
from testing.server import Server, chat_body, command, image_url, program, running, stream
from training.pages import TASKS, Document, Page, Question, generate
from training.render import render

BLOCK_SIZE = 32
BUDGET = 0.1
POLICY = "vlcache-plus"
COMMON = (
    "--enforce-eager",
    "--max-model-len=2048",
    f"--block-size={BLOCK_SIZE}",
    "--kv-cache-memory-bytes=64M",
)


@dataclass(frozen=True)
class Completion:
    """An output, and the number of blocks that the request held."""

    text: str
    held: str  # as text; empty if the output was too short to read the metric


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("--document", type=int, default=3, help="index of the held-out document")
    parser.add_argument(
        "--pages", type=Path, default=Path("build/demo"), help="folder for the page images"
    )
    options = parser.parse_args(arguments)

    document = generate("demo", options.document, LAYOUT.of_pages(4))
    pictures = [Image.fromarray(render(p, i)) for i, p in enumerate(document.pages)]
    questions = ask(document)
    show(document, pictures, options.pages)

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        eviction = (
            f"--kv-compress={POLICY}",
            f"--kv-compress-budget={BUDGET}",
            # Most answers are shorter than what the policy lets a request generate first.
            "--kv-compress-config=" + json.dumps({"evict_after": 0, "trace": {"path": str(trace)}}),
        )
        log = Path(folder) / "server.log"
        full = completions(log, (), questions, pictures)
        tenth = completions(log, eviction, questions, pictures)
        record = json.loads(trace.read_text().splitlines()[0])

    for question, with_full, with_tenth in zip(questions, full, tenth, strict=True):
        print(f"\n{question.task:<12} {question.text}")
        print(f"  expected   {question.answer}")
        for name, output in (("full cache", with_full), (f"{BUDGET:.0%} cache", with_tenth)):
            mark = "correct" if output.text == question.answer else "WRONG"
            print(f"  {name:<10} {output.text}  [{mark}{output.held}]")
    print(f"\n{POLICY} at {BUDGET:.0%}: {record['tokens']} prompt tokens,", end=" ")
    print(f"{record['blocks']} blocks after prefill -> {record['kept_blocks']} kept")
    print("layer        density   kept tokens per KV head")
    most = max(record["kept_tokens"])
    for layer, (density, count) in enumerate(
        zip(record["density"], record["kept_tokens"], strict=True)
    ):
        bar = "#" * max(1, round(40 * count / most))
        print(f"  {layer:2d}         {density:7.3f}   {count:5d} of {record['tokens']}  {bar}")


def ask(document: Document) -> list[Question]:
    """One question of each task that is possible for the document."""
    rng = random.Random(0)
    return [q for task in TASKS for q in document.questions(task, rng, 1)]


def show(document: Document, pictures: list[Image.Image], folder: Path) -> None:
    """Print the pages side by side as text, and save them as images."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.resize((560, 560)).save(folder / f"page{i + 1}.png")
    print(f"The pages as text (images: {folder}/page*.png):\n")
    for line in zip(*(lines_of(page) for page in document.pages), strict=True):
        print("  " + " | ".join(line))
    print()


def lines_of(page: Page) -> list[str]:
    """The lines of a page. A large glyph appears in its top left cell only."""
    text = "".join(c if part < 2 else " " for c, part in zip(page.text, page.part, strict=True))
    return [text[i : i + page.grid] for i in range(0, len(text), page.grid)]


def completions(
    log: Path, arguments: tuple[str, ...], questions: list[Question], pictures: list[Image.Image]
) -> list[Completion]:
    """Start a server, send all questions, and stop it."""
    shown = ["vllm", *command(Path("models/page-reader"), *arguments, *COMMON)[len(program()) :]]
    print("$", shlex.join(part for part in shown if "trace" not in part))
    urls = [image_url(picture) for picture in pictures]
    with running(MODEL, log, *arguments, *COMMON) as server:
        return [complete(server, question, urls) for question in questions]


def complete(server: Server, question: Question, urls: list[str]) -> Completion:
    """Send one question."""
    body = chat_body(MODEL, question.text, *urls, max_tokens=MAX_ANSWER_TOKENS[question.task])
    text, held = "", ""
    for delta in stream(server, body):
        text += delta
        if len(text) >= 10 and not held:  # blocks are freed one step after the prefill
            usage = server.metric("vllm:kv_cache_usage_perc")
            held = f", {usage * (server.num_blocks() - 1):.0f} blocks held"
    return Completion(text, held)


if __name__ == "__main__":
    main()
