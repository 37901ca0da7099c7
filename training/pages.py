# SPDX-License-Identifier: Apache-2.0
"""Documents of the page reader: grids of glyphs, with questions and answers.

A document has one to four pages of ``grid`` x ``grid`` cells. A page contains a heading with its
two-digit number, key-value records (``K7:4XQ``) in running text or in a ruled table, rows that are
longer than a line (``B3=`` and about 30 characters), and distractors: grey lower-case words and
large titles. The value of a record may be the key of another record. Such records allow two-step
questions.

Keys and the tens digits of page numbers are unique in a document. No pair of adjacent characters
occurs twice in its values, so that the last characters always determine the next one.

A document depends only on its split, its index and its `Layout`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O, which read as 1 and 0
DIGITS = "0123456789"
VALUE_CHARACTERS = LETTERS + DIGITS
LOWER_CASE = "abcdefghijklmnopqrstuvwxyz"
PUNCTUATION = ":=.,"
BLANK = " "
TITLES = ("REPORT", "LEDGER", "STOCK", "ORDERS", "INDEX", "SURVEY", "NOTES", "PRICES")
RECORD_MARK, ROW_MARK = ":", "="

INKS = ("black", "blue", "red", "green", "grey")
TEXT_INK, GREY = 0, INKS.index("grey")
HEADING_INKS = (1, 2, 3)

TASKS = ("lookup", "hop", "row", "dump", "which")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "lookup": (
        "What is the value of {}?",
        "Look up the value of {}.",
        "What does {} stand for?",
    ),
    "hop": (
        "What is the value of the key that {} names?",
        "Follow {} to the value of the key it names.",
        "{} names a key. What is the value of that key?",
    ),
    "row": (
        "Copy the row of {}.",
        "What is written in row {}?",
        "Read out row {}.",
    ),
    "dump": (
        "List all records of page {}.",
        "Copy every record of page {}.",
        "Which records are on page {}?",
    ),
    "which": (
        "Which page has {}?",
        "On which page is {}?",
        "Find the page of {}.",
    ),
}


@dataclass(frozen=True)
class Layout:
    """Sizes of pages and of their contents. Lengths are in characters, ranges are inclusive."""

    grid: int = 20
    num_pages: tuple[int, int] = (1, 4)
    num_records: tuple[int, int] = (4, 13)
    num_rows: tuple[int, int] = (0, 2)
    value_length: tuple[int, int] = (2, 6)
    row_length: tuple[int, int] = (28, 32)
    link_share: float = 0.3
    distractors: bool = True

    def of_pages(self, count: int) -> "Layout":
        """This layout with exactly ``count`` pages."""
        return replace(self, num_pages=(count, count))


@dataclass(frozen=True)
class Record:
    """A key with its value. ``start`` is the cell of the key's first character on ``page``."""

    key: str
    value: str
    mark: str
    page: int
    start: int

    @property
    def text(self) -> str:
        return self.key + self.mark + self.value

    @property
    def value_cells(self) -> list[int]:
        first = self.start + len(self.key) + 1
        return list(range(first, first + len(self.value)))


