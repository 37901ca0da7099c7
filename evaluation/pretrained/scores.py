# SPDX-License-Identifier: Apache-2.0
"""Scores of answers to questions about natural prose, from 0 to 1."""

import re
from collections.abc import Sequence

from rapidfuzz import fuzz


def _plain(text: str) -> str:
    """Lower case, with single blanks."""
    return " ".join(text.lower().split())


def begins(output: str, expected: Sequence[str]) -> float:
    """1 if the output begins with an expected answer, which no letter or digit continues."""
    return float(any(re.match(re.escape(_plain(e)) + r"(?!\w)", _plain(output)) for e in expected))


def mentions(output: str, expected: Sequence[str]) -> float:
    """1 if an expected answer stands in the output as whole words."""
    return float(
        any(re.search(rf"(?<!\w){re.escape(_plain(e))}(?!\w)", _plain(output)) for e in expected)
    )


def items(output: str, expected: Sequence[str]) -> float:
    """1 if the output mentions all items of an expected list such as "a, b and c"."""
    return max(
        min(mentions(output, [item]) for item in re.split(r", | and ", answer))
        for answer in expected
    )


def copies(output: str, expected: Sequence[str]) -> float:
    """1 if a passage of the output has at least 90 % of an expected answer's characters.

    One wrong word in a passage of 40 tokens is forgiven, a missing half is not.
    """
    text = _plain(output)
    return float(
        any(
            len(text) >= 0.9 * len(_plain(e)) and fuzz.partial_ratio(_plain(e), text) >= 90
            for e in expected
        )
    )


# Where an answer may be a part of the output.
SCORES = {
    "fact": mentions,
    "needle": mentions,
    "copy8": mentions,
    "copy40": copies,
    "list": items,
    "which": mentions,
}
GRADED_ALIKE = ("copy40", "list")  # in completions, too


def score(task: str, form: str, output: str, expected: Sequence[str]) -> float:
    """Score of an output for a case of `tasks.pretrained_cases`.

    A completion continues the answer's sentence, so it has to begin with the answer. A long answer
    may differ a little, as its score says. A reply in a chat may say more.
    """
    return (begins if form == "completion" and task not in GRADED_ALIKE else SCORES[task])(
        output, expected
    )
