# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3 on a CPU, written from its contract.

The sources are the docstring of ``flash_attn_varlen_func`` and, for the division of work,
``hopper/flash_prepare_scheduler.cu``, ``block.h`` and ``flash_fwd_combine_kernel.h`` of
vllm-project/flash-attention. Scheduler metadata is made by one call and read by another, for
lengths that may be shorter: it holds the number of splits of each request, and no key length.

Each request's keys are divided into blocks and these into splits. Every split writes its partial
output and the logarithm of its sum of exponentials to buffers, which are as large as the largest
number of splits that the caller allows. A last pass combines them.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

BLOCK_KEYS = 16  # keys of a block; on a GPU 80 to 224
NUM_SMS = 40  # on a GPU 132
MAX_SPLITS = 32
"""Upper bound of splits in graphs, as vLLM's ``flash_attn_max_num_splits_for_cuda_graph``."""


def cdiv(number: int, divisor: int) -> int:
    return -(-number // divisor)


def metadata_size(batch_size: int) -> int:
    """Entries of scheduler metadata: a semaphore and four vectors of padded length."""
    return 1 + cdiv(batch_size, 4) * 4 * 4


def dynamic_splits(
    key_lengths: list[int], query_lengths: list[int], num_heads: int, static_splits: int
) -> list[int]:
    """Splits of each request: in proportion to its share of the batch's work (prepare_varlen).

    Args:
        key_lengths: of the requests, when the metadata is made.
        query_lengths: of the requests.
        num_heads: KV heads.
        static_splits: upper bound.
    """
    blocks = [cdiv(length, BLOCK_KEYS) for length in key_lengths]
    total = sum(n * cdiv(q, 64) for n, q in zip(blocks, query_lengths, strict=True))
    blocks_per_sm = max(1, math.ceil(total * 1.1 * num_heads / NUM_SMS))
    return [max(1, min(cdiv(n, blocks_per_sm), static_splits)) for n in blocks]


def key_blocks(length: int, split: int, num_splits: int) -> range:
    """Blocks of keys that a split visits, by the length that is read (get_n_block_min_max)."""
    num_blocks = cdiv(length, BLOCK_KEYS)
    per_split = cdiv(num_blocks, num_splits)
    first = split * per_split
    return range(first, max(first, min(first + per_split, num_blocks)))


def static_splits_of(num_splits: int, max_seqlen_k: int) -> int:
    """Size of the buffers for partial outputs; 0 asks for a heuristic of the longest length."""
    return num_splits if num_splits > 0 else max(1, min(128, cdiv(max_seqlen_k, BLOCK_KEYS)))


class FlashAttention:
    """Stands in for vLLM's functions of FlashAttention 3, and counts what they were asked for."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def get_scheduler_metadata(
        self,
        *,
        batch_size: int,
        max_seqlen_k: int,
        num_heads_kv: int,
        cache_seqlens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        num_splits: int,
        **_: Any,
    ) -> torch.Tensor:
        """Metadata of a batch, int32; the splits of request i are at ``1 + padded + i``."""
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (batch_size,)
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.shape == (batch_size + 1,)
        found = torch.zeros(metadata_size(batch_size), dtype=torch.int32)
        padded = cdiv(batch_size, 4) * 4
        query_lengths = cu_seqlens_q.diff().tolist()
        splits = dynamic_splits(
            cache_seqlens.tolist(),
            query_lengths,
            num_heads_kv,
            static_splits_of(num_splits, max_seqlen_k),
        )
        found[1 : 1 + batch_size] = torch.tensor([cdiv(q, 64) for q in query_lengths])
        found[1 + padded : 1 + padded + batch_size] = torch.tensor(splits)
        self.seen["metadata"] += 1
        return found

    def reshape_and_cache_flash(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *_: Any,
    ) -> None:
        """Write as many keys and values as there are slots; none to slot -1.

        Args:
            key: ``[>= num_slots, num_kv_heads, head_size]``.
            value: as ``key``.
            key_cache: ``[num_pages, block_size, num_kv_heads, head_size]``.
            value_cache: as ``key_cache``.
            slot_mapping: int64 ``[num_slots]``.
        """
        assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
        assert len(slot_mapping) <= len(key)
        block_size = key_cache.shape[1]
        used = slot_mapping >= 0
        slots = slot_mapping[used]
        assert len(slots.unique()) == len(slots), "two tokens share a slot"
        place = slots // block_size, slots % block_size
        key_cache[place] = key[: len(slot_mapping)][used]
        value_cache[place] = value[: len(slot_mapping)][used]

    def flash_attn_varlen_func(
        self,
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_q: int,
        seqused_k: torch.Tensor,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        block_table: torch.Tensor,
        softcap: float = 0.0,
        window_size: list[int] | None = None,
        scheduler_metadata: torch.Tensor | None = None,
        num_splits: int = 0,
        fa_version: int = 3,
        **others: Any,
    ) -> torch.Tensor:
        """Arguments and results as the function's own docstring says; keys in pages only."""
        self._check(q, k, v, out, cu_seqlens_q, seqused_k, block_table)
        assert fa_version == 3 and causal and not softcap
        assert window_size is None or tuple(window_size) == (-1, -1)
        assert all(others[name] is None for name in ("alibi_slopes", "s_aux", "mask_mod"))
        batch_size, num_kv_heads = len(seqused_k), k.shape[2]
        starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
        assert max(lengths) <= max_seqlen_k
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        static = static_splits_of(num_splits, max_seqlen_k)
        if scheduler_metadata is None:
            queries = cu_seqlens_q.diff().tolist()
            splits = dynamic_splits(lengths, queries, num_kv_heads, static)
        else:
            assert scheduler_metadata.dtype == torch.int32
            assert len(scheduler_metadata) == metadata_size(batch_size)
            padded = cdiv(batch_size, 4) * 4
            splits = scheduler_metadata[1 + padded : 1 + padded + batch_size].tolist()
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            if start == end:
                self.seen["padded rows"] += 1
                continue
            pages = block_table[row, : cdiv(lengths[row], k.shape[1])].long()
            keys, values = (x[pages].flatten(0, 1)[: lengths[row]].float() for x in (k, v))
            self.seen["split rows"] += splits[row] > 1
            out[start:end] = _attend(
                q[start:end].float() * softmax_scale, keys, values, splits[row], static
            ).to(out.dtype)
        self.seen["calls"] += 1
        return out

    def _check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
    ) -> None:
        """The checks of flash_api.cpp, and that every page of a row exists."""
        batch_size = len(seqused_k)
        assert seqused_k.dtype == cu_seqlens_q.dtype == block_table.dtype == torch.int32
        assert cu_seqlens_q.shape == (batch_size + 1,)
        assert block_table.shape[0] == batch_size and block_table.stride(-1) == 1
        assert seqused_k.is_contiguous() and cu_seqlens_q.is_contiguous()
        assert q.dtype == k.dtype == v.dtype == out.dtype and out.shape == q.shape
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == 1
        assert q.shape[1] % k.shape[2] == 0 and k.shape == v.shape
        assert int(cu_seqlens_q[-1]) <= len(q)
        pages = block_table.shape[1] * k.shape[1]
        assert int(seqused_k.max()) <= pages, "a row is longer than its table"
        assert int(block_table.min()) >= 0 and int(block_table.max()) < len(k)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, splits: int, static: int
) -> torch.Tensor:
    """Causal attention of the last queries, split by split, then combined.

    Args:
        query: scaled, ``[num_queries, num_heads, head_size]``.
        keys: ``[length, num_kv_heads, head_size]``.
        values: as ``keys``.
        splits: of this request.
        static: splits that the buffers have room for.
    """
    num_queries, num_heads, head_size = query.shape
    length = len(keys)
    group = num_heads // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    logits = query.transpose(0, 1) @ keys.transpose(1, 2)  # [num_heads, num_queries, length]
    position = torch.arange(length)
    future = position > position[length - num_queries :, None]
    logits = logits.masked_fill(future, -torch.inf)
    partial = torch.full((static, num_heads, num_queries, head_size), torch.nan)
    lse = torch.full((static, num_heads, num_queries), torch.nan)
    for split in range(splits):
        blocks = key_blocks(length, split, splits)
        part = slice(blocks.start * BLOCK_KEYS, max(blocks.start, blocks.stop) * BLOCK_KEYS)
        total = logits[..., part].logsumexp(-1)  # -inf: no key of the split is seen
        weights = (logits[..., part] - total[..., None]).exp().nan_to_num(0.0)
        partial[split] = weights @ values[:, part]  # out of the buffer's range: an error
        lse[split] = total
    shares = lse[:splits].softmax(0).nan_to_num(0.0)
    combined = (shares[..., None] * partial[:splits]).sum(0)
    return combined.transpose(0, 1)


