# SPDX-License-Identifier: Apache-2.0
"""The model matrix: its oracle, its comparison, and the table of docs/models.md."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.models import ModelRegistry

from checks import matrix
from testing import model_zoo
from testing.attention_recorder import Record
from testing.oracle import Settings, decide_prompt, with_tail

ROOT = Path(__file__).parents[2]
PROMPT_TOKENS, FIRST = 330, 300


def made_up(
    gain: float, window: int | None = None, num_kv_heads: int = 2, softcap: float = 0.0
) -> Record:
    """A record of a prompt and four generated tokens, without outputs."""
    generator = torch.Generator().manual_seed(round(1000 * gain))

    def steps(num_heads: int) -> list[torch.Tensor]:
        tokens = torch.randn(PROMPT_TOKENS + 4, num_heads, 16, generator=generator)
        return list(tokens.split([PROMPT_TOKENS, 1, 1, 1, 1]))

    return Record(
        gain * 16**-0.5, softcap, window, steps(4), steps(num_kv_heads), steps(num_kv_heads)
    )


def served(layers: list[Record]) -> dict[str, Any]:
    """Set the expected outputs of the layers and return the expected trace."""
    full = [layer for layer in layers if layer.window is None]
    attention = [layer.logits(FIRST, PROMPT_TOKENS).softmax(dim=-1) for layer in full]
    settings = Settings(matrix.BUDGET, matrix.BLOCK_SIZE)
    decision = decide_prompt(attention, full[0].num_kv_heads, settings)
    kept = iter(with_tail(decision.kept_positions, PROMPT_TOKENS, settings.block_size))
    for layer in layers:
        evicted = None if layer.window else next(kept)
        layer.output = [layer.expected(PROMPT_TOKENS, evicted).float()]
    return {**dataclasses.asdict(decision), "kept_blocks": 3, "block_size": settings.block_size}


@pytest.mark.parametrize("window", [None, 20])
def test_expected_is_attention(window: int | None) -> None:
    layer = made_up(2.0, window)
    query, key, value = (
        torch.cat(part).double().transpose(0, 1) for part in (layer.query, layer.key, layer.value)
    )
    tokens = query.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask &= mask.triu(-(window or tokens) + 1)
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=layer.scale, enable_gqa=True
    )
    torch.testing.assert_close(layer.expected(PROMPT_TOKENS).transpose(0, 1), expected)


def test_tokens_after_the_prompt_attend_to_kept_tokens() -> None:
    layer = made_up(2.0)
    kept = [[0, 5, 329], [7]]
    whole, expected = layer.expected(PROMPT_TOKENS), layer.expected(PROMPT_TOKENS, kept)
    torch.testing.assert_close(expected[:PROMPT_TOKENS], whole[:PROMPT_TOKENS])
    key, value = torch.cat(layer.key).double(), torch.cat(layer.value).double()
    for head in range(4):
        positions = [*kept[head // 2], PROMPT_TOKENS, PROMPT_TOKENS + 1]
        query = torch.cat(layer.query).double()[PROMPT_TOKENS + 1, head]
        weights = (key[positions, head // 2] @ query * layer.scale).softmax(dim=0)
        torch.testing.assert_close(
            expected[PROMPT_TOKENS + 1, head], weights @ value[positions, head // 2]
        )


def test_softcap() -> None:
    capped, plain = (made_up(2.0, softcap=cap).logits(50, 99) for cap in (0.5, 0.0))
    seen = plain.isfinite()
    torch.testing.assert_close(capped[seen], 0.5 * torch.tanh(plain[seen] / 0.5))
    assert (capped[~seen] == -torch.inf).all()


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_the_expected_outputs_are_exact(num_kv_heads: int) -> None:
    layers = [made_up(1.0, 100, num_kv_heads)]
    layers += [made_up(gain, None, num_kv_heads) for gain in (1.0, 4.0)]
    trace = served(layers)
    row = matrix.compare(layers, PROMPT_TOKENS, FIRST, trace)
    assert row is not None
    assert row["windows"] == [100, None, None]
    assert row["observed_tokens"] == 30
    assert row["distance"] < 1e-6 < row["distance_of_whole_cache"]


def test_every_difference_is_detected() -> None:
    layers = [made_up(1.0), made_up(4.0)]
    right = served(layers)

    def message(trace: dict[str, Any], first: int = FIRST) -> str:
        with pytest.raises(AssertionError) as raised:
            matrix.compare(layers, PROMPT_TOKENS, first, trace)
        return str(raised.value)

    assert "densities differ" in message(right, first=FIRST + 1)
    assert "budgets differ" in message(right | {"kept_tokens": [96, 96]})
    other = json.loads(json.dumps(right["kept_positions"]))
    other[1][0][0] = next(p for p in range(PROMPT_TOKENS) if p not in other[1][0])
    assert "positions differ" in message(right | {"kept_positions": other})
    layers[1].output = [layers[1].expected(PROMPT_TOKENS).float()]
    assert "outputs differ" in message(right)


def test_a_request_with_a_tie_is_not_compared() -> None:
    layers = [made_up(1.0), made_up(4.0)]
    trace = served(layers)
    for layer in layers:
        layer.query = [torch.zeros_like(query) for query in layer.query]  # uniform attention
    assert matrix.compare(layers, PROMPT_TOKENS, FIRST, trace) is None


@pytest.mark.parametrize("kind", model_zoo.KINDS)
def test_prompts(kind: str) -> None:
    prompt = model_zoo.prompt_for(kind, "What?", model_zoo.max_images(kind))
    after = model_zoo.text_after_images(kind, "What?")
    assert prompt.endswith(after) and after.count("What?") == 1


def test_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["nonsense"])
    assert "unknown kind(s) nonsense; known: llava," in capsys.readouterr().err


@pytest.mark.slow
def test_exact_through_vllm() -> None:
    row = matrix.run("phi4-siglip")
    assert row["result"] == "exact", row["reason"]
    assert row["architecture"] in ModelRegistry.get_supported_archs()
    assert len(row["requests"]) == 2


@pytest.mark.slow
def test_refused_through_vllm() -> None:
    row = matrix.run("llama4")
    assert (row["result"], row["requests"]) == ("refused", [])
    assert row["reason"] == "layers that are not full attention: chunked_attention"


def test_rows_of_other_kinds_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    old = {kind: {"result": "old"} for kind in ("qwen3-vl", "llava", "gone")}
    matrix.write_report(path, "checks.matrix", (), results=old)
    rows = matrix.merged(path, {"qwen3-vl": {"result": "new"}, "gemma4": {"result": "new"}})
    assert list(rows) == ["llava", "qwen3-vl", "gemma4"]
    assert [row["result"] for row in rows.values()] == ["old", "new", "new"]
    report = json.loads(path.read_text())
    report["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="was measured with torch"):
        matrix.merged(path, {})


@pytest.mark.parametrize(("logits", "rounds"), [(5.0, False), (5.0 * 512**0.5, True)])
def test_rounding_is_a_matter_of_the_logits(logits: float, rounds: bool) -> None:
    """Attention in float32 against float64 over heads of 512, without a kernel of ours or vLLM's.

    Where the scale does not divide by the root of the head size, as in Gemma 4 with norms that
    nobody trained, logits are so large that float32 alone goes beyond what the matrix allows.
    """
    tokens = torch.randn(3, 1, PROMPT_TOKENS, 512, generator=torch.Generator().manual_seed(0))
    exact, single = (
        F.scaled_dot_product_attention(*tokens.to(dtype), is_causal=True, scale=logits / 512**0.5)
        for dtype in (torch.float64, torch.float32)
    )
    distance = float((single - exact).abs().max() / exact.abs().max())
    assert (distance > matrix.MAX_DISTANCE["float32"]) == rounds


def test_hanging_processes_are_killed(tmp_path: Path) -> None:
    result = matrix._in_a_process(matrix.baseline, "idefics3", tmp_path, time_limit=0.01)
    assert result == matrix.KindResult("failed", "no answer after 0.01 s")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(matrix.RESULTS.read_text())["results"]


def test_the_document_has_the_committed_table(results: dict[str, Any]) -> None:
    assert matrix.markdown(results) in (ROOT / "docs/models.md").read_text()


def test_the_document_lists_the_stand_ins() -> None:
    text = (ROOT / "docs/models.md").read_text()
    assert [k for k in model_zoo.KINDS if model_zoo.has_code(k) and f"`{k}`" not in text] == []


def test_the_committed_results(results: dict[str, Any]) -> None:
    assert list(results) == list(model_zoo.KINDS)
    by_result: dict[str, list[str]] = {}
    for kind, row in results.items():
        by_result.setdefault(row["result"], []).append(kind)
    assert set(by_result) <= {"exact", "refused", "not served"}
    architectures = {results[kind]["architecture"] for kind in by_result["exact"]}
    assert len(architectures) >= 12
    text = (ROOT / "docs/models.md").read_text()
    assert f"{len(architectures)} architectures are supported, each exact" in text
    for kind in by_result["exact"]:
        requests, dtype = results[kind]["requests"], model_zoo.dtype(kind)
        assert len(requests) == model_zoo.max_images(kind)
        for request in requests:
            assert request["kept_blocks"] < request["prompt_blocks"]
            assert len(set(request["kept_tokens"])) > 1
            assert request["distance"] < matrix.MAX_DISTANCE[dtype]
            assert request["distance_of_whole_cache"] > matrix.MIN_EFFECT[dtype]
            if dtype == "float32":
                assert request["distance"] < 1e-4 * request["distance_of_whole_cache"]
