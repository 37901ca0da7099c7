# SPDX-License-Identifier: Apache-2.0
"""Training's unrolled passes of the EAGLE-3 head are those of a drafter, token by token."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.data import IGNORED
from training.drafts.export import export
from training.drafts.model import AUX_LAYERS, NUM_PASSES, DraftHead
from training.drafts.train import READER, draft_labels, load_reader
from training.model import Branches, Shape, rotary, rotate

SHAPE = Shape(vocab=50, width=24, heads=4, kv_heads=2, head_size=8, mlp=40)
PREFIX, SLOTS = 7, (6, 5)


def drafted(head: DraftHead, embedded: torch.Tensor, hidden: torch.Tensor, last: int) -> list:
    """Logits of each pass after the position ``last`` of one sequence, a token at a time.

    Args:
        head: the head.
        embedded: of the next tokens, ``[tokens, width]``.
        hidden: the head's inputs from the reader, ``[tokens, width]``.
        last: position of the last token that the reader has seen.
    """
    layer, attention = head.layers[0], head.layers[0].self_attn
    cos, sin = rotary(torch.arange(len(embedded)), SHAPE.head_size, SHAPE.rope_theta)
    states, found = [*hidden[: last + 1]], []
    for number in range(NUM_PASSES):
        count = last + number + 1
        x = layer.inputs(embedded[:count], torch.stack(states))
        q, k, v = (
            attention.split(project(x)[None])[0]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = (rotate(part, cos[:count], sin[:count]) for part in (q, k))
        k, v = (part.repeat_interleave(attention.group, 0) for part in (k, v))
        logits = torch.einsum("hd,hkd->hk", q[:, -1], k) * SHAPE.head_size**-0.5
        attended = torch.einsum("hk,hkd->hd", logits.softmax(-1), v)
        out = layer.finish(states[-1][None, None], attended[None, :, None])[0, 0]
        found.append(head.lm_head(head.norm(out)))
        states.append(out)
    return found


def test_unrolled_passes() -> None:
    torch.manual_seed(0)
    head, tokens = DraftHead(SHAPE), PREFIX + sum(SLOTS)
    embedded = torch.randn(1, tokens, SHAPE.width)
    aux = [torch.randn(1, tokens, SHAPE.width) for _ in AUX_LAYERS]
    with torch.no_grad():
        logits = head(embedded, aux, Branches.after(PREFIX, SLOTS, SHAPE))
        hidden = head.fc(torch.cat(aux, -1))[0]
        start = 0
        for length in SLOTS:
            branch = [*range(PREFIX), *range(PREFIX + start, PREFIX + start + length)]
            own = embedded[0, branch], hidden[branch]
            for index in range(length - NUM_PASSES + 1):
                expected = drafted(head, *own, PREFIX + index)
                for number, one in enumerate(expected):
                    found = logits[number][0, start + index + number]
                    torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)
            start += length


def test_labels_are_the_tokens_after_the_next_in_answers() -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, 7, 8, IGNORED]])
    first, second, third = (one.tolist()[0] for one in draft_labels(labels))
    none = IGNORED
    assert first == [none, none, 6, 7, 8, none, none]
    assert second == [none, none, none, 7, 8, none, none]
    assert third == [none, none, none, none, 8, none, none]


def test_the_head_starts_as_the_readers_last_layer() -> None:
    reader = load_reader()
    head = DraftHead(reader.shape)
    head.start_as_last_layer(reader)
    assert torch.equal(head.lm_head.weight, reader.lm_head.weight)
    assert head.fc.weight[:, -reader.shape.width :].diagonal().mean() > 0.9


def test_a_checkpoint_has_the_readers_shape(tmp_path: Path) -> None:
    shape = load_reader().shape
    export(DraftHead(shape).state_dict(), shape, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    reader = json.loads((READER / "config.json").read_text())["text_config"]
    same = ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    assert [config[name] for name in same] == [reader[name] for name in same]
    assert config["eagle_aux_hidden_state_layer_ids"] == [*AUX_LAYERS]
    weights = load_file(tmp_path / "model.safetensors")
    assert "embed_tokens.weight" not in weights and "layers.0.self_attn.q_proj.weight" in weights
