# SPDX-License-Identifier: Apache-2.0
"""The shipped word reader reads pages, and vLLM answers from their images."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from evaluation import accuracy
from evaluation.benches import PixelBench
from evaluation.pretrained import build_model
from evaluation.pretrained.pixels import TOWER, page_images
from evaluation.pretrained.reading import read_pages
from evaluation.pretrained.tasks import encoder, generate, pretrained_cases
from testing.engine import greedy, running_llm
from training.words.data import drawable_tokens
from training.words.export import join, load
from training.words.train import Targets, embedding_table

MAX_BYTES = 16 << 20


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model.build(tmp_path_factory.mktemp("pretrained"))


def test_the_checkpoint_is_small_and_without_language_model() -> None:
    assert sum(file.stat().st_size for file in TOWER.iterdir()) < MAX_BYTES
    names = load(TOWER).state_dict()
    assert all(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in names)


def test_words_are_read(language_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    targets = Targets(embedding_table(language_model), drawable_tokens(tokenizer))
    pages = generate(encoder(tokenizer), "test", 0).pages
    reading = read_pages(load(TOWER), targets, pages, page_images(pages, tokenizer))
    assert len(reading.tokens) == sum(map(len, pages)) >= 600
    assert reading.accuracy >= 0.98
    assert reading.errors.mean() < 0.2


def test_vllm_answers_from_pixels(language_model: Path, tmp_path: Path) -> None:
    """The visual tokens are where the bench expects them, and most answers are right."""
    join(TOWER, language_model, tmp_path)
    bench = PixelBench(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    cases = pretrained_cases(tokenizer, "tune", ["fact", "which"], ["completion"], 8)
    parser = accuracy._parser()
    parser.set_defaults(**accuracy.PRETRAINED_DEFAULTS)
    options = parser.parse_args(["--quiet"])
    with running_llm(**accuracy._engine_arguments(bench, None, options)) as llm:
        outputs = bench.outputs(llm, cases, [greedy(8, logprobs=None)] * len(cases))
        places = [bench.answer(case, o, llm) for case, o in zip(cases, outputs, strict=True)]
    for positions, output in zip(places, outputs, strict=True):
        assert {output.prompt_token_ids[i] for i in positions} == {bench._image_token}
    scores = [bench.score(case, o.outputs[0].text) for case, o in zip(cases, outputs, strict=True)]
    assert sum(scores) >= 0.5 * len(scores), scores
