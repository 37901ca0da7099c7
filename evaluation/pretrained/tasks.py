# SPDX-License-Identifier: Apache-2.0
"""Questions about documents of natural prose, for a pretrained language model.

A document consists of paragraphs from ``prose/`` with inserted sentences that it is asked about,
which begin paragraphs. It is cut into one to four pages of equally many tokens, because vLLM takes
only image embeddings of equal lengths in one request. If it has several pages, each begins with a
heading, which the task "which" asks about.

A document depends only on its split, its index and the tokenizer.
"""

import dataclasses
import functools
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evaluation.pretrained.pools import POOLS, Pool

TASKS = ("fact", "needle", "copy8", "copy40", "list", "which")
FORMS = ("completion", "chat", "chat-first")
SPLITS = ("tune", "test")

# Lengths of documents in tokens. With one to four pages, all combinations occur in 20 documents.
LENGTHS = (600, 1400, 1600, 2000, 3000)
NUM_PAGES = (1, 2, 3, 4)
# A page has one heading, and some documents have a single page.
PER_DOCUMENT = dict.fromkeys(TASKS, 3) | {"which": 4}
# A tenth of a shorter document has fewer tokens than the answers.
MIN_TOKENS = {"copy40": 1390, "list": 900}
# The document's prefill is not shared where the question comes first, so it has to be short.
MAX_TOKENS_FIRST = 1500
# Tokens that an output may have beyond the answer.
EXTRA_TOKENS = {"completion": 4, "chat": 24, "chat-first": 24}

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
USER = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
PARAGRAPH = "\n\n"

# A first text with questions, whose answers show the wanted form: sentences of the text. They come
# before the pages in completions, too, so that both forms share the prefill of the pages.
EXAMPLE = (
    "The ship left in the morning. The cook of the ship is named Paul Green. It was cold. The note "
    'on the door says: "Come back after the rain has stopped." The crew waited. The pocket of the '
    "coat holds keys, tickets, a map and a pen. The number of the cabin is 90317. Nobody spoke."
)
EXAMPLE_ANSWERS = {
    "What is the cook of the ship named?": "The cook of the ship is named Paul Green.",
    "What does the note on the door say?": (
        'The note on the door says: "Come back after the rain has stopped."'
    ),
    "What does the pocket of the coat hold?": (
        "The pocket of the coat holds keys, tickets, a map and a pen."
    ),
    "What is the number of the cabin?": "The number of the cabin is 90317.",
}
READ = f"Read this text:{PARAGRAPH}"
NEXT_USER = "<|im_end|>\n<|im_start|>user\n"
OPENING = (
    f"{USER}{READ}{EXAMPLE}{PARAGRAPH}"
    + "".join(f"{q}{ASSISTANT}{a}{NEXT_USER}" for q, a in EXAMPLE_ANSWERS.items())
    + READ
)

# Paragraphs that the document quotes and does not contain, so that a quotation stands there once.
NUM_QUOTED = {"copy8": 16, "copy40": 16}
# Lengths of quotations in tokens.
QUOTE_TOKENS = {"copy8": (6, 11), "copy40": (36, 44)}
# Words of a quotation that a completion begins with, because the model confuses quotations.
GIVEN_WORDS = {"copy8": 2, "copy40": 4}
NUM_ITEMS = 3  # of a list
WORDS = ("roles", "places", "things", "containers", "animals", "titles")


@dataclass(frozen=True)
class Template:
    """A statement with words to fill in; ``answer`` is the kind of its answer."""

    start: str
    answer: str
    end: str
    question: str