@dataclass
class Page:
    """The contents of each cell in reading order: character, ink and part of a large glyph.

    ``part`` is 0 for an ordinary glyph. It is 1 to 4 for the quarters of a glyph of twice the size:
    top left, top right, bottom left, bottom right.
    """

    grid: int
    number: str
    text: list[str]
    ink: list[int]
    part: list[int]
    records: list[Record] = field(default_factory=list)
    number_cells: tuple[int, ...] = ()
    rules: tuple[int, ...] = ()  # lines of text with a ruled line below

    def write(self, start: int, text: str, ink: int, part: int = 0) -> None:
        for i, character in enumerate(text, start):
            self.text[i], self.ink[i], self.part[i] = character, ink, part

    @property
    def plain(self) -> list[Record]:
        """The records in reading order, without long rows."""
        return [r for r in self.records if r.mark == RECORD_MARK]


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    ``cells`` are the (page, cell) pairs of the answer, in its order. ``via`` are the first two
    characters of the named key's value, which are needed to find the answer; for a hop they are the
    intermediate key. It is empty if the question names a page.
    """

    task: str
    text: str
    answer: str
    cells: tuple[tuple[int, int], ...]
    subject: str
    via: str = ""


@dataclass(frozen=True)
class Document:
    pages: tuple[Page, ...]

    def _records(self, mark: str) -> list[Record]:
        return [r for page in self.pages for r in page.records if r.mark == mark]

    def questions(self, task: str, rng: random.Random, count: int) -> list[Question]:
        """Up to ``count`` different questions of a task; fewer if the document allows no more.

        Raises:
            ValueError: for an unknown task.
        """
        subjects: Sequence[Record | int]
        records = self._records(RECORD_MARK)
        if task == "lookup":
            subjects = records
        elif task == "hop":
            keys = {r.key for r in records}
            subjects = [r for r in records if r.value in keys]
        elif task == "row":
            subjects = self._records(ROW_MARK)
        elif task == "dump":
            subjects = [i for i, page in enumerate(self.pages) if page.plain]
        elif task == "which":
            subjects = records + self._records(ROW_MARK)
        else:
            raise ValueError(f"unknown task {task!r}, expected one of {', '.join(TASKS)}")
        chosen = rng.sample(subjects, min(count, len(subjects)))
        return [self._ask(task, subject, rng.choice(TEMPLATES[task])) for subject in chosen]

    def _ask(self, task: str, subject: Record | int, template: str) -> Question:
        via = ""
        if isinstance(subject, int):
            page = self.pages[subject]
            name, answer = page.number, " ".join(r.text for r in page.plain)
            last = page.plain[-1]
            end = last.start + len(last.text)
            cells = [(subject, i) for i in range(page.plain[0].start, end)]
        else:
            name = subject.key
            source = subject
            via = subject.value[:2]
            if task == "hop":
                source = next(r for p in self.pages for r in p.records if r.key == subject.value)
            if task == "which":
                answer = self.pages[source.page].number
                cells = [(source.page, i) for i in self.pages[source.page].number_cells]
            else:
                answer = source.value
                cells = [(source.page, i) for i in source.value_cells]
        return Question(task, template.format(name), answer, tuple(cells), name, via)


def generate(split: str, index: int, layout: Layout) -> Document:
    """The document with an index in a split.

    Raises:
        ValueError: if the records and rows of the layout do not fit a page.
    """
    rng = random.Random(f"{split}/{index}")
    return _Writer(rng, layout).document()


class _Writer:
    """Writes a document, and keeps track of what must be unique in it."""

    def __init__(self, rng: random.Random, layout: Layout) -> None:
        self.rng, self.layout = rng, layout
        self.keys = [a + b for a in LETTERS for b in DIGITS]
        rng.shuffle(self.keys)
        self.pairs: set[str] = set()

    def document(self) -> Document:
        rng, layout = self.rng, self.layout
        count = rng.randint(*layout.num_pages)
        numbers = [tens + rng.choice(DIGITS) for tens in rng.sample(DIGITS, count)]
        # Keys come first: a link can name a record on any page, and no value contains a key.
        tables = [self._is_table() for _ in range(count)]
        records = [self._keys(layout.num_records) for _ in range(count)]
        rows = [self._keys(layout.num_rows) for _ in range(count)]
        self.pairs.update(k for keys in (*records, *rows) for k in keys)
        links = self._links(records, tables)
        return Document(
            tuple(
                self._page(i, numbers[i], tables[i], records[i], links, rows[i])
                for i in range(count)
            )
        )

    def _keys(self, count: tuple[int, int]) -> list[str]:
        return [self.keys.pop() for _ in range(self.rng.randint(*count))]

    @property
    def _column(self) -> int:
        """Length of a value that fills half a line together with its key, mark and a blank."""
        return self.layout.grid // 2 - 4

    def _is_table(self) -> bool:
        """Whether the records of a page form a ruled table of two columns of equal width."""
        shortest, longest = self.layout.value_length
        return shortest <= self._column <= longest and self.rng.random() < 0.35

    def _links(self, records: list[list[str]], tables: list[bool]) -> dict[str, str]:
        """Records whose value is the key of another record, with that key. Links are not chained.

        Tables have no links, because their values have the length of the column.
        """
        keys = [key for page in records for key in page]
        sources = [
            key for page, table in zip(records, tables, strict=True) if not table for key in page
        ]
        num_links = min(round(self.layout.link_share * len(keys)), len(sources), len(keys) // 2)
        chosen = set(self.rng.sample(sources, num_links))
        targets = [key for key in keys if key not in chosen]
        # Each key is the value of at most one record, so that its continuation is unambiguous.
        self.rng.shuffle(targets)
        return {key: targets.pop() for key in sources if key in chosen}

    def _value(self, length: int) -> str:
        """Random characters without a pair of adjacent characters that was used before."""
        rng = self.rng
        value = rng.choice(VALUE_CHARACTERS)
        tries = 0
        while len(value) < length:
            character = rng.choice(VALUE_CHARACTERS)
            tries += 1
            if value[-1] + character not in self.pairs or tries > 1000:
                self.pairs.add(value[-1] + character)
                value += character
        return value

    def _page(
        self,
        index: int,
        number: str,
        table: bool,
        keys: list[str],
        links: dict[str, str],
        rows: list[str],
    ) -> Page:
        rng, layout = self.rng, self.layout
        n = layout.grid
        page = Page(n, number, [BLANK] * n * n, [TEXT_INK] * n * n, [0] * n * n)
        items = []
        for key in keys:
            length = self._column if table else rng.randint(*layout.value_length)
            items.append((key, links.get(key) or self._value(length)))
        long_rows = [(key, self._value(rng.randint(*layout.row_length))) for key in rows]

        def lines(text_length: int) -> int:
            return -(-text_length // n)

        records_length = sum(len(k) + len(v) + 2 for k, v in items) - 1
        needed = lines(records_length) + sum(lines(len(v) + 3) for _, v in long_rows)
        spare = n - 1 - needed
        if spare < 0:
            raise ValueError(f"{len(keys)} records and {len(rows)} rows do not fit a {n}x{n} page")
        big = layout.distractors and n >= 16 and spare >= 4 and rng.random() < 0.5
        spare -= 2 * big
        blocks: list[tuple[str, int]] = [("records", 0)]
        blocks += [("row", i) for i in range(len(long_rows))]
        while layout.distractors and spare > 0 and rng.random() < 0.75:
            size = rng.randint(1, min(3, spare))
            blocks.append(("words", size))
            spare -= size
        while spare > 0 and rng.random() < 0.7:
            blocks.append(("blank", 1))
            spare -= 1
        rng.shuffle(blocks)

        line = 0
        if big:
            line = self._title(page, line)
        line = self._heading(page, line)
        ruled: list[int] = []
        for kind, which in blocks:
            start = line * n
            if kind == "records":
                for key, value in items:
                    page.records.append(Record(key, value, RECORD_MARK, index, start))
                    page.write(start, page.records[-1].text, TEXT_INK)
                    start += len(key) + len(value) + 2
                used = lines(records_length)
                if table:
                    ruled += range(line, line + used)
                line += used
            elif kind == "row":
                key, value = long_rows[which]
                page.records.append(Record(key, value, ROW_MARK, index, start))
                page.write(start, page.records[-1].text, TEXT_INK)
                line += lines(len(value) + 3)
            elif kind == "words":
                page.write(start, self._words(which * n), GREY)
                line += which
            else:
                line += which
        page.rules = tuple(ruled)
        return page

    def _heading(self, page: Page, line: int) -> int:
        rng, n = self.rng, page.grid
        text = "Page " + page.number
        start = line * n + rng.randint(0, n - len(text))
        page.write(start, text, rng.choice(HEADING_INKS))
        page.number_cells = (start + 5, start + 6)
        return line + 1

    def _title(self, page: Page, line: int) -> int:
        rng, n = self.rng, page.grid
        title, ink = rng.choice(TITLES), rng.choice(HEADING_INKS)
        left = rng.randint(0, n - 2 * len(title))
        for i, letter in enumerate(title):
            for quarter in range(4):
                row, column = divmod(quarter, 2)
                cell = (line + row) * n + left + 2 * i + column
                page.write(cell, letter, ink, part=quarter + 1)
        return line + 2

    def _words(self, length: int) -> str:
        rng = self.rng
        text = ""
        while len(text) < length:
            text += "".join(rng.choices(LOWER_CASE, k=rng.randint(2, 9)))
            text += rng.choice((" ", " ", " ", ", ", ". "))
        return text[:length]
