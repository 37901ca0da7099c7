# SPDX-License-Identifier: Apache-2.0
"""Seeded requests of every kind, and clients that read, disconnect or read slowly."""

import asyncio
import json
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp

from testing import tiny_models
from testing.server import Server, chat_body, image_url

MAX_MODEL_LEN = 1248
IMAGE_TOKENS = 64  # per image, for the tiny LLaVA with image_size 112
NUM_IMAGES = 24
DEADLINE_SECONDS = 180.0
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Request:
    """A request, the behaviour of its client, and the expected status."""

    body: dict[str, Any] | bytes
    path: str = CHAT
    status: int = 200
    manner: str = "read"
    """"read"; "leave after" ``amount`` chunks; "leave within" ``amount`` seconds; "leave
    mid-upload"; "read slowly": pause for ``amount`` seconds after the first chunk."""
    amount: float = 0.0
    sample: int | None = None
    """Index among the sampled requests, whose outputs are known."""

    @property
    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()

    @property
    def streams(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))


@dataclass
class Response:
    """The response to a request. ``left``: the client disconnected before the end."""

    status: int = 0
    tokens: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """For each token, its log-probability minus that of the second most likely token."""
    completion_tokens: int = 0
    finish_reason: str = ""
    error: str = ""
    left: bool = False
    request_id: str = ""
    """What the server's log calls the request."""
    pause: tuple[float, float] | None = None
    """Start and end of a slow reader's pause (``time.perf_counter``)."""


