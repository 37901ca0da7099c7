# SPDX-License-Identifier: Apache-2.0
"""A prefill server of unmodified vLLM and an evicting decode server, with NIXL between them."""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.accuracy import MODEL
from evaluation.drafts import DRAFTS
from testing.engine import read_trace_lines
from testing.server import Server, chat_body, image_url, running
from training.pages import Layout, generate
from training.render import render

pytestmark = pytest.mark.server

BUDGET, NUM_TOKENS = 0.2, 24
ARGUMENTS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=2048",
    "--block-size=32",
    "--kv-cache-memory-bytes=64M",
    "--max-num-batched-tokens=2048",
)
# What vLLM's proxies send to a prefill server.
TO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
DOCUMENTS = [generate("disaggregated", i, Layout(num_pages=(2, 2))) for i in range(3)]
IMAGES = [[Image.fromarray(render(page, 0)) for page in d.pages] for d in DOCUMENTS]
QUESTIONS = [f"What is the value of {d.pages[1].plain[0].key}?" for d in DOCUMENTS]


def transfer(role: str) -> list[str]:
    """The arguments of a server with this role; none for one that works alone."""
    if role == "alone":
        return []
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
    }
    return [f"--kv-transfer-config={json.dumps(config)}"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def started(folder: Path, role: str, *arguments: str) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", free_port())
        log = folder / f"{role}.log"
        with running(MODEL, log, *ARGUMENTS, *transfer(role), *arguments) as server:
            yield server


def evicts(trace: Path) -> list[str]:
    """The arguments of a server that evicts and records what it keeps."""
    config = {"trace": {"path": str(trace), "positions": True}}
    return [
        "--kv-compress=vlcache",
        f"--kv-compress-budget={BUDGET}",
        f"--kv-compress-config={json.dumps(config)}",
    ]


def prefill(server: Server, index: int) -> dict[str, Any]:
    """The first request of a proxy; returns what it hands to the decode server."""
    urls = [image_url(image) for image in IMAGES[index]]
    body = chat_body(MODEL, QUESTIONS[index], *urls, max_tokens=1, kv_transfer_params=TO_PREFILL)
    return server.chat(body)["kv_transfer_params"]


def decode(server: Server, index: int, parameters: dict[str, Any] | None = None) -> str:
    """The second request of a proxy, or the only one of a server that works alone."""
    urls = [image_url(image) for image in IMAGES[index]]
    body = chat_body(
        MODEL, QUESTIONS[index], *urls, max_tokens=NUM_TOKENS, kv_transfer_params=parameters
    )
    return server.chat(body)["choices"][0]["message"]["content"]


def kept(path: Path) -> list[Any]:
    return [record["kept_positions"] for record in read_trace_lines(path)]


@pytest.mark.parametrize(
    "more", [(), (f"--speculative-config={json.dumps(DRAFTS)}",)], ids=["", "drafts"]
)
def test_the_decode_server_keeps_what_one_server_keeps(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Both servers have the page reader's EAGLE-3 head, or none."""
    alone, apart = tmp_path / "alone.jsonl", tmp_path / "apart.jsonl"
    with started(tmp_path, "alone", *more, *evicts(alone)) as server:
        answers = [decode(server, index) for index in range(3)]
    with (
        started(tmp_path, "kv_consumer", *more, *evicts(apart)) as decoder,
        started(tmp_path, "kv_producer", *more) as prefiller,
    ):
        for index in range(2):
            assert decode(decoder, index, prefill(prefiller, index)) == answers[index]
        assert decoder.metric("vllm:external_prefix_cache_hits_total") > 2 * 800
        assert decoder.metric("vllm:kv_compress_evicted_requests_total") == 2
        assert decoder.metric("vllm:nixl_bytes_transferred_count") == 2
        # A prompt whose server is gone is computed here.
        lost = prefill(prefiller, 2)
        prefiller.process.terminate()
        prefiller.process.wait(60)
        assert decode(decoder, 2, lost) == answers[2]
        assert decoder.metric("vllm:kv_compress_evicted_requests_total") == 3
        assert decoder.metric("vllm:kv_cache_usage_perc") == 0
    assert kept(apart) == kept(alone)
