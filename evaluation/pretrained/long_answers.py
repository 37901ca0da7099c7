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
    EXTRA_TOKENS,
    GIVEN_WORDS,
    PARAGRAPH,
    SPLITS,
    Encode,
    Place,
    PretrainedCase,
    Statement,
    Tokenizer,
    Writer,
    encoder,
    page_of,
    paragraphs,
    prompt_around,
    prose_of,
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
    for names, known in (([split], SPLITS), (tasks, TASKS), (forms, FORMS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    encode = encoder(tokenizer)
    cases = []
    for index in range(count):
        pages, placed = _document(encode, split, index)
        for form in forms:
            for task in tasks:
                asked = [s for s in placed if s[0].task == task]
                for statement, places in asked[: max(0, count - index * PER_DOCUMENT[task])]:
                    cases.append(_case(encode, form, statement, places, pages, f"{split}/{index}"))
    return cases


def _document(
    encode: Encode, split: str, index: int
) -> tuple[tuple[tuple[int, ...], ...], list[tuple[Statement, tuple[Place, ...]]]]:
    """Pages of a document, and its statements with the places of their answers."""
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
    length = LENGTHS[index % len(LENGTHS)] // num_pages
    prose = prose_of(encode, rest)
    pages, placed = [], []
    for page in range(num_pages):
        lead = PARAGRAPH if page else ""
        of_page = statements[page::num_pages]
        ids, places = page_of(encode, rng, prose, [], of_page, length, lead)
        pages.append(tuple(ids))
        placed += [(s, tuple((page, i) for i in indices)) for s, indices in places]
    return tuple(pages), placed


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
    statement: Statement,
    places: tuple[Place, ...],
    pages: tuple[tuple[int, ...], ...],
    group: str,
) -> PretrainedCase:
    given = GIVEN_WORDS.get(LIKE[statement.task])
    if form == "completion" and given is not None:
        whole = len(places)
        statement = statement.begun(given)
        places = places[whole - len(statement.answer_range(encode, PARAGRAPH)) :]
    before, after = prompt_around(encode, form, statement)
    sentence = encode(PARAGRAPH + statement.text)
    begun = len(encode(PARAGRAPH + statement.start.rstrip()))
    if form == "chat":  # replies repeat the sentence from its beginning
        sentence, begun = encode(statement.text), 0
    return PretrainedCase(
        statement.task,
        form,
        group,
        pages,
        tuple(before),
        tuple(after),
        (statement.answer,),
        len(encode(statement.answer)) + EXTRA_TOKENS[form],
        places,
        output=tuple(sentence[begun:]),
    )
