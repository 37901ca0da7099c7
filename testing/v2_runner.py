# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM's V2 model runner: what `vl_cache_vllm.worker.v2.V2Adapter` reads of it."""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


def v2_runner(
    max_num_reqs: int,
    graph_sizes: Sequence[int],
    gather: Callable[..., tuple[Any, int | None]],
    layers: Iterable[str] = ("layer",),
    data_parallel_size: int = 1,
) -> tuple[Any, SimpleNamespace]:
    """A runner without a model.

    Args:
        max_num_reqs: requests that it may hold at once.
        graph_sizes: tokens of its CUDA graphs.
        gather: its ``gather_batch_req_state``.
        layers: names of the layers, which share their attention metadata.
        data_parallel_size: number of engines.

    Returns:
        The runner, and the attention metadata of every step.
    """
    metadata, names = SimpleNamespace(), tuple(layers)
    runner = SimpleNamespace(
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=list(graph_sizes)),
            parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        ),
        max_num_reqs=max_num_reqs,
        req_states=SimpleNamespace(num_computed_tokens_np=np.zeros(max_num_reqs, int)),
        model_config=SimpleNamespace(hf_config=SimpleNamespace()),
        model_state=SimpleNamespace(
            add_request=lambda *_: None,
            remove_request=lambda *_: None,
            prepare_attn=lambda *_, **__: dict.fromkeys(names, metadata),
        ),
        gather_batch_req_state=gather,
    )
    return runner, metadata
