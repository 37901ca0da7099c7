# SPDX-License-Identifier: Apache-2.0
"""Conversations of an agent that gets a new page in every turn, and is asked about it.

The prompt of a turn is the prompt of the turn before, its answer, and one more page, so that it
finds its beginning in the prefix cache. The last question of a prompt is about its newest page
(``new``) or about one of the earlier ones (``old``).
"""

import random

from evaluation.pretrained.pools import POOLS
from evaluation.pretrained.tasks import (
    ASSISTANT,
    EXTRA_TOKENS,
    SPLITS,
    USER,
    PretrainedCase,
    Statement,
    Tokenizer,
    Writer,
    encoder,
    page_of,
    paragraphs,
    prose_of,
)

TURNS = (3, 6, 9)  # after which questions are asked; no more than there are templates
PAGE_TOKENS = 160
FORM = "agent"
NEXT_TURN = "<|im_end|>\n<|im_start|>user\n"
TASKS = ("fact", "needle")  # whose templates are different


def agent_cases(tokenizer: Tokenizer, split: str, count: int) -> list[PretrainedCase]:
    """``count`` questions about new pages and as many about old ones, after each of `TURNS`.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    encode = encoder(tokenizer)
    cases = []
    for index in range(count):
        rng = random.Random(f"agent/{split}/{index}")
        prose = prose_of(encode, rng.sample(paragraphs(split), len(paragraphs(split))))
        writer = Writer(rng, POOLS[split], {})
        statements = [s for task in TASKS for s in writer.all_statements(task)]
        rng.shuffle(statements)
        pages, places = [], []
        for statement in statements[: TURNS[-1]]:
            ids, ((_, where),) = page_of(encode, rng, prose, [], [statement], PAGE_TOKENS, "")
            pages.append(tuple(ids))
            places.append(where)
        answered = [encode(_question(s) + s.answer + NEXT_TURN) for s in statements]
        for turn in TURNS:
            for task, page in (("new", turn - 1), ("old", rng.randrange(turn - 1))):
                statement = statements[page]
                cases.append(
                    PretrainedCase(
                        f"turn {turn} {task}",
                        FORM,
                        f"agent/{split}/{index}",
                        tuple(pages[:turn]),
                        tuple(encode(USER)),
                        tuple(encode(_question(statement))),
                        (statement.answer,),
                        len(encode(statement.answer)) + EXTRA_TOKENS["chat"],
                        tuple((page, i) for i in places[page]),
                        tuple(tuple(text) for text in answered[: turn - 1]),
                    )
                )
    return cases


def _question(statement: Statement) -> str:
    return f"\n\n{statement.question}{ASSISTANT}"
