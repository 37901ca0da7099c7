# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's vision-language architectures are served with eviction, and whether exactly so.

    python -m checks.matrix [--json [FILE]] [--markdown] [KIND ...]

Each kind of `testing.model_zoo` runs in a process of its own: a tiny model with random weights
reads prompts with images, is evicted, decodes, and is compared with `testing.attention_recorder`.
docs/models.md says what "exact" means.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testing import model_zoo
from testing.results import write_report

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from testing.attention_recorder import Record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "matrix.json"

BUDGET, BLOCK_SIZE, NUM_TOKENS = 0.25, 32, 8
QUESTION = (
    "Describe everything that you can see in the picture, from left to right: who is there, what "
    "they do, and what will happen next? Answer in a sentence or two."
)
TIME_LIMIT = 300  # seconds for one process

# Attention in float32 against float64, relative to a layer's largest output.
MAX_DISTANCE = 1e-5
MAX_DENSITY_DISTANCE = 1e-4
# Ties within float32 rounding have two right answers. Requests that contain one decide nothing.
MIN_SCORE_GAP = 2e-5
# A run says something if eviction changes what attention gives back by far more than rounding.
MIN_EFFECT = 1e-2


@dataclass(frozen=True)
class Outcome:
    """What became of one kind; ``result`` is one of

    exact
        Served, evicted, and all as the oracle says.
    refused
        The product refuses it at start-up; stock vLLM serves it.
    not served
        vLLM itself does not serve it here.
    wrong
        Served and evicted, but not as the oracle says.
    failed
        Stock vLLM serves it; with eviction it crashes or hangs.
    """

    result: str
    reason: str | None = None
    requests: Sequence[Mapping[str, Any]] = ()


# --------------------------------------------------------------------------------------------------
# In a process of its own


def evicted(kind: str, folder: Path) -> Outcome:
    """Serve a kind with eviction, and compare."""
    from testing.attention_recorder import recording
    from testing.engine import read_trace

    trace = folder / "trace.jsonl"
    settings = {"policy": "vlcache", "budget": BUDGET}
    settings |= {"trace": {"path": str(trace), "positions": True}}
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(_engine(kind, folder, settings))
        except ValueError as error:
            if "--kv-compress" in str(error) or "KV compression" in str(error):
                return Outcome("refused", _reasons(str(error)))
            raise
        requests = []
        for num_images in range(1, model_zoo.max_images(kind) + 1):
            for seed in range(0, 100, 10):
                with recording(llm) as layers:
                    output = _generate(llm, kind, num_images, seed)
                record = list(read_trace(trace).values())[-1]
                assert output.prompt_token_ids is not None
                start = _text_start(llm, kind, output.prompt_token_ids)
                try:
                    request = compare(layers, len(output.prompt_token_ids), start, record)
                except AssertionError as error:
                    return Outcome("wrong", str(error))
                if request is not None:
                    requests.append(request)
                    break
            else:
                return Outcome("wrong", "a near tie with every seed")
    return Outcome("exact", requests=requests)


def compare(
    layers: Sequence["Record"], prompt_tokens: int, first: int, trace: Mapping[str, Any]
) -> dict[str, Any] | None:
    """One request: the engine against the oracle. None where it hinges on rounding.

    Args:
        layers: what the attention layers were given and gave back.
        prompt_tokens: of the request.
        first: position of the text after its last image.
        trace: the engine's record of the eviction.

    Raises:
        AssertionError: if they differ, or if the request would not tell.
    """
    from testing.oracle import Settings, decide

    full = [layer for layer in layers if layer.window is None]
    attention = [layer.logits(first, prompt_tokens).softmax(dim=-1) for layer in full]
    expected = decide(attention, first, full[0].num_kv_heads, Settings(BUDGET, BLOCK_SIZE))
    if expected.score_gap < MIN_SCORE_GAP:
        return None
    density = max(abs(a - b) for a, b in zip(trace["density"], expected.density, strict=True))
    assert density < MAX_DENSITY_DISTANCE, f"densities differ by {density:.1e}"
    assert trace["kept_tokens"] == expected.kept_tokens, "layer budgets differ"
    assert trace["kept_positions"] == expected.kept_positions, "kept positions differ"

    distance = effect = 0.0
    kept = iter(expected.kept_positions)
    for layer in layers:
        evicted = None if layer.window else next(kept)
        distance = max(distance, layer.distance(layer.expected(prompt_tokens, evicted)))
        effect = max(effect, layer.distance(layer.expected(prompt_tokens)))
    assert distance < MAX_DISTANCE, f"attention outputs differ by {distance:.1e}"
    assert effect > MIN_EFFECT, "the request does not tell eviction from none"
    assert len(set(expected.kept_tokens)) > 1, "the request does not tell layers apart"
    return {
        "prompt_tokens": prompt_tokens,
        "observed_tokens": prompt_tokens - first,
        "prompt_blocks": trace["prompt_blocks"],
        "kept_blocks": trace["kept_blocks"],
        "windows": [layer.window for layer in layers],
        "density": [round(d, 4) for d in expected.density],
        "kept_tokens": expected.kept_tokens,
        "distance": float(f"{distance:.1e}"),
        "distance_of_whole_cache": float(f"{effect:.1e}"),
    }


