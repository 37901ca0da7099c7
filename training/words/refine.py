# SPDX-License-Identifier: Apache-2.0
"""Refines a trained word reader: brings its features closer to the embeddings of a text's tokens.

    python -m training.words.refine --language-model MODEL --counts FILE --out build/word-reader

A language model needs vectors that are closer to its embeddings than telling words apart does. Only
the last MLP of the tower and the projector are trained, on states that are computed once, so that a
step costs a fraction of one of `training.words.train`. The loss is the squared distance alone, as a
fraction of the embedding's own to the mean embedding.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from training.train import Log, build_optimizers, save, take_step
from training.words.data import Alphabet, normalised, patches
from training.words.train import (
    Targets,
    WordReader,
    embedding_table,
    read_counts,
    shape_for,
)

WARM_UP = 20
RARITY = 0.8  # 0: cells as often as in the pages, 1: all tokens equally often


class Upper(nn.Module):
    """The last MLP of a word reader's tower, and its projector; shares their parameters."""

    def __init__(self, model: WordReader) -> None:
        super().__init__()
        layer = model.vision_tower["vision_model"].encoder.layers[-1]
        self.norm, self.mlp = layer.layer_norm2, layer.mlp
        self.projector = model.multi_modal_projector

    def forward(self, states: Tensor) -> Tensor:
        """States before the MLP [cells, vision width] -> features [cells, width]."""
        return self.projector(states + self.mlp(self.norm(states)))


@torch.no_grad()
def lower(model: WordReader, grey: Tensor) -> Tensor:
    """The states that `Upper` takes, of patches [pages, n, n, 32 * 32]; [pages * n * n, width]."""
    tower = model.vision_tower["vision_model"]
    *first, last = tower.encoder.layers
    x = tower.pre_layrnorm(tower.embeddings(normalised(grey)))
    for layer in first:
        x = layer(x)
    x = x + last.self_attn(last.layer_norm1(x))
    return x[:, 1:].flatten(0, 1)


def states_of(
    model: WordReader, alphabet: Alphabet, pages: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Lower states, bfloat16, and tokens of the cells of random pages."""
    states, tokens = [], []
    for index in range(pages):
        page, ids = alphabet.page(np.random.default_rng([seed, index]))
        with torch.autocast("cpu", torch.bfloat16):
            found = lower(model, torch.from_numpy(patches(page))[None])
        states.append(found.bfloat16())
        tokens.append(torch.from_numpy(ids))
    return torch.cat(states), torch.cat(tokens)


def refine(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    checkpoint = options.out / "checkpoint.pt"
    saved = torch.load(checkpoint, weights_only=True)
    table = embedding_table(options.language_model)
    model = WordReader(shape_for(table.shape[1]))
    model.load_state_dict(saved["trainer"]["model"])
    tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    alphabet = Alphabet(tokenizer, read_counts(options.counts), only_text=True)
    targets = Targets(table, alphabet.ids)
    clock = time.perf_counter()
    states, tokens = states_of(model, alphabet, options.pages, options.seed)
    print(f"{len(states)} cells, {time.perf_counter() - clock:.0f} s", flush=True)
    scale = (targets.vectors - table.mean(0)).square().sum(-1).clamp(min=1)
    # Rare words, such as names, are what questions ask for.
    weights = torch.bincount(tokens)[tokens].double() ** -RARITY
    upper = Upper(model)
    optimizers = build_optimizers(upper, "muon", options.lr)
    with (options.out / "log.jsonl").open("a", buffering=1) as file:
        log = Log(file, time.perf_counter() - clock)
        for step in range(options.steps):
            chosen = torch.multinomial(weights, options.cells, replacement=True)
            with torch.autocast("cpu", torch.bfloat16):
                features = upper(states[chosen].float())
            token = tokens[chosen]
            distance = (features.float() - targets.vectors[token]).square().sum(-1)
            error = (distance / scale[token]).mean()
            error.backward()
            take_step(optimizers, options.lr * min((step + 1) / WARM_UP, 1 - step / options.steps))
            log.add({"error": error.item()})
            if (step + 1) % options.log_every == 0 or step + 1 == options.steps:
                log.write(refine=step + 1)
                saved["trainer"]["model"] = model.state_dict()
                save(options.out / "refined.pt", saved)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, required=True, help="its checkpoint")
    parser.add_argument("--counts", type=Path, required=True, help="of tokens in a text, JSON")
    parser.add_argument("--out", type=Path, required=True, help="folder of training.words.train")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pages", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=4096, help="cells per batch")
    parser.add_argument("--log-every", type=int, default=20)
    refine(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
