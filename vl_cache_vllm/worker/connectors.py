# SPDX-License-Identifier: Apache-2.0
"""Waits for LMCache, whose server copies blocks from a worker's cache while later steps run.

vLLM lets it assume that the blocks of a running request stay. Its scheduler's side does not learn
when a copy is done; its workers do. So each worker waits for the copies of the requests that it has
evicted, before the first step that may overwrite the blocks which they gave back.
"""

import time
from collections.abc import Collection

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

_POLL_SECONDS = 2e-4


def finish_stores(request_ids: Collection[str]) -> None:
    """Return when LMCache has read what it was asked to store of some requests.

    If its server stops answering, LMCache gives up the copies itself, and this returns as well.
    """
    if not request_ids or not has_kv_transfer_group():
        return
    adapter = getattr(get_kv_transfer_group(), "worker_adapter", None)
    if adapter is None:  # another connector
        return
    waiting = [future for name in request_ids if (future := adapter.store_futures.get(name))]
    while adapter.is_healthy and not all(future.query() for future in waiting):
        time.sleep(_POLL_SECONDS)
