# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --kv-compress vlcache` as its users meet it: over HTTP."""

import threading
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from evaluation.accuracy import MODEL
from testing import tiny_models
from testing.engine import read_trace, read_trace_lines
from testing.server import Server, chat_body, image_url, running, stream

pytestmark = pytest.mark.server

QUESTION = "Describe everything that you can see in the picture. " * 8
BLOCK = 32


@pytest.fixture(scope="module")
def model(models_dir: Path) -> Path:
    return tiny_models.build("llava", models_dir / "llava")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "trace.jsonl"


@pytest.fixture(scope="module")
def server(model: Path, trace: Path) -> Iterator[Server]:
    arguments = (
        "--kv-compress=vlcache",
        "--kv-compress-budget=0.1",
        f'--kv-compress-config={{"trace_path": "{trace}"}}',
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=2048",
        f"--block-size={BLOCK}",
        "--kv-cache-memory-bytes=16M",
        "--max-num-batched-tokens=512",
        "--enable-scale-out",  # for /inference/v1/generate
    )
    with running(model, trace.with_suffix(".log"), *arguments) as server:
        yield server


def ask(model: Path, seed: int, **parameters: Any) -> dict[str, Any]:
    url = image_url(tiny_models.random_image(seed))
    return chat_body(model, QUESTION, url, **{"max_tokens": 32, **parameters})


def wait_until_idle(server: Server) -> None:
    """Aborts are asynchronous: poll the gauges, bounded by the test's own patience."""
    for _ in range(2000):
        if (
            server.metric("vllm:num_requests_running")
            == server.metric("vllm:kv_cache_usage_perc")
            == 0
        ):
            return
    raise AssertionError("requests still hold blocks")


def test_chat_completion(server: Server, model: Path, trace: Path) -> None:
    before = len(read_trace(trace)) if trace.exists() else 0
    answer = server.chat(ask(model, 1))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 32
    records = list(read_trace(trace).values())
    assert len(records) == before + 1
    assert records[-1]["tokens"] == answer["usage"]["prompt_tokens"]
    assert records[-1]["kept_blocks"] < records[-1]["blocks"] // 4


def test_an_old_name_is_warned_of_once(server: Server, trace: Path) -> None:
    """The flag of this server has one; its engine core parses the settings again."""
    log = trace.with_suffix(".log").read_text()
    assert log.count("deprecated settings") == 1
    assert "KV compression: deprecated settings: trace_path is now trace.path" in log
    assert log.count(f"trace.path={trace}, trace.positions=False") == 1  # the start-up line


