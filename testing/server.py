# SPDX-License-Identifier: Apache-2.0
"""Runs ``vllm serve`` in a process and sends requests to it."""

import base64
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

START_TIMEOUT_SECONDS = 300.0


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Send a POST request; the caller reads and closes the response.

        Raises:
            urllib.error.HTTPError: for a status of 400 and above.
        """
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a chat completion without streaming."""
        with self.post("/v1/chat/completions", body) as response:
            return json.load(response)

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric's samples, or of those with a label such as ``layer="0"``."""
        return metric_of(self.get("/metrics"), name, label)

    def num_blocks(self) -> int:
        """Number of blocks in the KV cache pool."""
        match = re.search(r'vllm:cache_config_info{.*num_gpu_blocks="(\d+)"', self.get("/metrics"))
        assert match is not None
        return int(match[1])


def metric_of(page: str, name: str, label: str = "") -> float:
    """`Server.metric` for the text of ``/metrics``."""
    labels = rf"(?:{{.*{re.escape(label)}.*}})" + ("" if label else "?")
    pattern = rf"^{re.escape(name)}{labels} ([0-9.e+-]+)$"
    return sum(float(value) for value in re.findall(pattern, page, re.MULTILINE))


def program() -> list[str]:
    """The ``vllm`` command, or its module if vLLM was unpacked without installing scripts."""
    script = Path(sys.executable).parent / "vllm"
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def command(model: Path, *arguments: str) -> list[str]:
    """The command line of a server."""
    return [*program(), "serve", str(model), *arguments]


def environment() -> dict[str, str]:
    """The environment of a server: offline by default, with the engine core in its own process."""
    return {
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }


@contextlib.contextmanager
def running(
    model: Path,
    log: Path,
    *arguments: str,
    port: int | None = None,
    start_timeout: float = START_TIMEOUT_SECONDS,
) -> Iterator[Server]:
    """Start ``vllm serve MODEL ARGUMENTS``, wait until it is healthy, and stop it on exit.

    Args:
        model: path of the checkpoint.
        log: file for the output of the server.
        arguments: further arguments of ``vllm serve``.
        port: by default a free one.
        start_timeout: seconds.

    Raises:
        RuntimeError: if it exits or is not healthy in time; includes the end of its log.
    """
    if port is None:
        port = free_port()
    arguments = (*arguments, "--host", "127.0.0.1", "--port", str(port))
    with log.open("w") as output:
        process = subprocess.Popen(
            command(model, *arguments), stdout=output, stderr=output, env=environment()
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        deadline = time.monotonic() + start_timeout
        while not _is_healthy(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_healthy(server: Server) -> bool:
    try:
        server.get("/health")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def image_url(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_content(question: str, *image_urls: str) -> list[dict[str, Any]]:
    """The content of a user message: images, then the question."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in image_urls]
    return [*images, {"type": "text", "text": question}]


def chat_body(model: Path, question: str, *image_urls: str, **parameters: Any) -> dict[str, Any]:
    """The body of a chat completion about images."""
    return {
        "model": str(model),
        "messages": [{"role": "user", "content": chat_content(question, *image_urls)}],
        "temperature": 0,
        **parameters,
    }


def stream(server: Server, body: dict[str, Any]) -> Iterator[str]:
    """The text deltas of a streamed chat completion."""
    with server.post("/v1/chat/completions", {**body, "stream": True}) as response:
        for line in response:
            payload = line.decode().strip().removeprefix("data: ")
            if not payload or payload == "[DONE]":
                continue
            chunk = json.loads(payload)
            if chunk["choices"] and (text := chunk["choices"][0]["delta"].get("content")):
                yield text
