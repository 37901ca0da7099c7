# SPDX-License-Identifier: Apache-2.0
"""Questions with long answers, whose requests can be evicted several times while they decode.

``copy200`` asks for a passage of about 200 tokens, ``list16`` for a list of 16 things. The model
makes mistakes in nearly all of these, so the right answer is fed to it, and each of its tokens
counts. A cell of the results is a task in one of the forms of a prompt, as for `pretrained_cases`.
"""

import random
from collections.abc import Iterable
from dataclasses import replace

from evaluation.pretrained.pools import POOLS
from evaluation.pretrained.tasks import (
    GIVEN_WORDS,
    PARAGRAPH,
    SPLITS,
    Document,
    Encode,
    Place,
    PretrainedCase,
    Statement,
    Tokenizer,
    Writer,
    case_of,
    check_known,
    encoder,
    pages_of,
    paragraphs,
)

TASKS = ("copy200", "list16")
FORMS = ("completion", "chat")
LIKE = {"copy200": "copy40", "list16": "list"}  # whose templates they share
PER_DOCUMENT = {"copy200": 2, "list16": 1}
PASSAGE_TOKENS = 200
NUM_ITEMS = 16
# A fifth of a document has more tokens than an answer.
LENGTHS = (2000, 2400, 3000)
NUM_PAGES = (1, 2)


def long_answer_cases(
    tokenizer: Tokenizer, split: str, tasks: Iterable[str], forms: Iterable[str], count: int
) -> list[PretrainedCase]:
    """``count`` cases of each task in each form; arguments and errors of `pretrained_cases`."""
    tasks, forms = list(tasks), list(forms)
    check_known([split], SPLITS)
    check_known(tasks, TASKS)
    check_known(forms, FORMS)
    encode = encoder(tokenizer)
    cases = []
    num_documents = max((-(-count // PER_DOCUMENT[task]) for task in tasks), default=0)
    for index in range(num_documents):
        document = _document(encode, split, index)
        for form in forms:
            for task in tasks:
                asked = [s for s in document.statements if s[0].task == task]
                for statement, places in asked[: max(0, count - index * PER_DOCUMENT[task])]:
                    cases.append(_case(encode, form, document, statement, places))
    return cases


def _document(encode: Encode, split: str, index: int) -> Document:
    rng = random.Random(f"long/{split}/{index}")
    chosen = rng.sample(paragraphs(split), len(paragraphs(split)))
    passages, rest = _passages(encode, chosen)
    writer = Writer(rng, POOLS[split], {"copy40": passages}, NUM_ITEMS)
    statements = [
        replace(statement, task=task)
        for task in TASKS
        for statement in writer.statements(LIKE[task], PER_DOCUMENT[task])
    ]
    rng.shuffle(statements)
    num_pages = NUM_PAGES[index % len(NUM_PAGES)]
    page_tokens = LENGTHS[index % len(LENGTHS)] // num_pages
    pages, placed = pages_of(encode, rng, rest, [], statements, num_pages, page_tokens)
    return Document(f"{split}/{index}", pages, tuple(placed))


def _passages(
    encode: Encode, chosen: list[tuple[str, ...]]
) -> tuple[list[str], list[tuple[str, ...]]]:
    """Passages of whole sentences, without the last full stop, and the paragraphs not used."""
    passages = []
    for _ in range(PER_DOCUMENT["copy200"]):
        passage = ""
        while len(encode(passage)) < PASSAGE_TOKENS:
            sentences, chosen = chosen[0], chosen[1:]
            for sentence in sentences:
                if len(encode(passage)) < PASSAGE_TOKENS:
                    passage = f"{passage} {sentence}".lstrip()
        passages.append(passage.rstrip("."))
    return passages, chosen


def _case(
    encode: Encode,
    form: str,
    document: Document,
    statement: Statement,
    places: tuple[Place, ...],
) -> PretrainedCase:
    given = GIVEN_WORDS.get(LIKE[statement.task], 0)
    case = case_of(encode, form, document, statement, places, given)
    if form == "chat":  # replies repeat the sentence from its beginning
        return replace(case, output=tuple(encode(statement.text)))
    return replace(case, output=tuple(encode(PARAGRAPH + statement.text)[len(case.after) :]))
