# SPDX-License-Identifier: Apache-2.0
"""What a call prints and writes."""

import os
from pathlib import Path
from typing import Any

from testing.results import Row, to_json

LOG = "VL_CACHE_GPU_LOG"
"""Environment variable with the path of the log."""


def say(text: object) -> None:
    """Print a line and append it to the log, from any process of the call."""
    print(text, flush=True)
    if path := os.environ.get(LOG):
        with open(path, "a") as file:
            file.write(f"{text}\n")


class Report:
    """The result file of a call, complete after every step."""

    def __init__(self, path: Path, call: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._content: dict[str, Any] = {"call": call, "steps": {}}

    def add(self, name: str, result: Row, seconds: float) -> None:
        """Write the result of a step."""
        self._content["steps"][name] = {"seconds": round(seconds, 1), **result}
        partial = self._path.with_suffix(".partial")
        partial.write_text(to_json(self._content) + "\n")
        partial.replace(self._path)
