# SPDX-License-Identifier: Apache-2.0
"""The generator: what stands where, what is asked, and that answers can be read off the page."""

import random

import numpy as np
import pytest

from training.pages import RECORD_MARK, TASKS, Document, Layout, generate
from training.render import CELL, render
from training.train import STAGES

LAYOUTS = pytest.mark.parametrize(
    "layout",
    [pytest.param(s.layout, id=s.name) for s in STAGES] + [pytest.param(Layout(), id="full")],
)


def documents(layout: Layout, count: int = 60) -> list[Document]:
    return [generate("unit", i, layout) for i in range(count)]


@LAYOUTS
def test_deterministic(layout: Layout) -> None:
    assert generate("a", 3, layout) == generate("a", 3, layout)
    assert generate("a", 3, layout) != generate("b", 3, layout)
    assert generate("a", 3, layout) != generate("a", 4, layout)


@LAYOUTS
def test_records_stand_where_they_say(layout: Layout) -> None:
    for document in documents(layout):
        for index, page in enumerate(document.pages):
            assert len(page.text) == len(page.ink) == len(page.part) == layout.grid**2
            for record in page.records:
                assert record.page == index
                cells = slice(record.start, record.start + len(record.text))
                assert "".join(page.text[cells]) == record.text
                assert "".join(page.text[i] for i in record.value_cells) == record.value
            assert "".join(page.text[i] for i in page.number_cells) == page.number
            starts = [r.start for r in page.plain]
            assert starts == sorted(starts)


@LAYOUTS
def test_unique_keys_numbers_and_pairs(layout: Layout) -> None:
    """The last two characters always decide where to go on."""
    for document in documents(layout):
        records = [r for page in document.pages for r in page.records]
        keys = [r.key for r in records]
        numbers = [page.number for page in document.pages]
        assert len(set(keys)) == len(keys)
        assert len(set(numbers)) == len(numbers)
        values = [r.value for r in records if r.value not in keys]
        pairs = [v[i : i + 2] for v in values for i in range(len(v) - 1)]
        assert len(set(pairs)) == len(pairs)
        assert not set(pairs) & set(keys)


@LAYOUTS
@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_in_their_cells(layout: Layout, task: str) -> None:
    rng = random.Random(0)
    asked = 0
    for document in documents(layout):
        for question in document.questions(task, rng, 3):
            asked += 1
            text = "".join(document.pages[page].text[cell] for page, cell in question.cells)
            assert text.rstrip() == question.answer
            assert question.subject in question.text
    assert asked > 20


def test_page_numbers_differ_in_their_first_digit() -> None:
    for document in documents(Layout(), 100):
        assert len({page.number[0] for page in document.pages}) == len(document.pages)


def test_hop_leads_over_one_link() -> None:
    rng = random.Random(0)
    for document in documents(Layout()):
        values = {r.key: r.value for page in document.pages for r in page.plain}
        for question in document.questions("hop", rng, 5):
            target = values[question.subject]
            assert question.answer == values[target]
            assert question.answer not in values  # a link never leads to a link


@pytest.mark.parametrize("task", TASKS)
def test_via_is_how_the_named_value_begins(task: str) -> None:
    rng = random.Random(0)
    for document in documents(Layout()):
        values = {r.key: r.value for page in document.pages for r in page.records}
        for question in document.questions(task, rng, 3):
            assert question.via == values.get(question.subject, "")[:2]


def test_answer_lengths_of_the_issue() -> None:
    rng = random.Random(0)
    lengths = {task: [] for task in TASKS}
    for document in documents(Layout(), 200):
        for task in TASKS:
            lengths[task] += [len(q.answer) for q in document.questions(task, rng, 2)]
    assert min(lengths["lookup"]) == 2 and max(lengths["lookup"]) == 6
    assert min(lengths["row"]) >= 28 and max(lengths["row"]) == 32
    assert max(lengths["dump"]) > 100


def test_pages_hold_what_the_issue_names() -> None:
    pages = [page for document in documents(Layout(), 100) for page in document.pages]
    assert any(page.rules for page in pages)  # tables
    assert any(max(page.part) for page in pages)  # headings in other sizes
    assert len({page.ink[page.number_cells[0]] for page in pages}) == 3  # and other inks
    assert any(c.islower() and i == 4 for p in pages for c, i in zip(p.text, p.ink, strict=True))
    assert {len(d.pages) for d in documents(Layout(), 100)} == {1, 2, 3, 4}


def test_too_much_for_a_page() -> None:
    layout = Layout(grid=8, num_records=(12, 12), value_length=(6, 6))
    with pytest.raises(ValueError, match="do not fit a 8x8 page"):
        generate("unit", 0, layout)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="unknown task 'sum'"):
        generate("unit", 0, Layout()).questions("sum", random.Random(0), 1)


def test_rendering() -> None:
    page = generate("unit", 0, Layout()).pages[0]
    image = render(page, 5)
    assert image.shape == (20 * CELL, 20 * CELL, 3) and image.dtype == np.uint8
    assert (image == render(page, 5)).all()
    assert (image != render(page, 6)).any()
    # A cell with a glyph is darker than a blank one.
    dark = image.reshape(20, CELL, 20, CELL, 3).min(axis=(1, 3, 4)).ravel()
    printed = [i for i, c in enumerate(page.text) if c not in " .,:" and page.part[i] == 0]
    blank = [i for i, c in enumerate(page.text) if c == " "]
    assert max(dark[printed]) < min(dark[blank])
    assert RECORD_MARK in page.text
