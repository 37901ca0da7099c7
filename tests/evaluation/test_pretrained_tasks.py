# SPDX-License-Identifier: Apache-2.0
"""Documents, cases and scores of the accuracy bench on a pretrained language model."""

import re

import pytest

from evaluation.pretrained.pools import POOLS
from evaluation.pretrained.scores import begins, copies, items, mentions, score
from evaluation.pretrained.tasks import (
    FORMS,
    GIVEN_WORDS,
    LENGTHS,
    MAX_TOKENS_FIRST,
    MIN_TOKENS,
    NUM_PAGES,
    SPLITS,
    TASKS,
    PretrainedCase,
    document_length,
    encoder,
    generate,
    paragraphs,
    pretrained_cases,
)


class WordTokenizer:
    """Words with their preceding blank, and punctuation."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.pieces: list[str] = []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        found = re.findall(r" ?\w+| ?[^\w\s]+|\s", text)
        assert "".join(found) == text
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        return [self.ids[piece] for piece in found]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture(scope="module")
def cases(tokenizer: WordTokenizer) -> dict[str, list[PretrainedCase]]:
    return {split: pretrained_cases(tokenizer, split, TASKS, FORMS, 24) for split in SPLITS}


def document_text(tokenizer: WordTokenizer, case: PretrainedCase) -> str:
    return tokenizer.decode([token for page in case.pages for token in page])


def test_prose() -> None:
    for split in SPLITS:
        texts = [" ".join(sentences) for sentences in paragraphs(split)]
        assert len(texts) >= 60
        assert all(80 <= len(text.split()) <= 130 for text in texts)
        assert all('"' not in text for text in texts)  # quotations end at the first one


def test_splits_share_no_sentence() -> None:
    tune, test = ({s for p in paragraphs(split) for s in p} for split in SPLITS)
    assert not tune & test


def test_splits_share_no_word_of_a_pool() -> None:
    tune, test = (vars(POOLS[split]) for split in SPLITS)
    for name in tune:
        assert not set(tune[name]) & set(test[name]), name
        assert len(set(tune[name])) == len(tune[name]), name


def test_splits_share_no_answer(cases: dict[str, list[PretrainedCase]]) -> None:
    tune, test = ({c.answers for c in cases[split]} for split in SPLITS)
    assert not tune & test


@pytest.mark.parametrize("split", SPLITS)
def test_documents(tokenizer: WordTokenizer, split: str) -> None:
    encode = encoder(tokenizer)
    seen = set()
    for index in range(len(LENGTHS) * len(NUM_PAGES)):
        document = generate(encode, split, index)
        lengths = {len(page) for page in document.pages}
        assert len(lengths) == 1
        assert sum(map(len, document.pages)) == document_length(index)
        assert 0 <= LENGTHS[index % len(LENGTHS)] - document_length(index) < len(document.pages)
        seen.add((LENGTHS[index % len(LENGTHS)], len(document.pages)))
        starts = [statement.start for statement, _ in document.statements]
        assert len(set(starts)) == len(starts)
        text = tokenizer.decode([token for page in document.pages for token in page])
        for statement, _ in document.statements:
            assert text.count(statement.start) == 1
            assert statement.text in text
    assert len(seen) == len(LENGTHS) * len(NUM_PAGES)


@pytest.mark.parametrize("split", SPLITS)
def test_cases(
    tokenizer: WordTokenizer, cases: dict[str, list[PretrainedCase]], split: str
) -> None:
    for task in TASKS:
        for form in FORMS:
            own = [c for c in cases[split] if (c.task, c.form) == (task, form)]
            assert len(own) == 24
            assert len({(c.group, c.before, c.after) for c in own}) == 24
            assert all(sum(map(len, c.pages)) >= MIN_TOKENS.get(task, 0) for c in own)
            if task == "which":
                assert {len(c.pages) for c in own} == {2, 3, 4}
                assert {page for c in own for page, _ in c.answer_tokens} == {0, 1, 2, 3}
            if form == "chat-first":
                assert all(sum(map(len, c.pages)) <= MAX_TOKENS_FIRST for c in own)
    for case in cases[split]:
        answer = tokenizer.decode([case.pages[page][i] for page, i in case.answer_tokens])
        assert answer.strip() == case.answers[0]
        assert case.max_tokens > len(case.answer_tokens)
        asked = tokenizer.decode([*case.before, *case.after])
        assert case.answers[0] not in asked


def test_completions_repeat_the_text_before_the_answer(
    tokenizer: WordTokenizer, cases: dict[str, list[PretrainedCase]]
) -> None:
    for case in cases["tune"]:
        if case.form == "completion":
            start = tokenizer.decode(list(case.after)).strip()
            text = document_text(tokenizer, case)
            assert text.split(start)[1].lstrip().startswith(case.answers[0])


def test_completions_begin_quotations(
    tokenizer: WordTokenizer, cases: dict[str, list[PretrainedCase]]
) -> None:
    for task, words in GIVEN_WORDS.items():
        completions, chats = (
            [c for c in cases["test"] if (c.task, c.form) == (task, form)]
            for form in ("completion", "chat")
        )
        for completion, chat in zip(completions, chats, strict=True):
            given, rest = chat.answers[0].removesuffix(completion.answers[0]), completion.answers[0]
            assert given + rest == chat.answers[0] and len(given.split()) == words
            assert tokenizer.decode(list(completion.after)).endswith(f'"{given.rstrip()}')
            missing = len(chat.answer_tokens) - len(completion.answer_tokens)
            assert completion.answer_tokens == chat.answer_tokens[missing:]


def test_completion_and_chat_share_a_prefill(cases: dict[str, list[PretrainedCase]]) -> None:
    shared = {c.before for c in cases["test"] if c.form != "chat-first"}
    assert len(shared) == 1


def test_quotations_stand_once_in_a_document(
    tokenizer: WordTokenizer, cases: dict[str, list[PretrainedCase]]
) -> None:
    for case in cases["test"]:
        if case.task in ("copy8", "copy40"):
            assert document_text(tokenizer, case).count(case.answers[0]) == 1


def test_cases_of_a_document_and_form_are_consecutive(
    cases: dict[str, list[PretrainedCase]],
) -> None:
    keys = [(c.group, c.form) for c in cases["tune"]]
    changes = [key for key, previous in zip(keys, [None, *keys], strict=False) if key != previous]
    assert len(changes) == len(set(keys))


def test_cases_are_the_same_every_time(cases: dict[str, list[PretrainedCase]]) -> None:
    fresh = WordTokenizer()
    pretrained_cases(fresh, "tune", TASKS, FORMS, 24)
    again = pretrained_cases(fresh, "test", TASKS, FORMS, 24)

    def shape(case: PretrainedCase) -> tuple:
        return case.task, case.form, case.group, case.answers, case.answer_tokens

    assert [shape(c) for c in again] == [shape(c) for c in cases["test"]]


def test_cases_do_not_depend_on_the_other_tasks(
    tokenizer: WordTokenizer, cases: dict[str, list[PretrainedCase]]
) -> None:
    alone = pretrained_cases(tokenizer, "test", ["list"], ["chat"], 24)
    assert alone == [c for c in cases["test"] if (c.task, c.form) == ("list", "chat")]


@pytest.mark.parametrize(
    ("split", "tasks", "forms"),
    [("train", ["fact"], ["chat"]), ("test", ["sum"], ["chat"]), ("test", ["fact"], ["poem"])],
)
def test_unknown_names(
    tokenizer: WordTokenizer, split: str, tasks: list[str], forms: list[str]
) -> None:
    with pytest.raises(ValueError, match="unknown"):
        pretrained_cases(tokenizer, split, tasks, forms, 1)


def test_begins() -> None:
    assert begins(" Nora Holt. She", ["Nora Holt"]) == 1
    assert begins("Nora  Holt", ["Nora Holt"]) == 1
    assert begins("Nora Holter", ["Nora Holt"]) == 0
    assert begins("It is Nora Holt", ["Nora Holt"]) == 0
    assert begins("482130", ["48213"]) == 0
    assert begins("", ["48213"]) == 0


def test_mentions() -> None:
    assert mentions("The code is 48213.", ["48213"]) == 1
    assert mentions("The code is 148213.", ["48213"]) == 0
    assert mentions("It is infrared.", ["red"]) == 0
    assert mentions("Nora and Holt", ["Nora Holt"]) == 0


def test_items() -> None:
    assert items("It holds plums, ink and salt.", ["ink, salt and plums"]) == 1
    assert items("It holds plums, ink, and salt.", ["ink, salt and plums"]) == 1
    assert items("It holds plums and ink.", ["ink, salt and plums"]) == 0
    assert items("It holds plums, pink, salt.", ["ink, salt and plums"]) == 0


def test_copies() -> None:
    passage = (
        "The wind tore tiles from the roofs and carried them over the gardens like leaves. In the "
        "morning the road along the shore had disappeared under sand"
    )
    other = (
        "The doctor on the island visits most of her patients on foot. There are few roads, and "
        "those that exist end at the gate of somebody who is not at home"
    )
    assert copies(f'The letter says: "{passage}."', [passage]) == 1
    assert copies(passage.replace("morning", "evening"), [passage]) == 1
    assert copies(passage.replace("In the morning the road along", "At last"), [passage]) == 0
    assert copies(passage[: len(passage) // 2], [passage]) == 0
    assert copies("The wind", [passage]) == 0
    assert copies(other, [passage]) == 0


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_score(task: str) -> None:
    assert score(task, "chat", "It is red and green.", ["red and green"]) == 1
    for form in FORMS:
        assert score(task, form, " red and green.", ["red and green"]) == 1
        assert score(task, form, " red and blue.", ["red and green"]) == 0


@pytest.mark.parametrize("task", ["fact", "needle", "copy8", "which"])
def test_short_completions_begin_with_the_answer(task: str) -> None:
    assert score(task, "completion", "It is red and green.", ["red and green"]) == 0
