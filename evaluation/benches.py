# SPDX-License-Identifier: Apache-2.0
"""The benches: cases, how vLLM is asked them, and how the outputs are scored.

`page-reader` asks the embedded page reader about images of pages, and `hybrid-reader` the same of a
reader with few layers of full attention. `pretrained` asks a pretrained
language model about pages of prose, which reach it as image embeddings. `pretrained-pixels` shows
it the same pages as images, which the word reader reads. `agent` asks the same model in
conversations that get one more page in each turn. `long` asks it for long answers, offline only.
"""

import argparse
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL.Image import Image
from safetensors import safe_open
from torch import Tensor

from evaluation.cases import SPLITS, Case, answer_positions, page_reader_cases
from evaluation.pretrained.agent import agent_cases
from evaluation.pretrained.long_answers import TASKS as LONG_TASKS
from evaluation.pretrained.long_answers import long_answer_cases
from evaluation.pretrained.pixels import TOWER, page_images
from evaluation.pretrained.scores import score
from evaluation.pretrained.tasks import FORMS, PretrainedCase, pretrained_cases
from evaluation.pretrained.tasks import TASKS as PRETRAINED_TASKS
from evaluation.scoring import SCORES
from training.pages import TASKS

if TYPE_CHECKING:  # vLLM reads environment variables when it is imported
    from vllm import LLM, RequestOutput, SamplingParams

MODELS = Path(__file__).parent.parent / "models"
READERS = {name: MODELS / name for name in ("page-reader", "hybrid-reader")}
MODEL = READERS["page-reader"]
BENCHES = (*READERS, "pretrained", "pretrained-pixels", "agent")
# vLLM 0.32's CPU operator rotates LFM2's queries and keys wrongly, because they have three
# dimensions. Its function in PyTorch is right.
HYBRID_ENGINE = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
MAX_IMAGES = 12  # of the longest documents, of 3,000 tokens


