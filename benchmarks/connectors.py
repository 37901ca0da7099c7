# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of a second question whose prompt a KV connector has kept.

    python -m benchmarks.connectors [--documents 12] [--json OUT]

The page reader is asked two questions about each document of four pages, in an engine that evicts.
Between them its blocks leave the prefix cache, unless the row is "prefix cache". Host memory is
vLLM's `OffloadingConnector` with the copies of `testing.offloading`, because vLLM's own need a GPU;
LMCache is a server of its own; files are those of `ExampleConnector`, in a temporary folder.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from testing.cli import make_parser, set_vllm_environment
from testing.results import Row, write_report

MODEL = Path(__file__).parent.parent / "models" / "page-reader"
SETTINGS = {"policy": "vlcache-plus", "budget": 0.1}
QUESTIONS = "What is the value of {}?", "Look up the value of {}."
WAYS = "new prefill", "prefix cache", "host memory", "LMCache", "files"


def prompts(number: int) -> list[list[dict[str, Any]]]:
    """Two prompts for each document, about the first and the last record."""
    from PIL import Image

    from training.pages import Layout, generate
    from training.render import render

    found = []
    for i in range(number):
        document = generate("connectors", i, Layout(num_pages=(4, 4)))
        images = [Image.fromarray(render(page, 0)) for page in document.pages]
        keys = document.pages[0].plain[0].key, document.pages[-1].plain[-1].key
        found.append(
            [
                {
                    "prompt": "<|user|>"
                    + "<image>\n" * len(images)
                    + question.format(key)
                    + "<|assistant|>",
                    "multi_modal_data": {"image": images},
                }
                for question, key in zip(QUESTIONS, keys, strict=True)
            ]
        )
    return found


@contextlib.contextmanager
def transfer(way: str, folder: Path) -> Iterator[Any]:
    """The connector of a way, if it has one."""
    from vllm.config import KVTransferConfig

    from testing import lmcache, offloading

    if way == "host memory":
        yield offloading.config(1 << 30, polls=1)
    elif way == "LMCache":
        with lmcache.running(folder / "log") as server:
            yield lmcache.config(server.port)
    elif way == "files":
        yield KVTransferConfig(
            kv_connector="ExampleConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"shared_storage_path": str(folder)},
        )
    else:
        yield None


def first_output(llm: Any, prompt: dict[str, Any]) -> Any:
    """The output with the first token of an answer, whose rest nobody reads."""
    from testing.engine import greedy

    engine = llm.llm_engine
    engine.add_request("second", prompt, greedy(24, logprobs=None))
    while not (outputs := engine.step()):
        pass
    engine.abort_request(["second"], internal=False)
    return outputs[0]


def measure(way: str, documents: list[list[dict[str, Any]]], connector: Any) -> Row:
    from testing.engine import greedy, running_llm, settle

    with running_llm(
        model=str(MODEL),
        enforce_eager=True,
        block_size=32,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=1 << 28,
        limit_mm_per_prompt={"image": 4},
        async_scheduling=False,
        additional_config={"kv_compress": SETTINGS},
        kv_transfer_config=connector,
    ) as llm:
        seconds, cached, prompt_tokens = [], [], 0
        for first, second in documents:
            llm.generate([first], greedy(24, logprobs=None), use_tqdm=False)
            settle(llm)
            if way != "prefix cache":
                assert llm.reset_prefix_cache()
            start = time.perf_counter()
            output = first_output(llm, second)
            seconds.append(time.perf_counter() - start)
            cached.append(output.num_cached_tokens)
            prompt_tokens = len(output.prompt_token_ids)
    return {
        "way": way,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": round(statistics.median(cached)),
        "ms": round(1000 * statistics.median(seconds[1:]), 1),
        "most_ms": round(1000 * max(seconds[1:]), 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--documents", type=int, default=12, help="the first one warms up")
    options = parser.parse_args(arguments)
    set_vllm_environment(VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1")
    documents, rows = prompts(options.documents), []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder, transfer(way, Path(folder)) as connector:
            rows.append(measure(way, documents, connector))
        print(rows[-1], flush=True)
    if options.json:
        write_report(
            options.json, "benchmarks.connectors", arguments, budget=SETTINGS["budget"], rows=rows
        )


if __name__ == "__main__":
    main()