TEMPLATES = {
    "fact": (
        Template(
            "The {roles} of the {places} is called ",
            "name",
            ".",
            "What is the {roles} of the {places} called?",
        ),
        Template(
            "The owner of the {things} is named ",
            "name",
            ".",
            "What is the owner of the {things} named?",
        ),
        Template(
            "The town where the {things} was made is ",
            "towns",
            ".",
            "What is the town where the {things} was made?",
        ),
        Template(
            "The birthplace of the {animals} is the city of ",
            "towns",
            ".",
            "What is the birthplace of the {animals}?",
        ),
    ),
    "needle": (
        Template(
            "The access code of the {places} is ",
            "code",
            ".",
            "What is the access code of the {places}?",
        ),
        Template(
            "The serial number of the {things} is ",
            "code",
            ".",
            "What is the serial number of the {things}?",
        ),
        Template(
            "The phone number of the {roles} is ",
            "code",
            ".",
            "What is the phone number of the {roles}?",
        ),
        Template(
            "The ticket number of the {animals} is ",
            "code",
            ".",
            "What is the ticket number of the {animals}?",
        ),
        Template(
            'The password of the {places} is "',
            "phrase",
            '."',
            "What is the password of the {places}?",
        ),
    ),
    "copy8": (
        Template(
            'The sign at the {places} reads: "',
            "copy8",
            '."',
            "What does the sign at the {places} read?",
        ),
        Template(
            'The slogan of the {places} is: "',
            "copy8",
            '."',
            "What is the slogan of the {places}?",
        ),
        Template(
            'The motto of the {roles} is: "',
            "copy8",
            '."',
            "What is the motto of the {roles}?",
        ),
    ),
    "copy40": (
        Template(
            'The letter under the {things} begins: "',
            "copy40",
            '."',
            "How does the letter under the {things} begin?",
        ),
        Template(
            'The diary of the {roles} reports: "',
            "copy40",
            '."',
            "What does the diary of the {roles} report?",
        ),
        Template(
            'The poster in the {places} announces: "',
            "copy40",
            '."',
            "What does the poster in the {places} announce?",
        ),
    ),
    "list": (
        Template(
            "The {containers} of the {roles} contains: ",
            "list",
            ".",
            "What does the {containers} of the {roles} contain?",
        ),
        Template(
            "The delivery for the {places} includes: ",
            "list",
            ".",
            "What does the delivery for the {places} include?",
        ),
        Template(
            "The cargo of the {animals} consists of: ",
            "list",
            ".",
            "What does the cargo of the {animals} consist of?",
        ),
    ),
    "which": (
        Template(
            "The colour of the page with {titles} is ",
            "colours",
            ".\n",
            "What is the colour of the page with {titles}?",
        ),
        Template(
            "The mark on the sheet about {titles} is ",
            "colours",
            ".\n",
            "What is the mark on the sheet about {titles}?",
        ),
        Template(
            "The ribbon around the chapter {titles} is ",
            "colours",
            ".\n",
            "What is the ribbon around the chapter {titles}?",
        ),
        Template(
            "The colour of the cover of {titles} is ",
            "colours",
            ".\n",
            "What is the colour of the cover of {titles}?",
        ),
    ),
}


class Tokenizer(Protocol):
    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...


Encode = Callable[[str], list[int]]
Place = tuple[int, int]  # (page, index within the page)


@dataclass(frozen=True)
class PretrainedCase:
    """A question about a document.

    ``pages`` are the token ids of each page, all equally long. ``before`` and ``after`` are the
    token ids around them. ``group`` is the document; confidence intervals resample groups.
    ``answer_tokens`` are the tokens of the answer in the document as (page, index within the page).
    ``between`` are the token ids after each page but the last one; empty: none. ``output`` are the
    token ids of a right output, where it is fed to the model instead of its own; empty: it is not.
    """

    task: str
    form: str
    group: str
    pages: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    answers: tuple[str, ...]
    max_tokens: int
    answer_tokens: tuple[Place, ...]
    between: tuple[tuple[int, ...], ...] = ()
    output: tuple[int, ...] = ()

    @property
    def cell(self) -> str:
        """Name of the case's cell in tables of results."""
        return f"{self.task}/{self.form}"


@dataclass(frozen=True)
class Statement:
    """A sentence of a document: ``start``, ``answer`` and ``end``, with the question for it."""

    task: str
    start: str
    answer: str
    end: str
    question: str

    @property
    def text(self) -> str:
        return self.start + self.answer + self.end

    def answer_range(self, encode: Encode, lead: str) -> range:
        """Indices of the answer's tokens in the sentence, which ``lead`` precedes.

        A blank before a word is a part of its token.
        """
        first = len(encode((lead + self.start).rstrip()))
        return range(first, len(encode(lead + self.start + self.answer)))

    def begun(self, words: int) -> "Statement":
        """The same sentence with the first words of its answer in ``start``."""
        given = self.answer.split(" ")[:words]
        begin = "".join(f"{word} " for word in given)
        rest = self.answer.removeprefix(begin)
        return dataclasses.replace(self, start=self.start + begin, answer=rest)


@dataclass(frozen=True)
class Document:
    """Pages of equally many token ids, and statements with the places of their answers."""

    name: str
    pages: tuple[tuple[int, ...], ...]
    statements: tuple[tuple[Statement, tuple[Place, ...]], ...]


def encoder(tokenizer: Tokenizer) -> Encode:
    """Token ids of a text, which are cached because documents share their sentences."""
    return functools.cache(functools.partial(tokenizer.encode, add_special_tokens=False))


@functools.cache
def paragraphs(split: str) -> tuple[tuple[str, ...], ...]:
    """The paragraphs of a split, each as its sentences."""
    text = (Path(__file__).parent / "prose" / f"{split}.txt").read_text()
    return tuple(
        tuple(re.split(r"(?<=[.?!]) ", " ".join(paragraph.split())))
        for paragraph in text.split(PARAGRAPH)
        if paragraph.strip()
    )


