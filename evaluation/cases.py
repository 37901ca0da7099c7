# SPDX-License-Identifier: Apache-2.0
"""Questions about images with their expected answers."""

import functools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from training.pages import TASKS, Document, Layout, generate
from training.render import render

LAYOUT = Layout()
MAX_ANSWER_TOKENS = {"lookup": 12, "hop": 12, "row": 40, "dump": 160, "which": 8}
# A tenth of a short prompt has fewer tokens than a dump of about 100 characters, so dumps need long
# prompts. "Which page" needs several pages.
MIN_PAGES = {"lookup": 1, "hop": 1, "row": 1, "dump": 4, "which": 2}
SPLITS = ("tune", "test")


@dataclass(frozen=True)
class Case:
    """A question about images.

    ``group`` is the document that a case shares with others; confidence intervals resample groups.
    ``answer_cells`` are the visual tokens of the answer as (image, index within the image), empty
    if unknown.
    """

    task: str
    group: str
    question: str
    answers: tuple[str, ...]
    load_images: Callable[[], list[Image.Image]]
    max_tokens: int
    answer_cells: tuple[tuple[int, int], ...] = ()

    @property
    def cell(self) -> str:
        """Name of the case's cell in tables of results."""
        return self.task


def _draw(document: Document, seed: int) -> list[Image.Image]:
    return [Image.fromarray(render(p, seed + i)) for i, p in enumerate(document.pages)]


def _open(paths: Sequence[Path]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def page_reader_cases(split: str, tasks: Iterable[str], count: int) -> list[Case]:
    """``count`` cases of each task from held-out documents of one to four pages.

    All tasks share the documents. Document i has 1 + i % 4 pages. The splits are not used in
    training.

    Raises:
        ValueError: for an unknown task.
    """
    tasks = list(tasks)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; known: {', '.join(TASKS)}")
    missing = dict.fromkeys(tasks, count)
    cases = []
    index = 0
    while any(missing.values()):
        num_pages = 1 + index % 4
        document = generate(split, index, LAYOUT.of_pages(num_pages))
        pages = functools.cache(functools.partial(_draw, document, 1000 * index))
        for task in tasks:
            if num_pages < MIN_PAGES[task]:
                continue
            rng = random.Random(f"{split}/{task}/{index}")
            for question in document.questions(task, rng, min(2, missing[task])):
                missing[task] -= 1
                cases.append(
                    Case(
                        task,
                        f"{split}/{index}",
                        question.text,
                        (question.answer,),
                        pages,
                        MAX_ANSWER_TOKENS[task],
                        question.cells,
                    )
                )
        index += 1
    return cases


def jsonl_cases(path: Path, max_tokens: int) -> list[Case]:
    """Cases from lines of ``{"images": [...], "question": ..., "answers": [...], "task": ...}``.

    Image paths are relative to the file; ``task`` and ``group`` are optional.

    Raises:
        ValueError: with the number of the first invalid line.
    """
    cases = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            files = [path.parent / name for name in _strings(record, "images")]
            absent = [str(f) for f in files if not f.is_file()]
            if absent:
                raise ValueError(f"no such image: {', '.join(absent)}")
            question = record["question"]
            if not isinstance(question, str):
                raise ValueError("question must be a string")
            answers = tuple(_strings(record, "answers"))
            if not answers:
                raise ValueError("answers must not be empty")
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: no {error}") from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        group = str(record.get("group", ",".join(map(str, files)) or number))
        cases.append(
            Case(
                str(record.get("task", path.stem)),
                group,
                question,
                answers,
                functools.partial(_open, files),
                int(record.get("max_tokens", max_tokens)),
            )
        )
    if not cases:
        raise ValueError(f"{path} contains no cases")
    return cases


def _strings(record: dict, key: str) -> list[str]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError(f"{key} must be a list of strings")
    return value


def answer_positions(
    cells: Sequence[tuple[int, int]],
    prompt_token_ids: Sequence[int],
    image_token: int,
    num_images: int,
) -> list[int]:
    """Prompt positions of an answer's visual tokens.

    Args:
        cells: (image, index within the image) of each token.
        prompt_token_ids: the prompt.
        image_token: id of the placeholder token.
        num_images: images in the prompt, all with the same number of tokens.
    """
    visual = [i for i, token in enumerate(prompt_token_ids) if token == image_token]
    per_image, rest = divmod(len(visual), num_images)
    assert rest == 0, "images have different numbers of tokens"
    return [visual[image * per_image + index] for image, index in cells]
