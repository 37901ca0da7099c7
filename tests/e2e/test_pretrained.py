# SPDX-License-Identifier: Apache-2.0
"""The pretrained language model behind vLLM: the plain model's outputs, and eviction."""

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from evaluation import accuracy, offline_eviction
from evaluation.benches import PretrainedBench
from evaluation.offline import OfflinePretrained
from evaluation.pretrained import build_model
from evaluation.pretrained.tasks import PretrainedCase, pretrained_cases
from testing.engine import greedy, held_positions, read_trace, running_llm, token_ids
from vl_cache_vllm.config import KVCompressConfig

CASES = 10
PREFIX = "language_model."


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> PretrainedBench:
    return PretrainedBench(build_model.build(tmp_path_factory.mktemp("pretrained")))


@pytest.fixture(scope="module")
def cases(bench: PretrainedBench) -> list[PretrainedCase]:
    """Facts and needles of one document, which share its prefill."""
    tokenizer = AutoTokenizer.from_pretrained(bench.model)
    found = pretrained_cases(tokenizer, "tune", ["fact", "needle"], ["completion", "chat"], 4)
    return [case for case in found if case.group == found[0].group][:CASES]


def options(**changes: object) -> argparse.Namespace:
    parser = accuracy._parser()
    parser.set_defaults(**accuracy.PRETRAINED_DEFAULTS)
    return argparse.Namespace(**{**vars(parser.parse_args(["--quiet"])), **changes})


def plain_model(folder: Path) -> LlamaForCausalLM:
    """The language model without vision, in float32."""
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder).text_config).float()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)}
    )
    return model


@torch.no_grad()
def test_image_embeddings_are_the_text(bench: PretrainedBench, cases: list[PretrainedCase]) -> None:
    """Without eviction, greedy outputs are those of the plain model for the same tokens."""
    assert len(cases) >= 6
    with running_llm(**accuracy._engine_arguments(bench, None, options(dtype="float32"))) as llm:
        found = bench.outputs(llm, cases, [greedy(8, logprobs=None)] * len(cases))
    plain = plain_model(Path(bench.model))
    read: dict[tuple[int, ...], object] = {}
    for case, output in zip(cases, found, strict=True):
        text = [*case.before, *(token for page in case.pages for token in page)]
        if case.before not in read:
            read[case.before] = plain(torch.tensor([text]), use_cache=True).past_key_values
        tokens = token_ids(output)
        rest = torch.tensor([[*case.after, *tokens[:-1]]])
        logits = plain(rest, past_key_values=copy.deepcopy(read[case.before])).logits[0]
        assert logits[len(case.after) - 1 :].argmax(-1).tolist() == tokens


def test_the_offline_sweep_keeps_and_answers_like_vllm(
    bench: PretrainedBench, cases: list[PretrainedCase], tmp_path: Path
) -> None:
    """A fifth of the cache; of every other case after some tokens of the answer."""
    trace = tmp_path / "trace"
    settings = {
        "policy": "vlcache-plus",
        "budget": 0.2,
        "trace": {"path": str(trace), "positions": True},
    }
    arguments = accuracy._engine_arguments(bench, settings, options(dtype="float32"))
    sampling = [greedy(case.max_tokens, None) for case in cases]
    begun = [4 * (number % 2) for number in range(len(cases))]
    for params, after in zip(sampling, begun, strict=True):
        params.extra_args = {"kv_policy_options": {"evict_after": after}}
    with running_llm(**arguments) as llm:
        found = bench.outputs(llm, cases, sampling)
    records = {key.split("-")[0]: record for key, record in read_trace(trace).items()}
    reader = OfflinePretrained(Path(bench.model))
    config = KVCompressConfig.from_dict({"policy": "vlcache-plus", "budget": 0.2})
    assert config is not None
    read = {case.before: reader.read(case) for case in {c.before: c for c in cases}.values()}
    alike = counted = 0
    for case, output, after in zip(cases, found, begun, strict=True):
        if len(token_ids(output)) <= after:
            assert output.request_id not in records
            continue
        record = records[output.request_id]
        text = [*case.before, *(token for page in case.pages for token in page), *case.after]
        answer = reader.tokenizer.decode([text[i] for i in bench.answer(case, output, llm)])
        assert case.answers[0] in answer
        prompt = reader.ask(read[case.before], case)
        assert record["kept_blocks"] == math.ceil(0.2 * math.ceil(prompt.tokens / 32))
        if after:
            if (
                token_ids(output)[:after] != prompt.expected[:after]
                or len(prompt.expected) <= after
            ):
                continue
            prompt = reader.begin(prompt, after)
        positions = offline_eviction.evict(prompt, config, 32)
        assert positions is not None
        for layer, expected in zip(positions, held_positions(record), strict=True):
            for head, kept in zip(layer.tolist(), expected, strict=True):
                # Rounding decides between scores that are nearly equal.
                assert len(head) == len(kept)
                assert len({*head} - {*kept}) <= 0.02 * len(head)
        if prompt.expected:
            correct = reader.correct(prompt, offline_eviction.kept(prompt.cache, positions))
            counted += 1
            alike += bool(correct.all()) == (
                token_ids(output)[after : after + len(prompt.expected)] == prompt.expected
            )
    assert counted >= 0.6 * len(cases)
    assert alike >= counted - 1