def document_length(index: int) -> int:
    """Length of a document in tokens, rounded down to equal pages."""
    num_pages = NUM_PAGES[index % len(NUM_PAGES)]
    return LENGTHS[index % len(LENGTHS)] // num_pages * num_pages


def generate(encode: Encode, split: str, index: int) -> Document:
    """The document with an index in a split.

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"pretrained/{split}/{index}")
    num_pages = NUM_PAGES[index % len(NUM_PAGES)]
    length = document_length(index)
    chosen = rng.sample(paragraphs(split), len(paragraphs(split)))
    quotations = {}
    for task, count in NUM_QUOTED.items():
        quotations[task] = _quotations(encode, chosen[:count], QUOTE_TOKENS[task], rng)
        chosen = chosen[count:]
    writer = Writer(rng, POOLS[split], quotations)
    headings = writer.headings(num_pages) if num_pages > 1 else []
    statements = [
        statement
        for task in TASKS
        if task != "which" and length >= MIN_TOKENS.get(task, 0)
        for statement in writer.statements(task, PER_DOCUMENT[task])
    ]
    rng.shuffle(statements)
    page_tokens = length // num_pages
    pages, placed = pages_of(encode, rng, chosen, headings, statements, num_pages, page_tokens)
    rng.shuffle(placed)  # so that all pages are asked about
    return Document(f"{split}/{index}", pages, tuple(placed))


def _quotations(
    encode: Encode, quoted: Iterable[Sequence[str]], tokens: tuple[int, int], rng: random.Random
) -> list[str]:
    """At most one quotation from each paragraph: whole sentences, without the last full stop."""
    found = []
    for sentences in quoted:
        runs = [
            " ".join(sentences[i:j])
            for i in range(len(sentences))
            for j in range(i + 1, len(sentences) + 1)
        ]
        fitting = [
            run[:-1]
            for run in runs
            if run.endswith(".") and tokens[0] <= len(encode(run[:-1])) <= tokens[1]
        ]
        if fitting:
            found.append(rng.choice(fitting))
    return found


def prose_of(encode: Encode, chosen: Iterable[Sequence[str]]) -> deque[list[int]]:
    """Token ids of the sentences of paragraphs."""
    sentences = [(PARAGRAPH if i == 0 else " ") + s for p in chosen for i, s in enumerate(p)]
    return deque(encode(s) for s in [sentences[0].lstrip(), *sentences[1:]])


def pages_of(
    encode: Encode,
    rng: random.Random,
    chosen: Iterable[Sequence[str]],
    headings: Sequence[Statement],
    statements: Sequence[Statement],
    num_pages: int,
    page_tokens: int,
) -> tuple[tuple[tuple[int, ...], ...], list[tuple[Statement, tuple[Place, ...]]]]:
    """Pages of equally many tokens, among which the statements are dealt out.

    Args:
        chosen: paragraphs of the prose.
        headings: one for each page, or none at all.
        statements: sentences to insert.

    Returns:
        Token ids of each page, and the statements and headings with the places of their answers.
    """
    prose = prose_of(encode, chosen)
    pages, placed = [], []
    for page in range(num_pages):
        ids, places = page_of(
            encode,
            rng,
            prose,
            headings[page : page + 1],
            statements[page::num_pages],
            page_tokens,
            PARAGRAPH if page else "",
        )
        pages.append(tuple(ids))
        placed += [(s, tuple((page, i) for i in indices)) for s, indices in places]
    return tuple(pages), placed


def page_of(
    encode: Encode,
    rng: random.Random,
    prose: deque[list[int]],
    heading: Sequence[Statement],
    statements: Sequence[Statement],
    length: int,
    lead: str,
) -> tuple[list[int], list[tuple[Statement, range]]]:
    """One page, which takes its sentences from ``prose``; the next page continues the last one.

    Args:
        heading: the page's heading, or nothing.
        statements: sentences to insert.
        length: number of tokens of the page.
        lead: text before the heading.

    Returns:
        Token ids, and the indices of the statements' answers.
    """
    ids: list[int] = []
    places = []
    for statement in heading:
        ids += encode(lead + statement.text)
        places.append((statement, statement.answer_range(encode, lead)))
    inserted = [encode(PARAGRAPH + s.text) for s in statements]
    body = []
    missing = length - len(ids) - sum(map(len, inserted))
    while missing > 0:
        sentence = prose.popleft()
        if len(sentence) > missing:
            prose.appendleft(sentence[missing:])
        body.append(sentence[:missing])
        missing -= len(body[-1])
    positions = rng.sample(range(1, len(body)), len(statements))
    for position, sentence in enumerate(body):
        if position in positions:
            which = positions.index(position)
            answer = statements[which].answer_range(encode, PARAGRAPH)
            places.append(
                (statements[which], range(len(ids) + answer.start, len(ids) + answer.stop))
            )
            ids += inserted[which]
        ids += sentence
    assert len(ids) == length, f"a page of {len(ids)} tokens instead of {length}"
    return ids, places


class Writer:
    """Writes statements. No template, name or word of a pool occurs twice in a document."""

    def __init__(
        self,
        rng: random.Random,
        pool: Pool,
        quotations: Mapping[str, list[str]],
        num_items: int = NUM_ITEMS,
    ) -> None:
        self.rng, self.num_items = rng, num_items
        self.unused = {
            name: rng.sample(words, len(words))
            for name, words in vars(pool).items()
            if isinstance(words, tuple)
        }
        self.first_digits = pool.first_digits
        self.unused |= quotations
        self.templates = {task: rng.sample(ts, len(ts)) for task, ts in TEMPLATES.items()}

    def _take(self, name: str) -> str:
        return self.unused[name].pop()

    def _filled(self, task: str) -> Statement:
        """A statement of the task's next template."""
        template = self.templates[task].pop()
        words = {name: self._take(name) for name in WORDS if f"{{{name}}}" in template.start}
        return Statement(
            task,
            template.start.format(**words),
            self._answer(template.answer),
            template.end,
            template.question.format(**words),
        )

    def headings(self, count: int) -> list[Statement]:
        return [self._filled("which") for _ in range(count)]

    def all_statements(self, task: str) -> list[Statement]:
        """A statement of each template."""
        return [self._filled(task) for _ in TEMPLATES[task]]

    def statements(self, task: str, count: int) -> list[Statement]:
        return [self._filled(task) for _ in range(count)]

    def _answer(self, kind: str) -> str:
        if kind == "name":
            return f"{self._take('first_names')} {self._take('last_names')}"
        if kind == "code":
            return self.rng.choice(self.first_digits) + "".join(self.rng.choices("0123456789", k=4))
        if kind == "phrase":
            return f"{self._take('adjectives')} {self._take('animals')}"
        if kind == "list":
            *goods, last = [self._take("goods") for _ in range(self.num_items)]
            return f"{', '.join(goods)} and {last}"
        return self._take(kind)


