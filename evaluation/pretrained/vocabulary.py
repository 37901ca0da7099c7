# SPDX-License-Identifier: Apache-2.0
"""Counts the tokens of the bench's documents, for the training of the word reader.

    python -m evaluation.pretrained.vocabulary build/pretrained build/vocabulary.json

The file maps token ids to their numbers of occurrences in documents of both splits. The word reader
is trained on random pages of these tokens, so that it learns words and nothing of the documents.
"""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

from transformers import AutoTokenizer

from evaluation.pretrained.tasks import SPLITS, Encode, encoder, generate
from testing.cli import make_parser

DOCUMENTS = 120  # of each split; they contain nearly all words of its prose and its names


def token_counts(encode: Encode, documents: int = DOCUMENTS) -> Counter[int]:
    """Occurrences of each token in the first documents of all splits."""
    return Counter(
        chain.from_iterable(
            page
            for split in SPLITS
            for index in range(documents)
            for page in generate(encode, split, index).pages
        )
    )


def main() -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("language_model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    counts = token_counts(encoder(tokenizer))
    options.out.write_text(json.dumps(dict(counts.most_common())))
    print(f"{len(counts)} tokens -> {options.out}")


if __name__ == "__main__":
    main()
