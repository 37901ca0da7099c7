# SPDX-License-Identifier: Apache-2.0
"""The questions of the pressure evaluation."""

from collections import Counter

from evaluation.pressure import TASKS, questions


def test_questions_share_no_pages_and_ask_every_task() -> None:
    cases = questions(40)
    assert len({case.group for case in cases}) == 40
    counts = Counter(case.task for case in cases)
    assert set(counts) == set(TASKS)
    assert max(counts.values()) - min(counts.values()) <= 2
