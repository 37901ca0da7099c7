# SPDX-License-Identifier: Apache-2.0
"""Trains the word reader: a vision tower whose features are a language model's input embeddings.

    python -m training.words.train --language-model MODEL --counts FILE --out build/word-reader

MODEL is the language model's checkpoint. It is not trained, and only its embedding table and its
tokenizer are used. FILE maps token ids to their counts in the text that the tower must read. After
an interruption the same command continues from the last checkpoint. Every batch is new, so that the
log is about unseen pages.
"""

import argparse
import json
import os
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer

from training.model import Projector, Shape, VisionTransformer
from training.train import WARM_UP, Log, build_optimizers, save, take_step
from training.words.data import CHARACTERS, Alphabet, Batch, Batches, normalised
from training.words.render import CELL, GRID

DECAY_SHARE = 0.5  # of the steps, at the end, in which the learning rate falls to zero
# Tokens that each patch must be told apart from, beside its batch's: random ones, and the nearest
# ones to some patches.
NEGATIVES, MINED, NEAREST = 1024, 256, 4
SHARPNESS = 3.0  # of the softmax over squared distances; neighbours in the table are at 4 or more
# Weight of the distance, before and after the decay of the learning rate. A high weight from the
# beginning keeps all features at the mean embedding.
DISTANCE_WEIGHTS = 0.25, 1.0
HINT_WEIGHT = 2.0
SPACE_WEIGHT = 0.2  # low, because most characters of a cell are spaces


def shape_for(width: int) -> Shape:
    """Sizes of tower and projector for a language model of this width."""
    return Shape(
        width=width,
        grid=GRID,
        patch=CELL,
        vision_width=384,
        vision_heads=6,
        vision_mlp=2304,
    )


def embedding_table(model: Path) -> Tensor:
    """The input embeddings of a checkpoint, float32 [tokens, width]."""
    with safe_open(model / "model.safetensors", "pt") as weights:
        name = next(n for n in weights.keys() if n.endswith("embed_tokens.weight"))  # noqa: SIM118
        return weights.get_tensor(name).float()


