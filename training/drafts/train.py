# SPDX-License-Identifier: Apache-2.0
"""Trains an EAGLE-3 head for the page reader, whose weights stay as they are.

python -m training.drafts.train --out build/page-reader-eagle3
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from training.data import IGNORED, Batch, Encoder, Mixture, normalised
from training.drafts.model import AUX_LAYERS, NUM_PASSES, DraftHead
from training.model import Branches, Reader, Shape
from training.pages import Layout
from training.tokenizer import build_tokenizer
from training.train import STAGES as READER_STAGES
from training.train import argument_parser, build_optimizers, take_step, train

READER = Path(__file__).parents[2] / "models" / "page-reader"
STAGES = (
    replace(
        READER_STAGES[-1],
        name="drafts",
        steps=400,
        tokens_per_batch=8_000,
        layout=Layout(),
        mixture=Mixture(
            (("lookup", 2, 20), ("hop", 2, 24), ("row", 3, 46), ("dump", 3, 146), ("which", 2, 13))
        ),
        lr=1.0,
        restart=False,
    ),
)


def load_reader(path: Path = READER) -> Reader:
    """The page reader with the weights of a checkpoint."""
    reader = Reader(Shape(vocab=len(build_tokenizer())))
    weights = load_file(path / "model.safetensors")
    wanted = reader.state_dict()  # without the norm of the unused class token
    reader.load_state_dict({name: weights[name].float() for name in wanted})
    return reader.eval().requires_grad_(False)


class DraftTrainer:
    """The head, its loss and its optimizers."""

    def __init__(self, reader: Reader, optimizer: str, lr: float) -> None:
        self.encoder = Encoder(build_tokenizer())
        self.reader = reader
        self.model = DraftHead(reader.shape)
        self.model.start_as_last_layer(reader)
        self.optimizers = build_optimizers(self.model, optimizer, lr)

    def step(self, batch: Batch, lr: float, stage: Any) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            embedded, aux = head_inputs(self.reader, batch)
            branches = Branches.after(len(batch.prefix_ids), batch.slots, self.reader.shape)
            logits = self.model(embedded, aux, branches)
        loss = torch.zeros(())
        metrics = {}
        for number, (one, labels) in enumerate(
            zip(logits, draft_labels(batch.labels), strict=True)
        ):
            asked = labels != IGNORED
            loss = loss + F.cross_entropy(one[asked].float(), labels[asked])
            right = one[asked].argmax(-1) == labels[asked]
            metrics[f"right{number + 1}"] = right.float().mean().item()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        take_step(self.optimizers, lr)
        return {"loss": loss.item(), "norm": norm.item(), **metrics}

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@torch.no_grad()
def head_inputs(reader: Reader, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Embeddings of the next tokens, and the inputs of `AUX_LAYERS`.

    The pages' last token has a next one in every branch; all branches see that of the first.
    """
    features = reader.features(normalised(batch.pages.flatten(0, 1)))
    _, between = reader(
        features.view(batch.pages.shape[0], -1, features.shape[-1]),
        batch.prefix_ids,
        batch.image_positions,
        batch.branch_ids,
        batch.slots,
    )
    prefix = batch.prefix_ids.expand(len(batch.branch_ids), -1)
    following = torch.cat([prefix, batch.branch_ids], 1).roll(-1, 1)
    embedded = reader.model.language_model.embed_tokens(following)
    return embedded, [between[layer - 1] for layer in AUX_LAYERS]


def draft_labels(labels: Tensor) -> list[Tensor]:
    """For each pass the token after the next, where the pass begins in an answer."""
    found = []
    for number in range(NUM_PASSES):
        label = labels.roll(-1, 1)
        label[:, -1] = IGNORED
        begins = labels.roll(number, 1) != IGNORED
        begins[:, :number] = False
        found.append(torch.where(begins, label, IGNORED))
    return found


def draft_head(options: argparse.Namespace) -> Any:
    return DraftTrainer(load_reader(), options.optimizer, options.lr)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    train(parser.parse_args(arguments), draft_head, STAGES)


if __name__ == "__main__":
    main()
