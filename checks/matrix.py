# SPDX-License-Identifier: Apache-2.0
"""The model matrix: which vision-language architectures are supported, and whether exactly.

    python -m checks.matrix [--json [FILE]] [--merge] [--markdown] [KIND ...]

Each kind of `testing.model_zoo` runs in its own process. A tiny model with random weights prefills
prompts with images, evicts and decodes, and its attention layers are compared with
`testing.attention_recorder`. docs/models.md defines "exact".
"""

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
from testing.cli import make_parser, set_vllm_environment
from testing.results import describe_machine, write_report

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

    from testing.attention_recorder import Record

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "matrix.json"

BUDGET, BLOCK_SIZE, NUM_TOKENS = 0.25, 32, 8
QUESTION = (
    "Describe everything that you can see in the picture, from left to right: who is there, what "
    "they do, and what will happen next? Answer in a sentence or two."
)
TIME_LIMIT = 300  # seconds per process

# Largest difference to attention in float64, relative to a layer's largest output, by type.
MAX_DISTANCE = {"float32": 1e-5, "bfloat16": 8e-3}
MAX_DENSITY_DISTANCE = 1e-4
# Two scores closer than this may be ranked either way after float32 rounding. A request with such
# a tie is not compared.
MIN_SCORE_GAP = 2e-5
# The comparison is meaningful if eviction changes attention outputs by far more than rounding.
MIN_EFFECT = {"float32": 1e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class KindResult:
    """The result of one kind; ``result`` is one of

    exact
        Served and evicted, equal to the oracle.
    refused
        The plugin refuses it at start-up; vLLM without eviction serves it.
    not served
        vLLM does not serve it on this platform.
    wrong
        Served and evicted, but different from the oracle.
    failed
        vLLM serves it without eviction; with eviction it crashes or hangs.
    """

    result: str
    reason: str | None = None
    requests: Sequence[Mapping[str, Any]] = ()


# --------------------------------------------------------------------------------------------------
# In the process of one kind


def evicted(kind: str, folder: Path) -> KindResult:
    """Serve a kind with eviction and compare it with the oracle."""
    from testing.attention_recorder import recording
    from testing.engine import read_trace

    trace = folder / "trace.jsonl"
    settings = {"policy": "vlcache", "budget": BUDGET}
    settings |= {"trace": {"path": str(trace), "positions": True}}
    with contextlib.ExitStack() as stack:
        try:
            llm = stack.enter_context(_engine(kind, folder, settings, model_zoo.dtype(kind)))
        except ValueError as error:
            if "--kv-compress" in str(error) or "KV compression" in str(error):
                return KindResult("refused", _reasons(str(error)))
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
                    request = compare(
                        layers, len(output.prompt_token_ids), start, record, model_zoo.dtype(kind)
                    )
                except AssertionError as error:
                    return KindResult("wrong", str(error))
                if request is not None:
                    num_layers = llm.llm_engine.model_config.get_total_num_hidden_layers()
                    requests.append(request | {"num_layers": num_layers})
                    break
            else:
                return KindResult("wrong", "every seed gives a near tie")
    return KindResult("exact", requests=requests)


def compare(
    layers: Sequence["Record"],
    prompt_tokens: int,
    first: int,
    trace: Mapping[str, Any],
    dtype: str = "float32",
) -> dict[str, Any] | None:
    """Compare an engine with the oracle for one request.

    Args:
        layers: recorded inputs and outputs of the attention layers.
        prompt_tokens: length of the prompt.
        first: position of the first token after the last image.
        trace: the engine's trace record of the eviction.
        dtype: of the engine.

    Returns:
        The row of the request, or None if it contains a near tie.

    Raises:
        AssertionError: if they differ, or if the request cannot show a difference.
    """
    from testing.attention_recorder import attention_of, owners
    from testing.oracle import Settings, decide_prompt, with_tail

    num_kv_heads = next(layer.num_kv_heads for layer in layers if layer.window is None)
    attention = attention_of(layers, first, prompt_tokens)
    block_size = trace["block_size"]  # vLLM may have enlarged it
    expected = decide_prompt(attention, num_kv_heads, Settings(BUDGET, block_size))
    if expected.score_gap < MIN_SCORE_GAP:
        return None
    density = max(abs(a - b) for a, b in zip(trace["density"], expected.density, strict=True))
    assert density < MAX_DENSITY_DISTANCE, f"densities differ by {density:.1e}"
    assert trace["kept_tokens"] == expected.kept_tokens, "layer budgets differ"
    assert trace["kept_positions"] == expected.kept_positions, "kept positions differ"

    distance = effect = 0.0
    kept = iter(with_tail(expected.kept_positions, prompt_tokens, block_size))
    kept_of: dict[int, list[list[int]]] = {}  # by index of the layer that has the cache
    for owner, layer in zip(owners(layers), layers, strict=True):
        if layer.owner is None and not layer.window:
            kept_of[owner] = next(kept)
        evicted = kept_of.get(owner)
        distance = max(distance, layer.distance(layer.expected(prompt_tokens, evicted)))
        effect = max(effect, layer.distance(layer.expected(prompt_tokens)))
    assert distance < MAX_DISTANCE[dtype], f"attention outputs differ by {distance:.1e}"
    assert effect > MIN_EFFECT[dtype], "the request does not distinguish eviction from a full cache"
    assert len(set(expected.kept_tokens)) > 1, "the request does not distinguish the layers"
    return {
        "prompt_tokens": prompt_tokens,
        "observed_tokens": prompt_tokens - first,
        "block_size": block_size,
        "prompt_blocks": -(-prompt_tokens // block_size),
        "kept_blocks": trace["kept_blocks"],
        "windows": [layer.window for layer in layers],
        "density": [round(d, 4) for d in expected.density],
        "kept_tokens": expected.kept_tokens,
        "distance": float(f"{distance:.1e}"),
        "distance_of_whole_cache": float(f"{effect:.1e}"),
    }


def baseline(kind: str, folder: Path) -> KindResult:
    """Serve a kind without eviction."""
    # The only type that all CPU kernels of vLLM support.
    with _engine(kind, folder, None, dtype="bfloat16") as llm:
        _generate(llm, kind, 1, 0)
    return KindResult("served")


def _engine(
    kind: str, folder: Path, kv_compress: dict[str, Any] | None, dtype: str = "float32"
) -> AbstractContextManager["LLM"]:
    import testing.random_weights  # noqa: F401  registers the load format
    from testing.engine import engine, let_numba_be_searched

    if kind == "kimi-k2.5":
        let_numba_be_searched()
    return engine(
        model_zoo.build(kind, folder / "model"),
        kv_compress,
        dtype=dtype,
        load_format="random",
        block_size=BLOCK_SIZE,
        max_model_len=4096,
        kv_cache_memory_bytes=256 << 20,
        limit_mm_per_prompt=model_zoo.limits(kind),
        enable_prefix_caching=False,  # a record must contain the whole prompt
        trust_remote_code=model_zoo.has_code(kind),
        **model_zoo.options(kind),
    )


def _generate(llm: "LLM", kind: str, num_images: int, seed: int) -> "RequestOutput":
    from testing.engine import greedy
    from testing.tiny_models import random_image

    request = {
        "prompt": model_zoo.prompt_for(kind, QUESTION, num_images),
        "multi_modal_data": model_zoo.image_data(
            kind, [random_image(seed + i) for i in range(num_images)]
        ),
    }
    (output,) = llm.generate([request], greedy(NUM_TOKENS), use_tqdm=False)
    return output


def _text_start(llm: "LLM", kind: str, prompt_token_ids: Sequence[int]) -> int:
    """Position of the first text token after the last image."""
    text = model_zoo.text_after_images(kind, QUESTION)
    tokens = llm.get_tokenizer().encode(text, add_special_tokens=False)
    starts = range(len(prompt_token_ids) - len(tokens), -1, -1)
    return next(i for i in starts if list(prompt_token_ids[i : i + len(tokens)]) == tokens)


def _reasons(message: str) -> str:
    """The reasons of a refusal on one line, without the headline."""
    lines = message.splitlines()
    return "; ".join(line.removeprefix("  - ") for line in lines[1:]) or message


def _child(task: Any, kind: str, folder: Path, log: Path, connection: Connection) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    import torch

    # vLLM's MiniCPM-V calls it on every device, but torch's CPU build lacks it.
    torch.cuda.is_current_stream_capturing = lambda: False
    try:
        outcome = task(kind, folder)
    except Exception as error:
        traceback.print_exc()
        outcome = KindResult("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    connection.send(outcome)


# --------------------------------------------------------------------------------------------------
# The matrix


def run(kind: str, time_limit: float = TIME_LIMIT) -> dict[str, Any]:
    """The row of one kind: its result, architecture and language model."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        outcome = _in_a_process(evicted, kind, folder, time_limit)
        if outcome.result in ("refused", "failed"):
            without = _in_a_process(baseline, kind, folder, time_limit)
            if without.result != "served":
                outcome = KindResult("not served", without.reason)
        config = json.loads((folder / "model" / "config.json").read_text())
    return {
        "architecture": config["architectures"][0],
        "language_model": model_zoo.language_model(config),
        "result": outcome.result,
        "reason": outcome.reason,
        "requests": list(outcome.requests),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _in_a_process(task: Any, kind: str, folder: Path, time_limit: float) -> KindResult:
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
            outcome = KindResult("failed", f"no answer after {time_limit} s")
            process.kill()
    except EOFError:
        process.join()
        outcome = KindResult("failed", f"the process ended with code {process.exitcode}")
    process.join(10)
    process.kill()  # if it is still running
    process.join()
    if outcome.result in ("failed", "wrong"):
        # Messages after "nanobind:" belong to the shutdown of the interpreter.
        sys.stderr.write(log.read_text(errors="replace").partition("nanobind:")[0][-4000:])
    return outcome


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of docs/models.md."""
    lines = [
        "| kind | vLLM's architecture | language model | layers | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, row in rows.items():
        layers = ""
        if row["requests"]:
            request = row["requests"][0]
            layers = f"{len(request['density'])} of {request['num_layers']}"
        result = row["result"] + (f": {row['reason']}" if row["reason"] else "")
        cells = (kind, row["architecture"], row["language_model"], layers, result)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def merged(path: Path, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a file with new rows in place of old ones, in the order of the kinds.

    Raises:
        ValueError: if the file was measured on another machine or with other versions.
    """
    report, here = json.loads(path.read_text()), describe_machine()
    for name in ("processor", "cores", "python", "torch", "transformers", "vllm"):
        if report["machine"][name] != here[name]:
            raise ValueError(
                f"{path} was measured with {name} {report['machine'][name]}, this is {here[name]}"
            )
    both = {**report["results"], **rows}
    return {kind: both[kind] for kind in model_zoo.KINDS if kind in both}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, json=False)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(model_zoo.KINDS))
    parser.add_argument(
        "--json",
        nargs="?",
        const=RESULTS,
        type=Path,
        metavar="FILE",
        help="write the results here; by default to the committed file",
    )
    parser.add_argument("--merge", action="store_true", help="keep the file's rows of other kinds")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    options = parser.parse_args(arguments)
    if options.merge and not options.json:
        parser.error("--merge needs --json")
    unknown = sorted(set(options.kinds) - set(model_zoo.KINDS))
    if unknown:
        parser.error(f"unknown kind(s) {', '.join(unknown)}; known: {', '.join(model_zoo.KINDS)}")
    set_vllm_environment()
    rows: dict[str, Any] = {}
    if options.merge:
        merged(options.json, rows)  # fail before the work is done
    for kind in options.kinds or model_zoo.KINDS:
        rows[kind] = row = run(kind)
        print(f"{kind:20} {row['seconds']:6} s  {row['result']}", row["reason"] or "", flush=True)
    if options.json:
        rows = merged(options.json, rows) if options.merge else rows
        write_report(options.json, "checks.matrix", arguments, results=rows)
    if options.markdown:
        print(markdown(rows), end="")
    if any(row["result"] in ("wrong", "failed") for row in rows.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
