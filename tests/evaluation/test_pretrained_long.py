# SPDX-License-Identifier: Apache-2.0
"""Questions with long answers: where the answers stand, and what is fed to the model."""

import pytest

from evaluation.pretrained.long_answers import (
    FORMS,
    LENGTHS,
    NUM_ITEMS,
    PASSAGE_TOKENS,
    TASKS,
    long_answer_cases,
)
from tests.evaluation.test_pretrained_tasks import WordTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.mark.parametrize("split", ["tune", "test"])
def test_answers_are_in_the_pages_and_in_the_output(tokenizer: WordTokenizer, split: str) -> None:
    cases = long_answer_cases(tokenizer, split, TASKS, FORMS, 7)
    assert len(cases) == 7 * len(TASKS) * len(FORMS)
    for case in cases:
        found = tokenizer.decode([case.pages[p][i] for p, i in case.answer_tokens])
        assert found.strip() == case.answers[0]
        output = tokenizer.decode(case.output)
        assert output.strip(' ."').endswith(case.answers[0].strip(' ."'))
        if case.form == "completion":  # the output is the rest of the sentence
            whole = tokenizer.decode([*case.after, *case.output])
            pages = "".join(tokenizer.decode(page) for page in case.pages)
            assert whole.strip() in pages
        assert sum(map(len, case.pages)) in LENGTHS


def test_sizes_of_answers(tokenizer: WordTokenizer) -> None:
    for case in long_answer_cases(tokenizer, "tune", TASKS, ["chat"], 6):
        if case.task == "copy200":
            assert PASSAGE_TOKENS - 1 <= len(case.answer_tokens) <= PASSAGE_TOKENS + 60
        else:
            assert case.answers[0].count(", ") == NUM_ITEMS - 2


def test_unknown_names(tokenizer: WordTokenizer) -> None:
    for arguments in (("train", TASKS, FORMS), ("tune", ["copy8"], FORMS), ("tune", TASKS, ["x"])):
        with pytest.raises(ValueError, match="unknown"):
            long_answer_cases(tokenizer, *arguments, 1)