def stock(kind: str, folder: Path) -> Outcome:
    """Serve a kind without eviction."""
    # The only type that all of vLLM's CPU kernels know.
    with _engine(kind, folder, None, dtype="bfloat16") as llm:
        _generate(llm, kind, 1, 0)
    return Outcome("served")


def _engine(
    kind: str, folder: Path, kv_compress: dict[str, Any] | None, dtype: str = "float32"
) -> AbstractContextManager["LLM"]:
    import testing.random_weights  # noqa: F401  registers the load format
    from testing.engine import engine

    return engine(
        model_zoo.build(kind, folder / "model"),
        kv_compress,
        dtype=dtype,
        load_format="random",
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        limit_mm_per_prompt={"image": model_zoo.max_images(kind)},
        enable_prefix_caching=False,  # a request's record must hold its whole prompt
        trust_remote_code=True,
    )


def _generate(llm: "LLM", kind: str, num_images: int, seed: int) -> "RequestOutput":
    from testing.engine import greedy
    from testing.tiny_models import random_image

    request = {
        "prompt": model_zoo.prompt_for(kind, QUESTION, num_images),
        "multi_modal_data": {"image": [random_image(seed + i) for i in range(num_images)]},
    }
    (output,) = llm.generate([request], greedy(NUM_TOKENS), use_tqdm=False)
    return output


def _text_start(llm: "LLM", kind: str, prompt_token_ids: Sequence[int]) -> int:
    """Where the text after the last image begins."""
    text = model_zoo.text_after_images(kind, QUESTION)
    tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
    starts = range(len(prompt_token_ids) - len(tokens), -1, -1)
    return next(i for i in starts if list(prompt_token_ids[i : i + len(tokens)]) == tokens)


def _reasons(message: str) -> str:
    """The reasons of a refusal without its headline, on one line."""
    lines = message.splitlines()
    return "; ".join(line.removeprefix("  - ") for line in lines[1:]) or message


def _child(task: Any, kind: str, folder: Path, log: Path, answer: Connection) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    # vLLM's MiniCPM-V asks for it on every device; torch's CPU build has none.
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        outcome = task(kind, folder)
    except Exception as error:
        traceback.print_exc()
        outcome = Outcome("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    answer.send(outcome)


# --------------------------------------------------------------------------------------------------
# The matrix


def run(kind: str, time_limit: float = TIME_LIMIT) -> dict[str, Any]:
    """One row: the outcome of a kind, with what its configuration says."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcome = _in_a_process(evicted, kind, folder, time_limit)
        if outcome.result in ("refused", "failed"):
            without = _in_a_process(stock, kind, folder, time_limit)
            if without.result != "served":
                outcome = Outcome("not served", without.reason)
        config = json.loads((folder / "model" / "config.json").read_text())
    return {
        "architecture": config["architectures"][0],
        "language_model": model_zoo.language_model(config),
        "result": outcome.result,
        "reason": outcome.reason,
        "requests": list(outcome.requests),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _in_a_process(task: Any, kind: str, folder: Path, time_limit: float) -> Outcome:
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    log = folder / "log"
    log.touch()
    process = spawn.Process(target=_child, args=(task, kind, folder, log, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(time_limit):
            outcome = receiver.recv()
        else:
            outcome = Outcome("failed", f"no answer after {time_limit} s")
            process.kill()
    except EOFError:
        process.join()
        outcome = Outcome("failed", f"the process ended with code {process.exitcode}")
    process.join(10)
    process.kill()  # unless it has ended
    process.join()
    if outcome.result in ("failed", "wrong"):
        # After "nanobind:" come complaints of the interpreter's end.
        sys.stderr.write(log.read_text(errors="replace").partition("nanobind:")[0][-4000:])
    return outcome


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of docs/models.md."""
    lines = [
        "| kind | vLLM's architecture | language model | layers | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, row in rows.items():
        windows = row["requests"][0]["windows"] if row["requests"] else []
        layers = f"{windows.count(None)} of {len(windows)}" if windows else ""
        result = row["result"] + (f": {row['reason']}" if row["reason"] else "")
        cells = (kind, row["architecture"], row["language_model"], layers, result)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(model_zoo.KINDS))
    parser.add_argument("--json", nargs="?", const=RESULTS, type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.kinds) - set(model_zoo.KINDS))
    if unknown:
        parser.error(f"unknown kind(s) {', '.join(unknown)}; known: {', '.join(model_zoo.KINDS)}")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = {}
    for kind in options.kinds or model_zoo.KINDS:
        rows[kind] = row = run(kind)
        print(f"{kind:20} {row['seconds']:6} s  {row['result']}", row["reason"] or "", flush=True)
    if options.json:
        given = sys.argv[1:] if arguments is None else arguments
        write_report(options.json, "checks.matrix", given, results=rows)
    if options.markdown:
        print(markdown(rows), end="")
    if any(row["result"] in ("wrong", "failed") for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