class Load:
    """Draws requests from a seeded generator."""

    def __init__(self, model: Path, seed: int, num_samples: int = 32) -> None:
        self.model = str(model)
        self.images = [
            image_url(tiny_models.random_image(number, (112, 112))) for number in range(NUM_IMAGES)
        ]
        self.rng = random.Random(f"sampled {seed}")
        self.samples = [self._sample(number) for number in range(num_samples)]
        self.rng = random.Random(seed)

    def chat(self, text: str, num_images: int, **parameters: Any) -> dict[str, Any]:
        """The body of a greedy request for exactly ``max_tokens`` tokens about random images."""
        urls = self.rng.choices(self.images, k=num_images)
        return chat_body(Path(self.model), text, *urls, ignore_eos=True, **parameters)

    def text(self, length: int) -> str:
        """Random words of ``length`` tokens. The tokenizer has one token per byte."""
        words = ("what", "where", "colour", "circle", "left", "below", "how", "many", "the", "is")
        return " ".join(self.rng.choices(words, k=length))[:length]

    def good(self, long: float) -> Request:
        """A valid request.

        Args:
            long: probability of a long prompt, and separately of a long output.
        """
        rng = self.rng
        num_images = rng.choices((0, 1, 2, 3), (3, 5, 1, 1))[0]
        text = self.text(rng.randint(300, 700) if rng.random() < long else rng.randint(5, 150))
        max_tokens = rng.randint(100, 250) if rng.random() < long else rng.choice((1, 2, 8, 24, 48))
        parameters: dict[str, Any] = {"max_tokens": max_tokens, "priority": rng.choice((-1, 0, 1))}
        if rng.random() < 0.2:
            # No seed: with one, vLLM 0.32's CPU worker crashes in a chunked prefill, with or
            # without eviction. It sets the offset of a generator, which CPU generators lack.
            parameters |= {"n": rng.choice((2, 3)), "temperature": 1.0}
        if rng.random() < 0.3:
            parameters["vllm_xargs"] = {"kv_budget": rng.choice((0.05, 0.5, 1.0))}
        elif rng.random() < 0.2:
            parameters["vllm_xargs"] = {"kv_policy_options": '{"max_observation_tokens": 16}'}
        if rng.random() < 0.1:
            parameters |= {"logprobs": True, "top_logprobs": 5}
        return self._maybe_streamed(self.chat(text, num_images, **parameters))

    def _sample(self, number: int) -> Request:
        rng = self.rng
        budget = rng.choice((None, None, 0.1, 0.5, 1.0))
        body = self.chat(
            self.text(rng.randint(20, 400)),
            rng.choices((0, 1, 2), (1, 3, 1))[0],
            max_tokens=rng.choice((8, 16, 32)),
            logprobs=True,
            top_logprobs=2,
        )
        if budget is not None:
            body["vllm_xargs"] = {"kv_budget": budget}
        return Request(body, sample=number)

    def sampled(self) -> Request:
        """One of the requests whose outputs are known."""
        request = self.rng.choice(self.samples)
        assert isinstance(request.body, dict)
        body = request.body | {"priority": self.rng.choice((-1, 0, 1))}
        return replace(self._maybe_streamed(body), sample=request.sample)

    def leaving(self) -> Request:
        """A request whose client disconnects."""
        request = self.good(long=0.5)
        assert isinstance(request.body, dict)
        manner = self.rng.choice(("leave after", "leave within", "leave mid-upload"))
        amount = self.rng.uniform(0, 0.4)
        if manner == "leave after":
            amount = self.rng.choice((0, 1, 2, 10, 40))
            request = replace(request, body=request.body | {"stream": True})
        return replace(request, manner=manner, amount=amount)

    def slow(self) -> Request:
        """A streamed output of several hundred kilobytes, more than sockets buffer."""
        parameters = {"max_tokens": 250, "logprobs": True, "top_logprobs": 20, "stream": True}
        body = self.chat(self.text(50), 1, **parameters)
        return Request(body, manner="read slowly", amount=2.0)

    def bad(self) -> Request:
        """A request that the server must refuse."""
        return self.rng.choice(list(self.bad_requests().values()))

    def bad_requests(self, eviction: bool = True) -> dict[str, Request]:
        """Invalid requests by name.

        Args:
            eviction: include those with invalid settings of KV compression.
        """
        good = self.chat("What is it?", 1, max_tokens=8)
        long = self.text(MAX_MODEL_LEN)

        def with_image(url: str) -> dict[str, Any]:
            body = self.chat("What is it?", 0, max_tokens=8)
            body["messages"][0]["content"].append({"type": "image_url", "image_url": {"url": url}})
            return body

        bodies: dict[str, tuple[int, dict[str, Any] | bytes]] = {
            "bytes that are no image": (400, with_image("data:image/png;base64,aGVsbG8=")),
            "image cut short": (400, with_image(self.images[0][: len(self.images[0]) // 8 * 4])),
            "not base64": (400, with_image("data:image/png;base64,###")),
            "unknown URL scheme": (400, with_image("gopher://example/image.png")),
            "too many images": (400, self.chat("What?", 4, max_tokens=8)),
            "prompt too long": (400, self.chat(long, 0, max_tokens=8)),
            "prompt with image too long": (400, self.chat(long, 1, max_tokens=8)),
            "negative max_tokens": (400, good | {"max_tokens": -1}),
            "max_tokens too large": (400, good | {"max_tokens": 10 * MAX_MODEL_LEN}),
            "huge n": (400, good | {"n": 1_000_000}),
            "negative temperature": (400, good | {"temperature": -1}),
            "no messages": (400, {"model": self.model}),
            "malformed JSON": (400, json.dumps(good).encode()[:-20]),
            "not UTF-8": (400, b'{"model": "\xff\xfe'),
            "another model": (404, good | {"model": "another"}),
        }
        if eviction:
            for name, settings in {
                "kv_budget 7": {"kv_budget": 7},
                "kv_budget no number": {"kv_budget": "a"},
                "kv_policy_options broken": {"kv_policy_options": "{"},
                "kv_policy_options unknown": {"kv_policy_options": '{"x": 1}'},
            }.items():
                bodies[name] = (400, good | {"vllm_xargs": settings})
        return {name: Request(body, status=status) for name, (status, body) in bodies.items()}

    def whole_pool(self) -> Request:
        """A text request of the maximum length, which needs every block of the pool."""
        max_tokens = 64
        prompt = self.text(MAX_MODEL_LEN - max_tokens - 1)  # 1: the BOS token
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
        return Request(body, path="/v1/completions")

    def _maybe_streamed(self, body: dict[str, Any]) -> Request:
        if self.rng.random() < 0.5:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        return Request(body)


class Client:
    """Sends requests to one server, each with a deadline."""

    def __init__(self, server: Server, deadline: float = DEADLINE_SECONDS) -> None:
        self.server = server
        self.deadline = deadline

    async def __aenter__(self) -> "Client":
        timeout = aiohttp.ClientTimeout(total=None)
        # One connection per request: the server could close a kept connection while it is reused.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        slow = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket)
        self._slow_session = aiohttp.ClientSession(
            connector=slow, timeout=timeout, read_bufsize=4096
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._slow_session.close()

    async def send(self, request: Request) -> Response:
        """Send a request and behave as it specifies.

        Raises:
            TimeoutError: if the response is not complete before the deadline.
        """
        response = Response(request_id=uuid.uuid4().hex)
        async with asyncio.timeout(self.deadline):
            try:
                if request.manner == "leave mid-upload":
                    await self._leave_mid_upload(request)
                    response.left = True
                elif request.manner == "leave within":
                    try:
                        async with asyncio.timeout(request.amount):
                            await self._exchange(request, response)
                    except TimeoutError:
                        response.left = True
                else:
                    await self._exchange(request, response)
            except (aiohttp.ClientError, ConnectionError) as error:
                response.error = f"{type(error).__name__}: {error}"
        return response

    async def _exchange(self, request: Request, response: Response) -> None:
        slow = request.manner == "read slowly"
        session = self._slow_session if slow else self._session
        headers = {"Content-Type": "application/json", "X-Request-Id": response.request_id}
        url = self.server.url + request.path
        async with session.post(url, data=request.data, headers=headers) as http:
            response.status = http.status
            if http.status != 200:
                response.error = await http.text()
                return
            if not request.streams:
                _add(response, await http.json())
                return
            chunks = 0
            async for chunk in _events(http):
                if request.manner == "leave after" and chunks >= request.amount:
                    response.left = True
                    http.close()
                    return
                _add(response, chunk)
                chunks += 1
                if slow and chunks == 1:
                    began = time.perf_counter()
                    await asyncio.sleep(request.amount)
                    response.pause = began, time.perf_counter()

    async def _leave_mid_upload(self, request: Request) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        data = request.data
        head = (
            f"POST {request.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data[: len(data) // 2])
        await writer.drain()
        await asyncio.sleep(request.amount)
        writer.close()
        await writer.wait_closed()


def _small_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket with a small receive buffer, so that the server soon has to wait."""
    family, kind, protocol, *_ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.setblocking(False)
    return opened


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed response.

    Raises:
        ConnectionError: if the stream ends without ``[DONE]``.
    """
    rest = b""  # reading line by line would limit their length
    async for data in response.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            payload = line.decode().removeprefix("data: ")
            if payload == "[DONE]":
                return
            if payload:
                yield json.loads(payload)
    raise ConnectionError("the stream ended early")


def _add(response: Response, part: dict[str, Any]) -> None:
    """Add a chunk or a complete body to a response."""
    if "error" in part:
        response.error = str(part["error"])
        return
    if part.get("usage"):
        response.completion_tokens = part["usage"]["completion_tokens"]
    for choice in part["choices"]:
        response.finish_reason = choice.get("finish_reason") or response.finish_reason
        for token in ((choice.get("logprobs") or {}).get("content")) or ():
            response.tokens.append(token["token"])
            best, second = [top["logprob"] for top in token["top_logprobs"][:2]]
            response.margins.append(best - second)
