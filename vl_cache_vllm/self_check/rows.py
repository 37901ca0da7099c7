# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: an error and its limit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    """What is compared."""
    case: str
    """With which inputs."""
    error: float
    limit: float
    """Largest error that passes."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        text = f"{verdict}  {self.name:<36}{self.case:<50}{self.error:>11.3g}{self.limit:>11.3g}"
        return f"{text}  {self.note}".rstrip()


HEADER = f"      {'what':<36}{'case':<50}{'error':>11}{'limit':>11}"


def broken(name: str, case: str, error: BaseException | str) -> Row:
    """The row of a comparison that could not be made; its note is the end of the message."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(name, case, float("inf"), 0.0, " ".join(text.split())[-300:])


def failing(rows: Iterable[Row]) -> list[Row]:
    """The rows that did not pass."""
    return [row for row in rows if not row.passed]
