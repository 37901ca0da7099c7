# SPDX-License-Identifier: Apache-2.0
"""`make demo`: the embedded page reader behind a real server, whole cache against a tenth of it.

Four pages, one question of each task; every answer is right or wrong, and what became of the cache
is read from the server itself.
"""

import argparse
import json
import random
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from evaluation.accuracy import MODEL
from evaluation.cases import LAYOUT, MAX_ANSWER_TOKENS
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
class Answer:
    text: str
    held: str  # blocks, by the server's own metric; empty for an answer too short to measure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--document", type=int, default=3, help="index of the held-out document")
    parser.add_argument("--pages", type=Path, default=Path("build/demo"), help="folder of pictures")
    options = parser.parse_args(arguments)

    document = generate("demo", options.document, LAYOUT.of_pages(4))
    pictures = [Image.fromarray(render(p, i)) for i, p in enumerate(document.pages)]
    questions = ask(document)
    show(document, pictures, options.pages)

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        evicting = (
            f"--kv-compress={POLICY}",
            f"--kv-compress-budget={BUDGET}",
            "--kv-compress-config=" + json.dumps({"trace": {"path": str(trace)}}),
        )
        log = Path(folder) / "server.log"
        full = answers(log, (), questions, pictures)
        tenth = answers(log, evicting, questions, pictures)
        record = json.loads(trace.read_text().splitlines()[0])

    for question, whole, kept in zip(questions, full, tenth, strict=True):
        print(f"\n{question.task:<12} {question.text}")
        print(f"  right      {question.answer}")
        for name, answer in (("full cache", whole), (f"{BUDGET:.0%} cache", kept)):
            mark = "right" if answer.text == question.answer else "WRONG"
            print(f"  {name:<10} {answer.text}  [{mark}{answer.held}]")
    print(f"\n{POLICY} at {BUDGET:.0%}: {record['prompt_tokens']} prompt tokens,", end=" ")
    print(f"{record['prompt_blocks']} blocks after prefill -> {record['kept_blocks']} kept")
    print("layer        density   tokens kept of each KV head")
    most = max(record["kept_tokens"])
    for layer, (density, count) in enumerate(
        zip(record["density"], record["kept_tokens"], strict=True)
    ):
        bar = "#" * max(1, round(40 * count / most))
        print(
            f"  {layer:2d}         {density:7.3f}   {count:5d} of {record['prompt_tokens']}  {bar}"
        )


def ask(document: Document) -> list[Question]:
    """One question of each task that the document allows."""
    rng = random.Random(0)
    return [q for task in TASKS for q in document.questions(task, rng, 1)]


def show(document: Document, pictures: list[Image.Image], folder: Path) -> None:
    """Print the pages as text, side by side, and save them as pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.resize((560, 560)).save(folder / f"page{i + 1}.png")
    print(f"The pages, as text (pictures: {folder}/page*.png):\n")
    for line in zip(*(lines_of(page) for page in document.pages), strict=True):
        print("  " + " | ".join(line))
    print()


def lines_of(page: Page) -> list[str]:
    """The page's text; of a large glyph only the top left quarter's cell has its letter."""
    text = "".join(c if part < 2 else " " for c, part in zip(page.text, page.part, strict=True))
    return [text[i : i + page.grid] for i in range(0, len(text), page.grid)]


def answers(
    log: Path, arguments: tuple[str, ...], questions: list[Question], pictures: list[Image.Image]
) -> list[Answer]:
    """Start a server, ask it everything, stop it."""
    shown = ["vllm", *command(Path("models/page-reader"), *arguments, *COMMON)[len(program()) :]]
    print("$", shlex.join(part for part in shown if "--kv-compress-config" not in part))
    urls = [image_url(picture) for picture in pictures]
    with running(MODEL, log, *arguments, *COMMON) as server:
        return [answer(server, question, urls) for question in questions]


def answer(server: Server, question: Question, urls: list[str]) -> Answer:
    body = chat_body(MODEL, question.text, *urls, max_tokens=MAX_ANSWER_TOKENS[question.task])
    text, held = "", ""
    for delta in stream(server, body):
        text += delta
        if len(text) >= 10 and not held:  # blocks leave one step after the prefill
            usage = server.metric("vllm:kv_cache_usage_perc")
            held = f", {usage * (server.num_blocks() - 1):.0f} blocks held"
    return Answer(text, held)


if __name__ == "__main__":
    main()
