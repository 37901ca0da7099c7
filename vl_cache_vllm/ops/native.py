# SPDX-License-Identifier: Apache-2.0
"""The C++ functions of ``csrc/`` as torch operators ``vl_cache::*``, if they have been built.

They are a plain C library: the build needs a compiler but not torch, and one build works with every
version of torch. C++ receives pointers and numbers, so this module checks types and strides. Each
operator also has a fake implementation, which returns tensors of the right shape without computing;
``torch.compile`` and ``FakeTensorMode`` use it.
"""

import ctypes
import importlib.machinery
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vl_cache_vllm.ops.decay import decay_frame, inherits_nothing
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePool

if TYPE_CHECKING:
    from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables
    from vl_cache_vllm.ops.observe import AttentionParams


INTERFACE = 5
"""Number of the C functions' signatures, as in csrc/interface.cpp; change both together."""


def _load() -> ctypes.CDLL | None:
    """The library that ``setup.py`` built, or None if there is none with these signatures."""
    package = Path(__file__).parents[1]
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := package / f"_native{suffix}").exists():
            library = ctypes.CDLL(str(path))  # after torch, so that both share one OpenMP runtime
            if hasattr(library, "vlc_interface") and library.vlc_interface() == INTERFACE:
                return library
            warnings.warn(
                f"{path} was built from other sources, so that the slower torch operations are "
                "used; build it again: pip install -e .",
                stacklevel=2,
            )
    return None


_library = _load()


def is_built() -> bool:
    """Whether the C++ library has been built and loaded."""
    return _library is not None


def _observe(
    query: torch.Tensor,
    key: torch.Tensor,
    first_position: int,
    scale: float,
    threshold: float,
    softcap: float,
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
    column_maxima: torch.Tensor | None = None,
) -> None:
    num_queries, num_heads, head_size = query.shape
    num_keys = first_position + num_queries
    key = key[:, :num_keys].float()
    key = key if key.stride(2) == 1 else key.contiguous()
    assert key.shape[1] == num_keys <= column_sums.shape[1] and column_sums.stride(1) == 1
    assert column_sums.dtype == torch.float32 and dense_entries.dtype == torch.int64
    if column_maxima is not None:
        assert num_keys <= column_maxima.shape[1] and column_maxima.stride(1) == 1
        assert column_maxima.dtype == torch.float32
    _call(
        "vlc_observe",
        query.float().contiguous(),
        key,
        key.stride(0),
        key.stride(1),
        None if query_weights is None else query_weights.float().contiguous(),
        column_sums,
        column_sums.stride(0),
        column_maxima,
        0 if column_maxima is None else column_maxima.stride(0),
        dense_entries,
        num_queries,
        num_heads,
        key.shape[0],
        head_size,
        first_position,
        ctypes.c_float(scale),
        ctypes.c_float(math.log(threshold)),
        ctypes.c_float(softcap),
    )


