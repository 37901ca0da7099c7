# SPDX-License-Identifier: Apache-2.0
"""Scores of answers to questions about natural prose, from 0 to 1."""

import re
from collections.abc import Sequence


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


def first_number(output: str, expected: Sequence[str]) -> float:
    """1 if the first number in the output is an expected answer."""
    numbers = re.findall(r"\d+", output)
    return float(bool(numbers) and numbers[0] in expected)


CHAT_SCORES = {
    "fact": mentions,
    "needle": mentions,
    "copy8": mentions,
    "copy40": mentions,
    "list": items,
    "which": first_number,
}


def score(task: str, form: str, output: str, expected: Sequence[str]) -> float:
    """Score of an output for a case of `tasks.pretrained_cases`.

    A completion continues the answer's sentence, so it has to begin with the answer. A reply in a
    chat may say more.
    """
    return (begins if form == "completion" else CHAT_SCORES[task])(output, expected)
