# SPDX-License-Identifier: Apache-2.0
"""A server of LMCache, which keeps blocks in memory of its own, and engines that use it.

Import this module before the first engine starts that uses LMCache in the same process.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.config import KVTransferConfig

from testing.engine import let_numba_be_searched
from testing.server import free_port

CHUNK = 32  # tokens that LMCache stores and loads together
START_TIMEOUT_SECONDS = 120.0


def config(port: int, **extra: Any) -> KVTransferConfig:
    """A connector to the server at a port of this machine."""
    return KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"lmcache.mp.port": port, **extra},
        kv_load_failure_policy="recompute",
    )


class Server:
    """A running server. It outlives engines, and can be stopped before them."""

    def __init__(self, log: Path) -> None:
        self._log, self.port = log, free_port()
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lmcache.v1.multiprocess.server"),
                    *("--host", "localhost", "--port", str(self.port)),
                    *("--l1-size-gb", "0.25", "--eviction-policy", "LRU"),
                    *("--chunk-size", str(CHUNK), "--supported-transfer-mode", "engine_driven"),
                    "--disable-metrics",  # which need a package that LMCache requires
                ],
                env=os.environ | {"LMCACHE_TRACK_USAGE": "false"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while "LMCache cache server is running" not in log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"LMCache did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)

    def count(self, event: str) -> int:
        """How many tokens it says it has ``Stored`` or ``Retrieved``."""
        lines = (line.partition(f"{event} ")[2] for line in self._log.read_text().splitlines())
        return sum(int(line.split()[0]) for line in lines if line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(log: Path) -> Iterator[Server]:
    """A server that is stopped on exit."""
    server = Server(log)
    try:
        yield server
    finally:
        server.stop()


let_numba_be_searched()
