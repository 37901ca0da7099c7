# SPDX-License-Identifier: Apache-2.0
"""``python -m checks.contract [PATH/TO/vllm]``: what of our contract a vLLM does not keep.

PATH is the folder of vLLM's Python sources, installed or unpacked from a wheel, of any version;
without it the installed vLLM is checked. Nothing of it is imported. Prints one line for each
violation, exits with 1 if there is any, with 2 if there are no sources.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from checks.contract.sources import NotFoundError, Sources, installed
from checks.contract.table import CONTRACT


def violations(sources: Sources) -> list[str]:
    """One line each: the file of ours, the symbol, what was expected of it, what was found."""
    return [
        f"{ours}: {line}"
        for ours, rows in CONTRACT.items()
        for row in rows
        for line in row.violations(sources)
    ]


def main(arguments: Sequence[str]) -> int:
    try:
        sources = Sources(Path(arguments[0]).resolve() if arguments else installed())
    except NotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    lines = violations(sources)
    print(*lines, sep="\n", end="\n" if lines else "")
    num_facts = sum(row.num_facts() for rows in CONTRACT.values() for row in rows)
    print(f"vLLM {sources.version}: {len(lines)} of {num_facts} expectations not met")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
