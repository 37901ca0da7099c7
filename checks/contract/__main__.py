# SPDX-License-Identifier: Apache-2.0
"""Check the contract against the sources of a vLLM release.

    python -m checks.contract [PATH/TO/vllm]

PATH is the folder of vLLM's Python sources, installed or unpacked from a wheel, of any version. By
default the installed vLLM is checked. Nothing is imported from it. Prints one line for each
violation. The exit code is 1 if there are violations and 2 if there are no sources.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from checks.contract.sources import NotFoundError, Sources, installed
from checks.contract.table import CONTRACT
from testing.cli import make_parser


def violations(sources: Sources) -> list[str]:
    """One line each: the file of this package, the symbol, the expectation and what was found."""
    return [
        f"{ours}: {line}"
        for ours, rows in CONTRACT.items()
        for row in rows
        for line in row.violations(sources)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("path", nargs="?", type=Path, metavar="PATH", help="default: installed")
    path = parser.parse_args(arguments).path
    try:
        sources = Sources(path.resolve() if path else installed())
    except NotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    lines = violations(sources)
    print(*lines, sep="\n", end="\n" if lines else "")
    num_facts = sum(row.num_facts() for rows in CONTRACT.values() for row in rows)
    print(f"vLLM {sources.version}: {len(lines)} of {num_facts} expectations not met")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
