# SPDX-License-Identifier: Apache-2.0
"""What the tests of KV connectors ask engines, and what must hold afterwards."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput
from vllm.config import KVTransferConfig

from testing import lmcache, offloading
from testing.engine import greedy, logprobs, scheduler, settle, token_ids

NUM_TOKENS = 40
HOST_BYTES = 256 << 20  # more than is stored


def example_config(path: Path) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(path)},
    )


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The configuration of a connector by its name; servers that it needs run."""
    with contextlib.ExitStack() as servers:

        def configure(name: str) -> KVTransferConfig:
            if name == "offloading":
                return offloading.config(HOST_BYTES)
            if name == "simple":
                offloading.use_late_copies(monkeypatch)
                return offloading.simple_config(HOST_BYTES)
            if name == "files":
                return example_config(tmp_path)
            server = servers.enter_context(lmcache.running(tmp_path / "lmcache.log"))
            return lmcache.config(server.port)

        yield configure


def answers(llm: LLM, requests: list[Any], tokens: int = NUM_TOKENS) -> list[RequestOutput]:
    return llm.generate(requests, greedy(tokens), use_tqdm=False)


def abort_and_preempt(llm: LLM, requests: list[Any]) -> None:
    """Abort two requests in each of their first steps, then run more at once than fit."""
    core = llm.llm_engine
    for steps in range(1, 9):
        for request in requests[:2]:
            name = str(len(core.output_processor.request_states))
            core.add_request(name, request, greedy(64))
        for _ in range(steps):
            core.step()
        core.abort_request(list(core.output_processor.external_req_ids), internal=False)
        while core.has_unfinished_requests():
            core.step()
    for _ in range(2):
        answers(llm, requests, 200)


def assert_same(found: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert token_ids(one) == token_ids(other)
        assert logprobs(one) == pytest.approx(logprobs(other), rel=0, abs=1e-3)


def assert_nothing_leaks(llm: LLM) -> None:
    settle(llm)
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is the null block


def check_stores(llm: LLM) -> None:
    """Check every store of LMCache: its tokens are computed, and its blocks are the request's."""
    core = scheduler(llm)
    build, block = core.connector.build_connector_meta, core.block_size

    def checked(output: Any) -> Any:
        metadata = build(output)
        for store in (one for one in metadata.requests if one.direction == "STORE"):
            name, op = store.request_id, store.op
            request = core.requests[name]
            assert op.end <= request.num_computed_tokens + output.num_scheduled_tokens[name]
            (row,) = core.kv_cache_manager.get_block_ids(name)
            assert op.block_ids[0] == row[op.start // block : op.end // block]
        return metadata

    core.connector.build_connector_meta = checked
