# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a real server with eviction, one image question, and what became of its cache.

The model is a tiny LLaVA with random weights, generated on the spot: its answer is noise, the
serving path is the real one.
"""

import json
import shlex
import tempfile
from pathlib import Path

from benchmarks import tiny_models
from benchmarks.server import chat_body, command, image_url, running, stream

BLOCK_SIZE = 32
BUDGET = 0.1
QUESTION = (
    "Here is a photograph of a busy place. Describe what you can see from left to right, name "
    "the colours and the shapes, say how many of each there are and which of them touch. " * 6
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_models.build("llava", Path(folder) / "tiny-llava", num_layers=6)
        trace = Path(folder) / "trace.jsonl"
        arguments = (
            "--kv-compress=vlcache",
            f"--kv-compress-budget={BUDGET}",
            "--kv-compress-config=" + json.dumps({"trace_path": str(trace)}),
            "--dtype=float32",
            "--enforce-eager",
            "--max-model-len=4096",
            f"--block-size={BLOCK_SIZE}",
            "--kv-cache-memory-bytes=64M",
        )
        shown = ["vllm", *command(Path("tiny-llava"), *arguments)[1:]]
        print("$", shlex.join(shown).replace(folder + "/", ""))
        with running(model, Path(folder) / "server.log", *arguments) as server:
            total = server.num_blocks() - 1
            url = image_url(tiny_models.random_image(3))
            body = chat_body(model, QUESTION, url, max_tokens=48)
            answer = ""
            for delta in stream(server, body):
                answer += delta
                if len(answer) == 40:
                    held = round(server.metric("vllm:kv_cache_usage_perc") * total)
            (record,) = [json.loads(line) for line in trace.read_text().splitlines()]
        print("server stopped\n")

    kept = record["kept_tokens"]
    tokens = record["prompt_tokens"]
    print(f"question     {QUESTION[:70]}... ({tokens} prompt tokens with the image)")
    print(f"answer       {answer!r}")
    print("             (random weights: noise, but noise that went through the whole server)")
    before, after = record["prompt_blocks"], record["kept_blocks"]
    print(f"blocks       {before} after prefill -> {after} kept, of {total}")
    print(f"             {held} held while decoding, by the server's own vllm:kv_cache_usage_perc")
    retained = sum(kept) / len(kept) / tokens
    print(f"budget       {BUDGET:.0%} asked for, {retained:.1%} of the prompt retained")
    print("layer        density   tokens kept of each KV head")
    for layer, (density, count) in enumerate(zip(record["density"], kept, strict=True)):
        bar = "#" * max(1, round(40 * count / max(kept)))
        print(f"  {layer:2d}         {density:7.3f}   {count:5d} of {tokens}  {bar}")


if __name__ == "__main__":
    main()
