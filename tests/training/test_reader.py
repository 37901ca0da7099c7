# SPDX-License-Identifier: Apache-2.0
"""The fast training model is transformers' LLaVA, and batches are the prompts that users send."""

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.training.comparison import assert_branches_equal, pictures
from training.data import IGNORED, Encoder, Mixture, collate, normalised, patches
from training.export import export
from training.model import Reader, Shape, branch_mask
from training.pages import TASKS, TEMPLATES, VALUE_CHARACTERS, Document, Layout, generate
from training.render import render
from training.tokenizer import build_tokenizer
from training.train import STAGES, Trainer, learning_rate, stage_of

TOKENIZER = build_tokenizer()
ENCODER = Encoder(TOKENIZER)
SHAPE = Shape(vocab=len(TOKENIZER), layers=5, vision_layers=1)
MIXTURE = Mixture((("lookup", 2, 20), ("row", 1, 46), ("which", 2, 13)))
TWO_PAGES = Layout(num_pages=(2, 2), num_rows=(1, 1))


def batch_of(documents: list[Document]):
    return collate(documents, ENCODER, MIXTURE, random.Random(0))


def test_each_glyph_is_a_token() -> None:
    text = VALUE_CHARACTERS * 2
    assert len(TOKENIZER(text)["input_ids"]) == len(text)
    for templates in TEMPLATES.values():
        for template in templates:
            ids = TOKENIZER(template.format("K7"))["input_ids"]
            assert TOKENIZER.decode(ids) == template.format("K7")
            assert {"K", "7"} < set(TOKENIZER.convert_ids_to_tokens(ids))
            assert len(ids) <= 16


def test_chat_template_is_the_training_prompt(tmp_path: Path) -> None:
    export(Reader(SHAPE).state_dict(), SHAPE, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which page has K7?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == "<|user|><image>\n<image>\nWhich page has K7?<|assistant|>"
    prefix, positions = ENCODER.prefix(2, 20)
    inputs = processor(text=text, images=[Image.new("RGB", (280, 280))] * 2, return_tensors="pt")[
        "input_ids"
    ][0]
    assert inputs[: len(prefix)].tolist() == prefix.tolist()
    assert len(positions) == 800
    assert inputs[len(prefix) :].tolist()[-1] == ENCODER.assistant


def test_equals_transformers(tmp_path: Path) -> None:
    """Logits of each branch are those of the single question, asked with real pictures."""
    torch.manual_seed(0)
    model = Reader(SHAPE).eval()
    export(model.state_dict(), SHAPE, tmp_path, torch.float32)
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path)

    document = generate("unit", 0, TWO_PAGES)
    batch = batch_of([document])
    pixels = processor.image_processor(pictures(document), return_tensors="pt")["pixel_values"]
    assert_branches_equal(
        model, ENCODER, batch, lambda ids: loaded(input_ids=ids, pixel_values=pixels).logits
    )


def test_labels_are_the_answers() -> None:
    document = generate("unit", 1, TWO_PAGES)
    batch = batch_of([document])
    answers = {q.answer for t in TASKS for q in document.questions(t, random.Random(0), 99)}
    start, seen = 0, 0
    for length in batch.slots:
        labels = batch.labels[0, start : start + length]
        labels = labels[labels != IGNORED]
        if len(labels):
            assert labels[-1] == ENCODER.end
            assert TOKENIZER.decode(labels[:-1]) in answers
            seen += 1
        start += length
    assert seen == 5


def test_glyph_targets() -> None:
    page = generate("unit", 2, TWO_PAGES).pages[0]
    text = TOKENIZER.decode(ENCODER.glyphs(page))
    expected = "".join(
        c if part == 0 else " " for c, part in zip(page.text, page.part, strict=True)
    )
    assert text == expected


def test_patches_are_a_convolution() -> None:
    page = generate("unit", 0, TWO_PAGES).pages[0]
    image = render(page, 0)
    torch.manual_seed(0)
    embeddings = Reader(SHAPE).model.vision_tower["vision_model"].embeddings
    x = normalised(torch.from_numpy(patches(image)))
    direct = torch.nn.functional.linear(x, embeddings.patch_embedding.weight.flatten(1))
    pixels = normalised(torch.from_numpy(image)).permute(2, 0, 1)[None]
    conv = embeddings.patch_embedding(pixels)[0].permute(1, 2, 0)
    torch.testing.assert_close(direct, conv, atol=1e-4, rtol=1e-4)