def _select(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    positions = torch.empty(*scores.shape[:2], max_kept, dtype=torch.int32)
    _call(
        "vlc_select",
        scores.float().contiguous(),
        _int64(num_tokens),
        _int64(kept_tokens),
        None if precedence is None else _int64(precedence),
        positions,
        *scores.shape,
        max_kept,
        ctypes.c_double(recent_ratio),
    )
    return positions


def _rank(scores: torch.Tensor) -> torch.Tensor:
    assert scores.dtype == torch.float32
    ranks = torch.empty(scores.shape, dtype=torch.int64)
    num_tokens = scores.shape[-1]
    rows = scores.numel() // max(1, num_tokens)
    _call("vlc_rank", scores.contiguous(), ranks, rows, num_tokens)
    return ranks


def _look_ahead(
    scores: torch.Tensor, growth: torch.Tensor, shrinkage: torch.Tensor, of_frame: float
) -> torch.Tensor:
    assert growth.dtype == shrinkage.dtype == torch.float64
    scores = scores.float().contiguous()
    inherited = torch.empty_like(scores)
    num_tokens = scores.shape[-1]
    rows = scores.numel() // max(1, num_tokens)
    _call(
        "vlc_look_ahead",
        scores,
        growth,
        shrinkage,
        inherited,
        rows,
        num_tokens,
        len(growth),
        ctypes.c_double(of_frame),
    )
    return inherited


def _compact(
    pages: torch.Tensor,
    key_index: torch.Tensor,
    value_index: torch.Tensor,
    source_pages: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
    first_layer: int,
    layer_stride: int,
    block_stride: int,
) -> None:
    assert pages.is_contiguous() and pages.element_size() in (1, 2, 4)
    assert source_pages.dtype == torch.int32 and source_pages.stride(1) == 1
    _call(
        "vlc_compact",
        pages,
        _int64(key_index),
        _int64(value_index),
        source_pages,
        source_pages.stride(0),
        _int64(kept_row),
        _int64(kept_pages),
        positions.int().contiguous(),
        pages.element_size(),
        kept_pages.shape[0],
        first_layer,
        *positions.shape[:2],
        pages.shape[2],
        *key_index.shape,
        positions.shape[2],
        layer_stride,
        block_stride,
    )


def _layer_tables(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    evicted_tokens: torch.Tensor,
    kept_blocks: torch.Tensor,
    kept_pages: torch.Tensor,
    block_size: int,
    layer_stride: int,
    block_stride: int,
    out_block_table: torch.Tensor,
    out_seq_lens: torch.Tensor,
    out_slot_mapping: torch.Tensor,
) -> None:
    num_layers, num_reqs, width = out_block_table.shape
    for out, dtype in (
        (out_block_table, torch.int32),
        (out_seq_lens, torch.int32),
        (out_slot_mapping, torch.int64),
    ):
        assert out.is_contiguous() and out.dtype == dtype
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1
    _call(
        "vlc_layer_tables",
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        query_start_loc.int().contiguous(),
        seq_lens.int().contiguous(),
        _int64(evicted_tokens),
        _int64(kept_blocks),
        kept_blocks.shape[1],
        _int64(kept_pages),
        out_block_table,
        out_seq_lens,
        out_slot_mapping,
        num_layers,
        num_reqs,
        width,
        out_slot_mapping.shape[1],
        block_size,
        layer_stride,
        block_stride,
    )


def _int64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.long().contiguous()


def _call(
    name: str, *arguments: torch.Tensor | int | ctypes.c_float | ctypes.c_double | None
) -> None:
    """Call a C function; a tensor is passed as the address of its first element."""
    getattr(_library, name)(
        *(
            ctypes.c_void_p(argument.data_ptr())
            if isinstance(argument, torch.Tensor)
            else ctypes.c_int64(argument)
            if isinstance(argument, int)
            else argument
            for argument in arguments
        )
    )


def _fake_select(
    scores: torch.Tensor,
    num_tokens: torch.Tensor,
    kept_tokens: torch.Tensor,
    recent_ratio: float,
    max_kept: int,
    precedence: torch.Tensor | None = None,
) -> torch.Tensor:
    return scores.new_empty((*scores.shape[:2], max_kept), dtype=torch.int32)


def _fake_rank(scores: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int64)


def _fake_look_ahead(
    scores: torch.Tensor, growth: torch.Tensor, shrinkage: torch.Tensor, of_frame: float
) -> torch.Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


def _fake_in_place(*args: Any) -> None:
    """An operator that writes its arguments and returns nothing."""


@dataclass(frozen=True)
class _Operator:
    run: Callable[..., Any]
    mutates: tuple[str, ...] = ()  # names of the arguments that it writes
    fake: Callable[..., Any] = _fake_in_place


_OPERATORS = {
    "observe": _Operator(_observe, ("column_sums", "dense_entries", "column_maxima")),
    "select": _Operator(_select, fake=_fake_select),
    "rank": _Operator(_rank, fake=_fake_rank),
    "look_ahead": _Operator(_look_ahead, fake=_fake_look_ahead),
    "compact": _Operator(_compact, ("pages",)),
    "layer_tables": _Operator(
        _layer_tables, ("out_block_table", "out_seq_lens", "out_slot_mapping")
    ),
}

if _library is not None:
    _namespace = torch.library.Library("vl_cache", "DEF")
    for _name, _operator in _OPERATORS.items():
        _schema = torch.library.infer_schema(_operator.run, mutates_args=_operator.mutates)
        _namespace.define(_name + _schema)
        _namespace.impl(_name, _operator.run, "CPU")
        torch.library.register_fake(f"vl_cache::{_name}", _operator.fake, lib=_namespace)


# --------------------------------------------------------------------------------------------------
# The operations, with the arguments of their torch functions

OPERATIONS = frozenset(_OPERATORS)


def observe(
    query: torch.Tensor,
    key: torch.Tensor | PagedKeys,
    first_position: int,
    params: "AttentionParams",
    column_sums: torch.Tensor,
    dense_entries: torch.Tensor,
    query_weights: torch.Tensor | None = None,
    column_maxima: torch.Tensor | None = None,
    num_keys: torch.Tensor | None = None,
) -> None:
    torch.ops.vl_cache.observe(
        query,
        key.read() if isinstance(key, PagedKeys) else key,
        first_position if num_keys is None else int(num_keys) - query.shape[0],
        params.scale,
        params.threshold,
        params.softcap,
        column_sums,
        dense_entries,
        query_weights,
        column_maxima,
    )


def select(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.ops.vl_cache.select(*args, **kwargs)


def rank(scores: torch.Tensor) -> torch.Tensor:
    return torch.ops.vl_cache.rank(scores)


def look_ahead(scores: torch.Tensor, length: float) -> torch.Tensor:
    if inherits_nothing(length):
        return scores.clone()
    decay = decay_frame(length, scores.device)
    return torch.ops.vl_cache.look_ahead(scores, decay.growth, decay.shrinkage, decay.of_frame)


def compact(
    pool: PagePool,
    source_pages: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
    first_layer: int = 0,
) -> None:
    """See the operation.

    Raises:
        ValueError: if the pages are not contiguous, as they are in every CPU cache.
    """
    if not pool.pages.is_contiguous():
        raise ValueError("C++ compaction needs the cells of a head together, as CPU caches have")
    torch.ops.vl_cache.compact(
        pool.pages,
        pool.packing.key_index,
        pool.packing.value_index,
        source_pages,
        kept_row,
        kept_pages,
        positions,
        first_layer,
        pool.layer_stride,
        pool.block_stride,
    )


def layer_tables(
    pool: PagePool,
    evicted: "EvictedRows",
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: "LayerTables",
) -> None:
    torch.ops.vl_cache.layer_tables(
        block_table,
        query_start_loc,
        seq_lens,
        evicted.evicted_tokens,
        evicted.kept_blocks,
        evicted.kept_pages,
        pool.block_size,
        pool.layer_stride,
        pool.block_stride,
        out.block_table,
        out.seq_lens,
        out.slot_mapping,
    )
