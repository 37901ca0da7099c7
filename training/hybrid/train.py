# SPDX-License-Identifier: Apache-2.0
"""Trains the hybrid reader like the page reader (`training.train`), in fewer steps.

python -m training.hybrid.train --out build/hybrid-reader
"""

import argparse
from dataclasses import replace

from training.hybrid.model import HybridEncoder, HybridReader, HybridShape
from training.train import STAGES as PAGE_READER
from training.train import Trainer, argument_parser, train

# Pages of 8x8 and 12x12, then of 20x20. Short convolutions copy without having to learn it first.
STEPS = (400, 100, 100, 120, 60)
STAGES = tuple(replace(stage, steps=n) for stage, n in zip(PAGE_READER, STEPS, strict=True))
HINT_LAYERS = 2, 5  # the first two layers with full attention


def hybrid_reader(options: argparse.Namespace) -> Trainer:
    encoder = HybridEncoder()
    model = HybridReader(HybridShape(vocab=encoder.vocab))
    return Trainer(model, encoder, options.optimizer, options.lr, HINT_LAYERS)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    train(parser.parse_args(arguments), hybrid_reader, STAGES)


if __name__ == "__main__":
    main()