@contextlib.contextmanager
def installed() -> Iterator[FlashAttention]:
    """Let vLLM's FlashAttention backend call a `FlashAttention`, with metadata as for graphs."""
    stand_in = FlashAttention()
    init = FlashAttentionMetadataBuilder.__init__

    def init_for_graphs(self: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
        init(self, spec, names, config, device)
        max_num_reqs = config.scheduler_config.max_num_seqs
        self.use_full_cuda_graph, self.max_cudagraph_size = True, max_num_reqs
        self.max_num_splits = MAX_SPLITS
        self.scheduler_metadata = torch.zeros(metadata_size(max_num_reqs), dtype=torch.int32)

    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        for name in (
            "flash_attn_varlen_func",
            "get_scheduler_metadata",
            "reshape_and_cache_flash",
        ):
            patch(flash_attn, name, getattr(stand_in, name))
        patch(flash_attn, "get_flash_attn_version", lambda **_: 3)
        patch(flash_attn, "flash_attn_supports_quant_query_input", lambda: False)
        patch(FlashAttentionMetadataBuilder, "__init__", init_for_graphs)
        yield stand_in


class Replay:
    """Runs attention as a CUDA graph replays it: with the tensors of the step that was captured.

    The first call of a layer for a number of requests is the capture. Every later one gets the same
    tensors and host numbers, so that whatever is not updated in place is stale. Queries, keys,
    values and outputs are activations, which a graph keeps at its own addresses.
    """

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self.is_graph = False
        """Whether the running step is one of a graph."""
        self.replayed = 0
        self._captured: dict[tuple[str, int], Any] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Replay the attention of all engines."""
        forward = FlashAttentionImpl.forward
        update = FlashAttentionImpl.do_kv_cache_update

        def replayed_forward(
            impl: Any, layer: Any, q: Any, k: Any, v: Any, cache: Any, metadata: Any, *rest: Any
        ) -> Any:
            if metadata is not None and self.is_graph:
                number = len(metadata.seq_lens)
                # vLLM captures graphs for the longest request.
                longest = dataclasses.replace(metadata, max_seq_len=self._max_model_len)
                metadata = self._captured_or((f"{layer.layer_name} forward", number), longest)
            return forward(impl, layer, q, k, v, cache, metadata, *rest)

        def replayed_update(
            impl: Any, layer: Any, k: Any, v: Any, cache: Any, slots: torch.Tensor
        ) -> None:
            if self.is_graph:
                slots = self._captured_or((f"{layer.layer_name} update", len(slots)), slots)
            update(impl, layer, k, v, cache, slots)

        with (
            mock.patch.object(FlashAttentionImpl, "forward", replayed_forward),
            mock.patch.object(FlashAttentionImpl, "do_kv_cache_update", replayed_update),
        ):
            yield

    def _captured_or(self, key: tuple[str, int], now: Any) -> Any:
        self.replayed += key in self._captured
        return self._captured.setdefault(key, now)