def _around(encode: Encode, form: str, statement: Statement) -> tuple[list[int], list[int]]:
    """Token ids before and after the pages."""
    if form == "completion":
        return encode(OPENING), encode(PARAGRAPH + statement.start.rstrip())
    if form == "chat":
        return encode(OPENING), encode(f"{PARAGRAPH}{statement.question}{ASSISTANT}")
    before = f"{USER}Answer the question from the text: {statement.question}{PARAGRAPH}"
    return encode(before), encode(ASSISTANT)


def case_of(
    encode: Encode,
    form: str,
    document: Document,
    statement: Statement,
    places: tuple[Place, ...],
    given: int,
) -> PretrainedCase:
    """The question for a statement of a document.

    Args:
        form: one of `FORMS`.
        places: of the answer's tokens.
        given: words of the answer that a completion begins with.
    """
    if form == "completion" and given:
        whole = len(places)
        statement = statement.begun(given)
        places = places[whole - len(statement.answer_range(encode, PARAGRAPH)) :]
    before, after = _around(encode, form, statement)
    return PretrainedCase(
        statement.task,
        form,
        document.name,
        document.pages,
        tuple(before),
        tuple(after),
        (statement.answer,),
        len(encode(statement.answer)) + EXTRA_TOKENS[form],
        places,
    )


def check_known(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError if there is an unknown name."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")


def pretrained_cases(
    tokenizer: Tokenizer, split: str, tasks: Iterable[str], forms: Iterable[str], count: int
) -> list[PretrainedCase]:
    """``count`` cases of each task in each form. Cases of a document and form are consecutive.

    Args:
        tokenizer: only ``encode`` is called.
        split: "tune" or "test".
        tasks: some of `TASKS`.
        forms: some of `FORMS`.
        count: cases of each task and form.

    Raises:
        ValueError: for an unknown split, task or form.
    """
    tasks, forms = list(tasks), list(forms)
    check_known(tasks, TASKS)
    check_known(forms, FORMS)
    encode = encoder(tokenizer)
    missing = {(task, form): count for task in tasks for form in forms}
    cases = []
    index = 0
    while any(missing.values()):
        document = generate(encode, split, index)
        for form in forms:
            if form == "chat-first" and document_length(index) > MAX_TOKENS_FIRST:
                continue
            for task in tasks:
                asked = [s for s in document.statements if s[0].task == task]
                for statement, places in asked[: min(PER_DOCUMENT[task], missing[task, form])]:
                    missing[task, form] -= 1
                    given = GIVEN_WORDS.get(task, 0)
                    cases.append(case_of(encode, form, document, statement, places, given))
        index += 1
    return cases