class Bench(Protocol):
    """A model with the form of its prompts and the scores of its outputs.

    Cases have a ``cell`` of the result tables, the ``group`` that confidence intervals resample,
    ``answers`` and ``max_tokens``.
    """

    model: str
    engine: dict[str, Any]  # arguments of the engine that the prompts need
    counts_answered: bool  # policies are measured on the cases that the full cache answers

    def outputs(
        self, llm: "LLM", cases: Sequence[Any], sampling: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        """The output for each case."""

    def score(self, case: Any, text: str) -> float:
        """The score of an output, from 0 to 1."""

    def answer(self, case: Any, output: "RequestOutput", llm: "LLM") -> list[int]:
        """Prompt positions of the answer's visual tokens; empty if unknown."""


class ImageBench:
    """Questions about images in the model's chat format: the readers of pages, and `--data`.

    Args:
        model: path or name.
        score: of `SCORES`; None: characters for dumps, exact for all others.
        engine: arguments that the model needs.
    """

    counts_answered = False

    def __init__(
        self, model: str, score: str | None = None, engine: dict[str, Any] | None = None
    ) -> None:
        self.model = model
        self.engine = engine or {}
        self._score = score

    def outputs(
        self, llm: "LLM", cases: Sequence[Case], sampling: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        conversations = [self.conversation(case) for case in cases]
        return llm.chat(
            conversations, sampling, use_tqdm=False, chat_template_content_format="openai"
        )

    @staticmethod
    def conversation(case: Case) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [
            {"type": "image_pil", "image_pil": image} for image in case.load_images()
        ]
        content.append({"type": "text", "text": case.question})
        return [{"role": "user", "content": content}]

    def score(self, case: Case, text: str) -> float:
        name = self._score or ("characters" if case.task == "dump" else "exact")
        return SCORES[name](text, case.answers)

    def answer(self, case: Case, output: "RequestOutput", llm: "LLM") -> list[int]:
        image_token = getattr(llm.model_config.hf_config, "image_token_index", None)
        if not case.answer_cells or image_token is None:
            return []
        num_images = len(case.load_images())
        return answer_positions(
            case.answer_cells, output.prompt_token_ids or [], image_token, num_images
        )


def page_tokens(case: PretrainedCase) -> int:
    """Tokens of each page of a case; all its pages are equally long."""
    return len(case.pages[0])


def texts_between(case: PretrainedCase) -> Sequence[tuple[int, ...]]:
    """Token ids after each page but the last one."""
    return case.between or [()] * (len(case.pages) - 1)


class PretrainedBench:
    """Pages of text as image embeddings: rows of the language model's own embedding table.

    Args:
        model: checkpoint that `evaluation.pretrained.build_model` wrote.
    """

    counts_answered = True  # a small model answers some questions wrong, with or without eviction

    def __init__(self, model: Path) -> None:
        self.model = str(model)
        self.engine: dict[str, Any] = {"enable_mm_embeds": True}
        self._image_token = json.loads((model / "config.json").read_text())["image_token_index"]
        with safe_open(model / "model.safetensors", "pt") as weights:
            self._table = weights.get_tensor("language_model.model.embed_tokens.weight")
        # The cases of a document follow each other.
        self._embeddings = functools.lru_cache(maxsize=16)(self._embed)

    def _embed(self, page: tuple[int, ...]) -> Tensor:
        """Embeddings of a page's tokens, [tokens, hidden size]."""
        return self._table[list(page)]

    def prompt(self, case: PretrainedCase) -> dict[str, Any]:
        """Token ids with one placeholder for each page, and the pages' embeddings."""
        ids = [*case.before, self._image_token]
        for text in texts_between(case):
            ids += [*text, self._image_token]
        return {
            "prompt_token_ids": [*ids, *case.after],
            "multi_modal_data": {"image": [self._embeddings(page) for page in case.pages]},
        }

    def outputs(
        self, llm: "LLM", cases: Sequence[PretrainedCase], sampling: Sequence["SamplingParams"]
    ) -> list["RequestOutput"]:
        """The output for each case; fastest if cases with pages of equal lengths are adjacent."""
        # vLLM takes only pages of equal lengths in one step.
        result: list[RequestOutput] = []
        jobs = zip(cases, sampling, strict=True)
        for _, group in itertools.groupby(jobs, lambda job: page_tokens(job[0])):
            some, params = zip(*group, strict=True)
            result += llm.generate([self.prompt(c) for c in some], params, use_tqdm=False)
        return result

    def score(self, case: PretrainedCase, text: str) -> float:
        return score(case.task, case.form, text, case.answers)

    def answer(self, case: PretrainedCase, output: "RequestOutput", llm: "LLM") -> list[int]:
        first = [len(case.before)]
        for text in texts_between(case):
            first.append(first[-1] + page_tokens(case) + len(text))
        return [first[page] + index for page, index in case.answer_tokens]


class PixelBench(PretrainedBench):
    """The same pages as images, which a vision tower reads: as many images as the tokens fill.

    Args:
        model: checkpoint that `training.words.export.join` wrote.
    """

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer  # slow to import

        super().__init__(model)
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self.engine = {"limit_mm_per_prompt": {"image": MAX_IMAGES}}
        self._images = functools.lru_cache(maxsize=16)(self._render)

    def _render(self, pages: tuple[tuple[int, ...], ...]) -> list[Image]:
        return page_images(pages, self._tokenizer)

    def prompt(self, case: PretrainedCase) -> dict[str, Any]:
        """Token ids with one placeholder for each image, and the images."""
        images = self._images(case.pages)
        placeholders = [self._image_token] * len(images)
        return {
            "prompt_token_ids": [*case.before, *placeholders, *case.after],
            "multi_modal_data": {"image": images},
        }


def add_case_arguments(
    parser: argparse.ArgumentParser, split: str, benches: Sequence[str] = BENCHES
) -> None:
    """Arguments that choose a bench and its cases.

    Args:
        parser: gets the arguments.
        split: default of ``--split``.
        benches: choices of ``--bench``; the first is the default.
    """
    add = parser.add_argument
    add("--bench", choices=benches, default=benches[0])
    add("--tasks", nargs="+", help=f"default: all; {_names(TASKS)}, or {_names(PRETRAINED_TASKS)}")
    add("--forms", nargs="+", default=list(FORMS), help="prompts of the pretrained bench")
    add(
        "--samples",
        type=int,
        help="cases per cell; default: 500; pretrained 300; agent 100",
    )
    add("--split", choices=SPLITS, default=split, help="tune: to choose settings; test: to report")


def _names(tasks: Sequence[str]) -> str:
    return " ".join(tasks)


def bench_cases(options: argparse.Namespace) -> list[Any]:
    """The cases that the arguments of `add_case_arguments` choose.

    Raises:
        ValueError: for unknown tasks or forms.
        FileNotFoundError: if the pretrained model cannot be built.
    """
    if options.bench in READERS:
        return page_reader_cases(options.split, options.tasks or TASKS, options.samples or 500)
    from transformers import AutoTokenizer  # slow to import

    tokenizer = AutoTokenizer.from_pretrained(pretrained_model())
    if options.bench == "agent":
        return agent_cases(tokenizer, options.split, options.samples or 100)
    if options.bench == "long":
        tasks, count = options.tasks or LONG_TASKS, options.samples or 100
        return sorted(
            long_answer_cases(tokenizer, options.split, tasks, options.forms, count),
            key=page_tokens,
        )
    tasks, count = options.tasks or PRETRAINED_TASKS, options.samples or 300
    cases = pretrained_cases(tokenizer, options.split, tasks, options.forms, count)
    return sorted(cases, key=page_tokens)


@functools.cache
def pretrained_model() -> Path:
    """The checkpoint of the pretrained model, which is built if necessary.

    Raises:
        FileNotFoundError: if the package with its weights is not installed.
    """
    from evaluation.pretrained.build_model import build  # slow to import

    return build()


@functools.cache
def pixel_model() -> Path:
    """The checkpoint of the pretrained model with the word reader, which is built if necessary.

    Raises:
        FileNotFoundError: if the package with the language model is not installed.
    """
    from training.words.export import join  # slow to import

    model = pretrained_model()
    out = model.with_name("pretrained-pixels")
    join(TOWER, model, out)
    return out