def test_branches_see_only_themselves() -> None:
    mask = branch_mask((2, 3))
    seen = (mask == 0).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("stage", STAGES, ids=lambda s: s.name)
def test_slots_hold_the_longest_questions(stage) -> None:
    """A slot that cuts an answer would teach the model to stop early."""
    longest: dict[str, int] = {}
    for i in range(150):
        document = generate("slots", i, stage.layout)
        for task, _, _ in stage.mixture.slots:
            for question in document.questions(task, random.Random(i), 4):
                asked, answer = ENCODER.question(question)
                longest[task] = max(longest.get(task, 0), len(asked) + len(answer) - 1)
    for task, _, length in stage.mixture.slots:
        assert longest[task] <= length


def test_hints_name_the_value_and_what_is_asked() -> None:
    document = generate("hints", 0, Layout(num_pages=(3, 3)))
    mixture = Mixture((("lookup", 3, 20), ("dump", 1, 146)))
    batch = collate([document], ENCODER, mixture, random.Random(0))
    glyph = {ENCODER.characters(chr(c))[0]: chr(c) for c in range(32, 127)}

    def words(labels: torch.Tensor) -> list[str]:
        return ["".join(glyph[i] for i in row) for row in labels[labels[:, 0] != IGNORED].tolist()]

    records = [sorted(page.records, key=lambda r: r.start) for page in document.pages]
    assert words(batch.keys.flatten(0, 2)) == [r.key for page in records for r in page]
    values = {r.key: r.value for page in records for r in page}
    # A dump names a page, not a key.
    assert [values[key][:2] for key in words(batch.asked[0])] == words(batch.via[0])
    assert len(words(batch.via[0])) == 3
    # Both stand where the answer's first character is to be said.
    asked = (batch.asked[0, :, 0] != IGNORED).nonzero().squeeze(1)
    first = [glyph[i] for i in batch.labels[0, asked].tolist()]
    assert first == [value[0] for value in words(batch.via[0])]


def test_training_resumes_where_it_stopped() -> None:
    torch.manual_seed(0)
    layout = STAGES[0].layout
    mixture = Mixture((("lookup", 2, 20),))
    documents = [[generate("resume", 4 * i + j, layout) for j in range(4)] for i in range(4)]
    batches = [collate(d, ENCODER, mixture, random.Random(0)) for d in documents]
    one = Trainer(Reader(SHAPE), ENCODER, "muon", 1e-3)
    for batch in batches[:2]:
        one.step(batch, 1e-3, STAGES[-1])
    two = Trainer(Reader(SHAPE), ENCODER, "muon", 1e-3)
    two.load(copy.deepcopy(one.state()))
    for trainer in (one, two):
        for batch in batches[2:]:
            trainer.step(batch, 1e-3, STAGES[-1])
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_schedule() -> None:
    total = sum(stage.steps for stage in STAGES)
    assert stage_of(0, STAGES) == (0, 0)
    assert stage_of(STAGES[0].steps, STAGES) == (1, 0)
    assert stage_of(total - 1, STAGES) == (len(STAGES) - 1, STAGES[-1].steps - 1)
    with pytest.raises(IndexError):
        stage_of(total, STAGES)
    rates = [learning_rate(step, STAGES, 1.0) for step in range(total)]
    assert max(rates) == 1.0 and 0 < rates[-1] < 0.01 and rates[0] < 0.05
    with pytest.raises(IndexError):
        learning_rate(total, STAGES, 1.0)


def test_a_restart_is_a_cycle_of_its_own() -> None:
    first, last = (dataclasses.replace(STAGES[0], steps=400, lr=lr) for lr in (1.0, 0.5))
    stages = (first, dataclasses.replace(last, restart=True))
    rates = [learning_rate(step, stages, 1.0) for step in range(800)]
    assert rates[:400] == [learning_rate(step, (first,), 1.0) for step in range(400)]
    assert rates[400:] == [rate / 2 for rate in rates[:400]]
