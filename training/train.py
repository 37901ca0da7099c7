# SPDX-License-Identifier: Apache-2.0
"""Trains the page reader, first on short pages, then on pages and prompts of evaluation length.

    python -m training.train --out build/page-reader

After an interruption the same command continues from the last checkpoint. Every batch is new, so
that the accuracies in the log are those on unseen documents. "exact" means that every token of the
answer is the most likely one.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from training.data import IGNORED, Batch, Batches, Encoder, Mixture, normalised
from training.model import Reader, Shape
from training.pages import Layout
from training.tokenizer import build_tokenizer

ALIGNMENT_WEIGHT = 0.3
BLANK_WEIGHT = 0.1  # low, because most patches are blank
HINT_WEIGHT = 0.3
NAME_LAYER = 1  # after this layer, hidden states must contain the keys of patches and questions
VIA_LAYER = 3  # after this layer, the end of a question must contain the start of the value
WARM_UP = 50


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    tokens_per_batch: int
    layout: Layout
    mixture: Mixture
    first_weight: float = 1.0  # loss weight of the first character of an answer: the look-up
    lr: float = 1.0  # fraction of the peak learning rate
    max_documents: int = 64
    restart: bool = False  # start a new cycle of the learning rate, with warm-up and decay


_SHORT = Stage(
    "8x8",
    500,
    17_500,
    Layout(8, (1, 1), (1, 4), (0, 1), (2, 6), (4, 10)),
    Mixture((("lookup", 4, 20), ("hop", 3, 24), ("row", 1, 24), ("dump", 1, 54))),
)
# Two-step look-ups take longest to learn, so there are many such questions, and the first character
# has a higher weight. "Which page" is not asked about single pages, and there are few of them: any
# heading would be correct there, and the model does not easily unlearn that answer. From here on a
# high learning rate would disturb what the model has learned.
_MIDDLE = Stage(
    "12x12",
    250,
    20_000,
    Layout(12, (1, 3), (1, 8), (0, 1), (2, 6), (10, 22), link_share=0.4),
    Mixture((("lookup", 3, 20), ("hop", 6, 24), ("row", 1, 36), ("dump", 1, 94), ("which", 8, 13))),
    first_weight=4.0,
    lr=0.5,
)
_LONG = replace(
    _MIDDLE,
    name="20x20",
    steps=300,
    tokens_per_batch=24_000,
    layout=Layout(num_pages=(2, 4)),
    mixture=Mixture(
        (("lookup", 4, 20), ("hop", 5, 24), ("row", 2, 46), ("dump", 1, 146), ("which", 8, 13))
    ),
)
# Dumps come last, because their answers are long.
_FINAL = replace(
    _LONG,
    name="20x20-final",
    steps=500,
    layout=Layout(),
    mixture=Mixture(
        (("lookup", 3, 20), ("hop", 5, 24), ("row", 2, 46), ("dump", 3, 146), ("which", 8, 13))
    ),
)
# Remaining errors: one dump in ten continues after the last record or skips records.
_DUMPS = replace(
    _FINAL,
    name="20x20-dumps",
    steps=200,
    layout=Layout(num_pages=(2, 4)),
    mixture=Mixture(
        (("lookup", 3, 20), ("hop", 5, 24), ("row", 2, 46), ("dump", 6, 146), ("which", 6, 13))
    ),
    lr=0.25,
    restart=True,
)
STAGES = (_SHORT, _MIDDLE, _LONG, _FINAL, _DUMPS)


def stage_of(step: int, stages: tuple[Stage, ...]) -> tuple[int, int]:
    """The index of the stage of a step, and the number of the step in that stage.

    Raises:
        IndexError: if the step is after the last stage.
    """
    for i, stage in enumerate(stages):
        if step < stage.steps:
            return i, step
        step -= stage.steps
    raise IndexError(step)


def learning_rate(
    step: int, stages: tuple[Stage, ...], peak: float, decay_share: float = 0.25
) -> float:
    """The learning rate of a step: in each cycle a warm-up, a constant part and a linear decay."""
    lr = peak * stages[stage_of(step, stages)[0]].lr
    cycles: list[int] = []
    for stage in stages:
        if stage.restart or not cycles:
            cycles.append(0)
        cycles[-1] += stage.steps
    for total in cycles:
        if step < total:
            return lr * min(1.0, (step + 1) / WARM_UP, (total - step) / (decay_share * total))
        step -= total
    raise IndexError(step)


def build_optimizers(
    model: torch.nn.Module, name: str, lr: float, others: Iterable[torch.nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a model and AdamW for the rest and ``others``, or AdamW for all."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in tables and "lm_head" not in n
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen] + list(others)
    adam = dict(betas=(0.9, 0.95), weight_decay=0.1)
    if name == "adamw":
        return [torch.optim.AdamW([*matrices, *rest], lr=lr, **adam)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, **adam),
    ]


def take_step(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Apply the gradients with this learning rate, and clear them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()


class Log:
    """Lines of JSON in a file and on the screen: means since the last line, and seconds so far.

    Args:
        file: an open text file.
        seconds: that the training took before it was interrupted.
    """

    def __init__(self, file: IO[str], seconds: float = 0.0) -> None:
        self._file, self.seconds = file, seconds
        self._clock = time.perf_counter()
        self._recent: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._recent[key].append(value)

    def write(self, **line: Any) -> None:
        """Write a line that begins with these values."""
        now = time.perf_counter()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        line["seconds"] = round(self.seconds)
        line |= {k: round(sum(v) / len(v), 4) for k, v in self._recent.items()}
        self._recent.clear()
        self._file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


class Trainer:
    """Model, losses and optimizers.

    There are three losses: of the answers; of the alignment between the feature of a patch and the
    embedding of its glyph; and of auxiliary predictions ("hints"). A hint predicts two characters
    from hidden states, with a head that is not part of the model. After a first layer, patches
    predict the number of their page. The first patch of a value and the end of a question predict
    their key with one shared head, so that a look-up can match them. After a second one, the end of
    the question predicts the start of the key's value. Look-ups therefore form in low layers, and a
    second look-up fits into the layers above.
    """

    def __init__(
        self,
        model: Reader,
        encoder: Encoder,
        optimizer: str,
        lr: float,
        hint_layers: tuple[int, int] = (NAME_LAYER, VIA_LAYER),
    ) -> None:
        self.encoder, self.lr = encoder, lr
        self.model, shape = model, model.shape
        self.name_layer, self.via_layer = hint_layers
        self.hints = torch.nn.ModuleList(
            torch.nn.Linear(shape.width, 2 * shape.vocab) for _ in ("number", "key", "via")
        )
        self.optimizers = build_optimizers(self.model, optimizer, lr, self.hints.parameters())
        self.weight = torch.ones(shape.vocab)
        self.weight[encoder.blank] = BLANK_WEIGHT

    def step(self, batch: Batch, lr: float, stage: Stage) -> dict[str, float]:
        model = self.model
        with torch.autocast("cpu", torch.bfloat16):
            features = model.features(normalised(batch.pages.flatten(0, 1)))
            hidden, between = model(
                features.view(batch.pages.shape[0], -1, features.shape[-1]),
                batch.prefix_ids,
                batch.image_positions,
                batch.branch_ids,
                batch.slots,
            )
            asked = batch.labels != IGNORED
            logits = model.lm_head(hidden[asked]).float()
            table = model.model.language_model.embed_tokens.weight
            read = F.linear(features, table).float()
        labels = batch.labels[asked]
        # True at the first token of each answer.
        first = F.pad(~asked, (1, 0), value=True)[:, :-1][asked]
        weight = torch.where(first, stage.first_weight, 1.0)
        answers = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        aligned = F.cross_entropy(read.flatten(0, -2), batch.glyphs.flatten(), self.weight)
        loss = answers + ALIGNMENT_WEIGHT * aligned
        metrics = {"loss": answers.item(), "alignment": aligned.item()}
        hints, accuracy = self._hints(batch, between)
        loss = loss + HINT_WEIGHT * hints
        metrics |= accuracy
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(self.optimizers, lr)
        metrics["norm"] = norm.item()
        glyphs = batch.glyphs.flatten()
        right = (read.flatten(0, -2).argmax(-1) == glyphs)[glyphs != self.encoder.blank]
        metrics["read"] = right.float().mean().item()
        return metrics | self._accuracy(batch, asked, logits.argmax(-1) == labels)

    def _hints(
        self, batch: Batch, between: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        number, key, via = self.hints
        documents, num_pages, cells = batch.glyphs.shape
        low = between[self.name_layer]
        patches = low[:, batch.image_positions].view(documents, num_pages, cells, -1)
        branches = low[:, -batch.branch_ids.shape[1] :]
        printed = batch.glyphs != self.encoder.blank
        printed[..., ::3] = False  # a subset of two thirds is sufficient
        numbers = batch.numbers[:, :, None].expand(-1, -1, cells, -1)[printed]
        named, asked = batch.keys[..., 0] != IGNORED, batch.asked[..., 0] != IGNORED
        high = between[self.via_layer][:, -batch.branch_ids.shape[1] :]
        loss, accuracy = torch.zeros(()), {}
        for name, head, x, label in (
            ("number", number, patches[printed], numbers),
            ("key", key, patches[named], batch.keys[named]),
            ("asked", key, branches[asked], batch.asked[asked]),
            ("via", via, high[asked], batch.via[asked]),
        ):
            if len(label):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = head(x).unflatten(-1, (2, -1)).float()
                loss = loss + F.cross_entropy(logits.flatten(0, 1), label.flatten())
                accuracy[name] = (logits.argmax(-1) == label).all(1).float().mean().item()
        return loss, accuracy

    def _accuracy(self, batch: Batch, asked: torch.Tensor, right: torch.Tensor) -> dict[str, float]:
        correct = torch.ones_like(asked)
        correct[asked] = right
        found: dict[str, list[float]] = defaultdict(list)
        for per_branch, mask, name in zip(
            correct.split(batch.slots, 1),
            asked.split(batch.slots, 1),
            batch.tasks,
            strict=True,
        ):
            present = mask.any(1)
            found[name + "/exact"] += per_branch.all(1)[present].tolist()
            found[name + "/token"] += per_branch[mask].tolist()
        return {k: sum(v) / len(v) for k, v in found.items() if v}

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "hints": self.hints.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def batches(stage: Stage, encoder: Encoder, first: int) -> Iterator[Batch]:
    data = Batches(
        f"train-{stage.name}",
        encoder,
        stage.layout,
        stage.mixture,
        stage.tokens_per_batch,
        first,
        stage.max_documents,
    )
    # A forked worker would come to hold a copy of the trainer's memory.
    worker = dict(num_workers=1, prefetch_factor=4, multiprocessing_context="spawn")
    return iter(DataLoader(data, batch_size=None, **worker))


def save(path: Path, value: object) -> None:
    temporary = path.with_suffix(".new")
    torch.save(value, temporary)
    os.replace(temporary, path)


def page_reader(options: argparse.Namespace) -> Trainer:
    tokenizer = build_tokenizer()
    model = Reader(Shape(vocab=len(tokenizer)))
    return Trainer(model, Encoder(tokenizer), options.optimizer, options.lr)


def train(
    options: argparse.Namespace,
    build: Callable[[argparse.Namespace], Trainer] = page_reader,
    stages: tuple[Stage, ...] = STAGES,
) -> None:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    trainer = build(options)
    total = sum(stage.steps for stage in stages)
    step, seconds = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        trainer.load(saved["trainer"])
        step, seconds = saved["step"], saved["seconds"]
        print(f"continuing from step {step}")
    stream, current = None, -1
    with (out / "log.jsonl").open("a", buffering=1) as file:
        log = Log(file, seconds)
        while step < min(total, options.stop or total):
            index, within = stage_of(step, stages)
            if index != current:
                stream, current = batches(stages[index], trainer.encoder, within), index
            assert stream is not None
            lr = learning_rate(step, stages, options.lr)
            log.add(trainer.step(next(stream), lr, stages[index]))
            step += 1
            if step % options.log_every == 0 or step == total:
                log.write(step=step, stage=stages[index].name, lr=round(lr, 6))
            if step % options.save_every == 0 or step == total:
                save(checkpoint, {"trainer": trainer.state(), "step": step, "seconds": log.seconds})


def argument_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the checkpoint and the log"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--stop", type=int, help="stop after this step")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100)
    return parser


def main(arguments: list[str] | None = None) -> None:
    train(argument_parser(__doc__.splitlines()[0]).parse_args(arguments))


if __name__ == "__main__":
    main()