class GreyEmbeddings(nn.Module):
    """CLIP's embeddings of grey patches, with the convolution as a matrix, so that Muon trains it.

    The three channels of a grey pixel are equal, and so are their weights in the checkpoint.
    """

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(0.1 * torch.randn(s.vision_width))
        self.patches = nn.Linear(s.patch**2, s.vision_width, bias=False)
        self.position_embedding = nn.Embedding(s.grid**2 + 1, s.vision_width)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def forward(self, patches: Tensor) -> Tensor:
        """[pages, n, n, patch * patch] -> [pages, 1 + n * n, vision width]"""
        x = self.patches(patches).flatten(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        return torch.cat([first, x], dim=1) + self.position_embedding.weight


class WordReader(nn.Module):
    """Tower and projector; all but the patch embedding is named as in a LLaVA checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        tower = VisionTransformer(shape)
        tower.embeddings = GreyEmbeddings(shape)
        self.vision_tower = nn.ModuleDict({"vision_model": tower})
        self.multi_modal_projector = Projector(shape)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Features and, for the hint, hidden states of grey patches.

        ``patches`` are [pages, n, n, 32 * 32]. Features are [pages, n * n, width]; the states after
        the first layer are [pages, n * n, vision width].
        """
        tower = self.vision_tower["vision_model"]
        states = [tower.pre_layrnorm(tower.embeddings(patches))]
        for layer in tower.encoder.layers:
            states.append(layer(states[-1]))
        return self.multi_modal_projector(states[-1][:, 1:]), states[1][:, 1:]


class Targets:
    """The vectors that patches must become: the embedding table, and one for blank cells.

    A feature is compared with vectors by squared distance, because embeddings differ in length.

    Args:
        table: the input embeddings, [vocabulary, width].
        ids: the tokens that occur in pages.
    """

    def __init__(self, table: Tensor, ids: Collection[int]) -> None:
        self.vectors = torch.cat([table, blank_vector(table)[None]])
        self._ids = torch.tensor(list(ids))
        self.mean = self.vectors[self._ids].mean(0)
        self._centred = (self.vectors - self.mean).bfloat16()
        self._half_squares = 0.5 * (self.vectors - self.mean).square().sum(-1)

    def logits(self, features: Tensor, candidates: Tensor | slice) -> Tensor:
        """Sharpness times minus half the squared distance, up to a constant of each row.

        ``features`` are [patches, width], and ``candidates`` are token ids.
        """
        centred = (features - self.mean).bfloat16()
        products = F.linear(centred, self._centred[candidates]).float()
        return SHARPNESS * (products - self._half_squares[candidates])

    def nearest(self, features: Tensor, count: int = 1) -> Tensor:
        """The tokens with the nearest vectors to features [patches, width]: [patches, count]."""
        parts = [self.logits(f, slice(None)).topk(count).indices for f in features.split(256)]
        return torch.cat(parts)

    def losses(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, mean squared distance, and whether the token is the nearest candidate.

        The candidates are the batch's tokens, random tokens, and those that some of the features
        are nearest to: " the" must be told apart from " th", which is rarely among the others.
        """
        some = self._ids[torch.randint(len(self._ids), (NEGATIVES,))]
        with torch.no_grad():
            mined = features[torch.randint(len(features), (MINED,))]
            near = self.nearest(mined, NEAREST).flatten()
        candidates, labels = torch.cat([tokens, some, near]).unique(return_inverse=True)
        labels = labels[: len(tokens)]
        logits = self.logits(features, candidates)
        distance = (features.float() - self.vectors[tokens]).square().sum(-1)
        return F.cross_entropy(logits, labels), distance.mean(), logits.argmax(-1) == labels


def blank_vector(table: Tensor) -> Tensor:
    """What a blank cell becomes: the mean embedding, which a language model reads past."""
    return table.mean(0)


class Trainer:
    """Model, losses and optimizers.

    Beside the losses of `Targets` there is a hint: after the first layer, a head that is not part
    of the checkpoint reads each character of a cell. Reading therefore forms early, and the rest of
    the model maps words to embeddings.
    """

    def __init__(self, targets: Targets, alphabet: Alphabet, shape: Shape, lr: float) -> None:
        self.targets, self.model = targets, WordReader(shape)
        last = self.model.multi_modal_projector.linear_2
        last.weight.data.mul_(0.2)
        last.bias.data.copy_(targets.mean)
        self.spelling = alphabet.spelling
        self.hint = nn.Linear(shape.vision_width, self.spelling.shape[1] * CHARACTERS)
        self.weight = torch.ones(CHARACTERS)
        self.weight[ord(" ")] = SPACE_WEIGHT
        self.optimizers = build_optimizers(self.model, "muon", lr, self.hint.parameters())

    def step(self, batch: Batch, lr: float, distance_weight: float) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            features, states = self.model(normalised(batch.pages))
            tokens = batch.tokens.flatten()
            entropy, distance, right = self.targets.losses(features.flatten(0, 1), tokens)
            spelled = self.hint(states.flatten(0, 1)).float().view(-1, CHARACTERS)
        hint = F.cross_entropy(spelled, self.spelling[tokens].flatten(), self.weight)
        loss = entropy + distance_weight * distance + HINT_WEIGHT * hint
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        take_step(self.optimizers, lr)
        return {
            "loss": loss.item(),
            "entropy": entropy.item(),
            "distance": distance.item(),
            "hint": hint.item(),
            "read": right.float().mean().item(),
            "norm": norm.item(),
        }

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "hint": self.hint.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.hint.load_state_dict(state["hint"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def decay(step: int, steps: int) -> float:
    """1 until the last part of the training, in which it falls to zero."""
    return min(1.0, (steps - step) / (DECAY_SHARE * steps))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A warm-up, a constant part and a linear decay."""
    return peak * min(1.0, (step + 1) / WARM_UP, decay(step, steps))


def distance_weight(step: int, steps: int) -> float:
    first, last = DISTANCE_WEIGHTS
    return last + decay(step, steps) * (first - last)


def read_counts(file: Path) -> dict[int, int]:
    """Counts of tokens by token id, from the JSON object in a file."""
    return {int(i): count for i, count in json.loads(file.read_text()).items()}


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(options.language_model)
    alphabet = Alphabet(tokenizer, read_counts(options.counts))
    table = embedding_table(options.language_model)
    trainer = Trainer(Targets(table, alphabet.ids), alphabet, shape_for(table.shape[1]), options.lr)
    step, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        trainer.load(saved["trainer"])
        step, seconds = saved["step"], saved["seconds"]
        print(f"continuing from step {step}")
    stream = iter(Batches(alphabet, options.seed, options.pages, step))
    with (out / "log.jsonl").open("a", buffering=1) as file:
        log = Log(file, seconds)
        while step < options.steps:
            lr = learning_rate(step, options.steps, options.lr)
            weight = distance_weight(step, options.steps)
            log.add(trainer.step(next(stream), lr, weight))
            step += 1
            if step % options.log_every == 0 or step == options.steps:
                log.write(step=step, lr=round(lr, 6))
            if step % options.save_every == 0 or step == options.steps:
                save(checkpoint, {"trainer": trainer.state(), "step": step, "seconds": log.seconds})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--language-model", type=Path, required=True, help="its checkpoint")
    parser.add_argument("--counts", type=Path, required=True, help="of tokens in a text, JSON")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint and the log"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--pages", type=int, default=12, help="pages per batch")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