def test_metrics(server: Server, model: Path, trace: Path) -> None:
    names = ("evicted_requests_total", "freed_blocks_total", "retained_ratio_sum")
    times = ("observation_seconds_sum", "compaction_seconds_sum")

    def metric(name: str, label: str = "") -> float:
        return server.metric(f"vllm:kv_compress_{name}", label)

    before = {name: metric(name) for name in (*names, *times)}
    server.chat(ask(model, 5))
    record = list(read_trace(trace).values())[-1]
    after = {name: metric(name) - before[name] for name in (*names, *times)}
    kept, prompt = record["kept_blocks"], record["blocks"]
    tail = record["tokens"] - record["evicted_tokens"]
    assert after["evicted_requests_total"] == 1
    assert after["freed_blocks_total"] == prompt - (tail > 0)
    assert after["retained_ratio_sum"] == pytest.approx(kept / prompt)
    assert 0 < after["compaction_seconds_sum"] < 5 and 0 < after["observation_seconds_sum"] < 5
    for layer, tokens in enumerate(record["kept_tokens"]):
        share = metric("layer_retained_ratio", f'layer="{layer}"')
        assert share == pytest.approx((tokens + tail) / record["tokens"])
    server.chat({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
    assert metric("skipped_requests_total", 'reason="text_only"') >= 1
    wait_until_idle(server)
    assert metric("blocks_held") == 0


def test_streaming_gives_the_same_text(server: Server, model: Path) -> None:
    body = ask(model, 2)
    assert "".join(stream(server, body)) == server.chat(body)["choices"][0]["message"]["content"]


def test_16_clients_at_once(server: Server, model: Path) -> None:
    bodies = [ask(model, seed, max_tokens=48) for seed in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.chat, bodies))
    assert all(a["usage"]["completion_tokens"] == 48 for a in answers)
    assert len({a["choices"][0]["message"]["content"] for a in answers}) == 16
    wait_until_idle(server)


def test_client_that_hangs_up_mid_stream(server: Server, model: Path) -> None:
    for seed in range(4):
        deltas = stream(server, ask(model, seed, max_tokens=1500))
        next(deltas)
        deltas.close()  # closes the connection
    wait_until_idle(server)
    assert server.chat(ask(model, 1))["usage"]["completion_tokens"] == 32


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("data:image/png;base64,aGVsbG8=", id="not an image"),
        pytest.param("data:image/png;base64,###", id="not base64"),
    ],
)
def test_broken_image(server: Server, model: Path, url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.chat(chat_body(model, "What is it?", url, max_tokens=4))
    assert error.value.code == 400
    assert server.chat(ask(model, 1))["usage"]["completion_tokens"] == 32


def test_a_requests_own_budget(server: Server, model: Path, trace: Path) -> None:
    server.chat(ask(model, 1, vllm_xargs={"kv_budget": 0.25}))
    record = list(read_trace(trace).values())[-1]
    assert record["budget"] == 0.25
    assert record["kept_blocks"] == -(-record["blocks"] // 4)
    options = '{"max_observation_tokens": 16}'
    answer = server.chat(ask(model, 1, vllm_xargs={"kv_policy_options": options}))
    assert answer["usage"]["completion_tokens"] == 32


def test_a_request_is_evicted_again_while_it_decodes(
    server: Server, model: Path, trace: Path
) -> None:
    def evictions(trigger: str) -> float:
        return server.metric("vllm:kv_compress_evictions_total", f'trigger="{trigger}"')

    before = {trigger: evictions(trigger) for trigger in ("prefill", "every")}
    answer = server.chat(ask(model, 6, max_tokens=4 * BLOCK, vllm_xargs={"kv_evict_every": BLOCK}))
    assert answer["usage"]["completion_tokens"] == 4 * BLOCK
    assert evictions("prefill") == before["prefill"] + 1
    assert evictions("every") >= before["every"] + 3
    assert evictions("pressure") == 0
    record = read_trace_lines(trace)[-1]
    assert record["eviction"] >= 4
    assert max(record["cached_tokens"]) < answer["usage"]["prompt_tokens"]
    wait_until_idle(server)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param({"kv_evict_every": 0}, "every must be at least 1 token", id="every-0"),
        pytest.param({"kv_budget": 7}, "kv_budget must be greater than 0", id="budget-of-7"),
        pytest.param({"kv_budget": "a"}, "kv_budget must be of type float", id="text"),
        pytest.param({"kv_policy_options": "{"}, "is not valid JSON", id="broken-json"),
        pytest.param({"kv_policy_options": '{"x": 1}'}, "unknown kv_policy_options", id="unknown"),
    ],
)
def test_a_requests_bad_settings(
    server: Server, model: Path, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        server.chat(ask(model, 77, vllm_xargs=arguments))
    assert error.value.code == 400
    assert reason in error.value.read().decode()
    assert server.chat(ask(model, 77))["usage"]["completion_tokens"] == 32


REFUSED = {"vllm_xargs": {"kv_budget": 7}}


def status(server: Server, path: str, body: dict[str, Any]) -> int:
    """Of the answer; a streamed one is read to its end."""
    try:
        with server.post(path, body) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        assert error.code != 400 or "kv_budget" in error.read().decode()
        return error.code


def endpoints(model: Path, url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Requests about an image to every endpoint that has a place for our settings."""
    chat = chat_body(model, QUESTION, url, max_tokens=2)
    messages, source = chat["messages"], {"type": "base64", "media_type": "image/png"}
    source["data"] = url.partition(",")[2]
    anthropic = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    response = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    tokens = {
        "token_ids": [257, 261, *QUESTION.encode()],  # <s>, <image> and a token a byte
        "content_parts": [{"type": "image_url", "url": url}],
    }
    return {
        "chat": ("/v1/chat/completions", chat),
        "streamed": ("/v1/chat/completions", {**chat, "stream": True}),
        "several answers": ("/v1/chat/completions", {**chat, "n": 2, "temperature": 1}),
        "batch": ("/v1/chat/completions/batch", {**chat, "messages": [messages, messages]}),
        "responses": (
            "/v1/responses",
            {"input": [{"role": "user", "content": response}], "max_output_tokens": 2},
        ),
        "messages": (
            "/v1/messages",
            {"messages": [{"role": "user", "content": anthropic}], "max_tokens": 2},
        ),
        "generate": ("/inference/v1/generate", tokens),
    }


def refused(path: str, body: dict[str, Any]) -> dict[str, Any]:
    if path == "/inference/v1/generate":
        return {**body, "sampling_params": {"extra_args": REFUSED["vllm_xargs"]}}
    return body | REFUSED


@pytest.mark.parametrize(
    "name", ["chat", "streamed", "several answers", "batch", "responses", "messages", "generate"]
)
def test_a_refusal_does_not_process_images(server: Server, model: Path, name: str) -> None:
    """On every endpoint: the cache of processed images is not even asked."""

    def lookups() -> float:
        server.chat({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1})
        return server.metric("vllm:mm_cache_queries_total")  # counted with the next answer

    path, body = endpoints(model, image_url(tiny_models.random_image(200)))[name]
    body = {"model": str(model), **body}
    before = lookups()
    assert status(server, path, refused(path, body)) == 400
    assert lookups() == before
    if name == "generate":
        body["sampling_params"] = {"max_tokens": 2}
    assert status(server, path, body) == 200
    assert lookups() > before


@pytest.fixture(scope="module", params=["vlcache", "none"])
def small_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The page reader with a cache that holds 14 of its images, with and without our flag."""
    log = tmp_path_factory.mktemp("small_cache") / f"{request.param}.log"
    image_bytes = 3 * 280 * 280 * 4  # as processed, in float32
    arguments = (
        f"--mm-processor-cache-gb={14.5 * image_bytes / 2**30}",
        "--dtype=float32",
        "--enforce-eager",
        "--max-model-len=2048",
        "--kv-cache-memory-bytes=16M",
    )
    if request.param != "none":
        arguments += (f"--kv-compress={request.param}",)
    with running(MODEL, log, *arguments) as server:
        yield server


def page(number: int) -> dict[str, Any]:
    url = image_url(tiny_models.random_image(number, (224, 224)))
    return chat_body(MODEL, "What is it?", url, max_tokens=1)


def test_an_image_that_is_known_by_its_uuid(small_cache: Server) -> None:
    """It stays known when another client's request for it is refused."""

    def ask(**part: Any) -> dict[str, Any]:
        body = page(300)
        body["messages"][0]["content"][0] |= {"uuid": "u", **part}
        return body

    chat = "/v1/chat/completions"
    assert status(small_cache, chat, ask()) == 200
    assert status(small_cache, chat, ask() | REFUSED) == 400
    assert status(small_cache, chat, ask(image_url=None) | REFUSED) == 400
    new = page(301)
    new["messages"][0]["content"].insert(0, ask()["messages"][0]["content"][0])
    assert status(small_cache, chat, new | REFUSED) == 400
    assert status(small_cache, chat, ask(image_url=None)) == 200


def test_a_full_cache_of_images(small_cache: Server) -> None:
    """A refused image pushes no other out, and is not taken for one that the engine has."""
    chat = "/v1/chat/completions"
    for refuse in (13, 0, 99):  # the newest, the oldest, a new one
        for number in range(14):
            assert status(small_cache, chat, page(number)) == 200
        assert status(small_cache, chat, page(refuse) | REFUSED) == 400
        assert status(small_cache, chat, page(100 + refuse)) == 200
        for number in (0, 1, 13, refuse):
            assert status(small_cache, chat, page(number)) == 200
    assert "cache drift" not in small_cache.log.read_text()


def test_kv_usage_falls_after_prefill(server: Server, model: Path) -> None:
    """A decoding request holds fewer blocks than its prompt fills; while it prefilled it held all.

    The gauge is sampled as an operator's Prometheus would; a prefill is short, so the peak may
    be missed, and a slow client may look only when the answer has taken its second block. The
    request is repeated until both were seen.
    """
    wait_until_idle(server)
    total = server.num_blocks() - 1
    prompt_tokens = server.chat(ask(model, 1))["usage"]["prompt_tokens"]
    prompt_blocks = -(-prompt_tokens // BLOCK)
    kept_blocks = -(-prompt_blocks // 10)
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            samples.append(server.metric("vllm:kv_cache_usage_perc") * total)

    sampler = threading.Thread(target=sample)
    sampler.start()
    decoding = []
    try:
        for seed in range(100, 200):
            deltas = stream(server, ask(model, seed, max_tokens=24))
            for index, _ in enumerate(deltas):
                if index == 4:
                    decoding.append(server.metric("vllm:kv_cache_usage_perc") * total)
            if decoding and not decoding[-1]:  # the answer had ended
                decoding.pop()
            if (
                max(samples, default=0) >= prompt_blocks
                and min(decoding, default=total) < kept_blocks + 1.5
            ):
                break
    finally:
        done.set()
        sampler.join()
    assert max(samples) >= prompt_blocks
    assert min(decoding) == pytest.approx(kept_blocks + 1, abs=0.01)
    assert kept_blocks + 1 < prompt_blocks / 3
