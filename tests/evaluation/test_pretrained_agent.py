# SPDX-License-Identifier: Apache-2.0
"""Conversations: each prompt begins with the one of the turn before, and answers are in pages."""

import pytest

from evaluation.pretrained.agent import PAGE_TOKENS, TURNS, agent_cases
from tests.evaluation.test_pretrained_tasks import WordTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def text_of(case, pages: int) -> list[int]:
    """Token ids of the prompt up to and including so many pages."""
    ids = [*case.before, *case.pages[0]]
    for text, page in zip(case.between[: pages - 1], case.pages[1:pages], strict=True):
        ids += [*text, *page]
    return ids


def test_a_turn_continues_the_turn_before(tokenizer: WordTokenizer) -> None:
    cases = agent_cases(tokenizer, "tune", 2)
    assert len(cases) == 2 * 2 * len(TURNS)
    for group in {case.group for case in cases}:
        conversation = [case for case in cases if case.group == group]
        assert [len(case.pages) for case in conversation] == [t for t in TURNS for _ in range(2)]
        longest = conversation[-1]
        for case in conversation:
            assert len(case.between) == len(case.pages) - 1
            assert all(len(page) == PAGE_TOKENS for page in case.pages)
            assert text_of(case, len(case.pages)) == text_of(longest, len(case.pages))


def test_new_and_old_questions(tokenizer: WordTokenizer) -> None:
    for case in agent_cases(tokenizer, "test", 5):
        ((page, _), *_) = case.answer_tokens
        newest = len(case.pages) - 1
        assert page == newest if case.task.endswith("new") else page < newest
        found = tokenizer.decode([case.pages[p][i] for p, i in case.answer_tokens])
        assert found.strip() == case.answers[0]


def test_conversations_are_reproducible(tokenizer: WordTokenizer) -> None:
    assert agent_cases(tokenizer, "tune", 2) == agent_cases(tokenizer, "tune", 2)
    with pytest.raises(ValueError, match="unknown split"):
        agent_cases(tokenizer, "train", 1)
