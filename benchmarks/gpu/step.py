# SPDX-License-Identifier: Apache-2.0
"""A step of a call: a function with a time limit."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from testing.results import Row


@dataclass(frozen=True)
class Step:
    """One question to the GPU."""

    name: str
    question: str
    seconds: float
    """Time limit."""
    function: Callable[..., Row]
    """Prints with `say` and returns JSON. "failing" names what is wrong."""
    arguments: dict[str, Any] = field(default_factory=dict)
    isolated: bool = True
    """In a process of its own. Otherwise the function gets ``seconds`` and keeps to it."""

    def run(self, seconds: float) -> Row:
        """The result, or an "error"."""
        from vl_cache_vllm.self_check.steps import StepError, run_step

        try:
            if self.isolated:
                return run_step(_call, self.function, self.arguments, seconds=seconds)
            return self.function(**self.arguments, seconds=seconds)
        except StepError as error:
            return {"error": str(error)}
        except Exception as error:  # the next step shall run
            return {"error": f"{type(error).__name__}: {error}"}


def _call(function: Callable[..., Row], arguments: dict[str, Any]) -> Row:
    return function(**arguments)
