# SPDX-License-Identifier: Apache-2.0
"""A synthetic prompt on which every device operation can be called.

No operation reads what another one wrote: inputs come from a generator of random numbers. So a
wrong operation is seen in its own results only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vl_cache_vllm.ops.apportion import apportion
from vl_cache_vllm.ops.compact import Move, compact_all
from vl_cache_vllm.ops.layer_tables import EvictedRows, LayerTables, layer_tables
from vl_cache_vllm.ops.look_ahead import look_ahead
from vl_cache_vllm.ops.observe import (
    AttentionParams,
    RequestObservation,
    observe,
    observe_layers,
)
from vl_cache_vllm.ops.page_pool import PagedKeys, PagePacking, PagePool
from vl_cache_vllm.ops.rank import merge_ranking, rank
from vl_cache_vllm.ops.select import Candidates, select_all

SHORT_DECAY, LONG_DECAY = 1.0, 80.0  # tokens, as in vlcache-plus


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a language model's attention."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int


ATTENTION_SHAPES = {
    "0.5b": AttentionShape(24, 14, 2, 64),  # Qwen2-0.5B
    "7b-mha": AttentionShape(32, 32, 32, 128),  # LLaVA-1.5-7B
    "7b-gqa": AttentionShape(32, 32, 8, 128),  # LLaVA-NeXT-Mistral-7B
    "8b-gqa": AttentionShape(36, 32, 8, 128),  # Qwen3-VL-8B
}


@dataclass(frozen=True)
class Case:
    """Sizes of a prompt, and how it is observed and evicted."""

    shape: AttentionShape
    tokens: int
    block_size: int
    num_queries: int = 64
    """Observed queries; they are the last ones of the prompt."""
    dtype: torch.dtype = torch.bfloat16
    layers_outermost: bool = True
    """Order of the pages: all pages of a layer side by side, or all of a block."""
    heads_interleaved: bool = False
    """Cells of a page: the heads of a token side by side, or the tokens of a head."""
    softcap: float = 0.0
    threshold: float = 0.01
    weighted: bool = False
    """Queries have weights."""
    grouped: bool = False
    """Tokens have groups of precedence."""
    recent_ratio: float = 0.1
    budget: float = 0.1
    decoding: int = 5
    """Requests in the step of `SyntheticPrompt.layer_tables`."""

    def __str__(self) -> str:
        shape, dtype = self.shape, str(self.dtype).removeprefix("torch.")
        sizes = f"{shape.num_layers} layers, heads {shape.num_heads}/{shape.num_kv_heads} of "
        return sizes + f"{shape.head_size}, {self.tokens} tokens, block {self.block_size}, {dtype}"


@dataclass(frozen=True)
class Operation:
    """One call of a device operation, as made by an eviction or a step."""

    name: str
    run: Callable[[], Any]
    num_bytes: int
    """Minimum number of bytes that it reads and writes."""
    copies: bool = False
    """It copies from the host, so a CUDA graph cannot contain it."""


class SyntheticPrompt:
    """A prompt of random keys and values in its own pool, with blocks for its kept pages.

    Pages have the layout of vLLM's GPU caches: the key and the value of a token and head are
    adjacent.

    Args:
        case: sizes.
        device: where the random numbers are drawn.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        shape, block_size = case.shape, case.block_size
        num_layers, num_kv_heads = shape.num_layers, shape.num_kv_heads
        self._generator = torch.Generator(device).manual_seed(0)
        self.prompt_blocks = -(-case.tokens // block_size)
        self.kept_blocks = max(1, round(case.budget * self.prompt_blocks))
        self.decode_blocks = 3
        num_blocks = self.prompt_blocks + self.kept_blocks + self.decode_blocks
        self.total_pages = self.kept_blocks * num_layers
        full_pages = case.tokens // block_size  # the tokens behind them stay where they are
        self.max_pages = min(full_pages, self.total_pages - num_layers + 1)
        content = 2 * shape.head_size
        token_stride = content * (num_kv_heads if case.heads_interleaved else 1)
        pages = self._noise(num_blocks * num_layers, num_kv_heads, block_size * content)
        if case.heads_interleaved:
            last_token = (block_size - 1) * token_stride
            pages = pages.as_strided(
                (*pages.shape[:2], last_token + content), (pages.stride(0), content, 1)
            )
        self.pool = PagePool(
            pages,
            PagePacking.side_by_side(block_size, shape.head_size, token_stride),
            num_layers,
            *((num_blocks, 1) if case.layers_outermost else (1, num_layers)),
        )
        self.row = torch.randperm(num_blocks, generator=self._generator, device=device)
        self.query = self._noise(case.num_queries, shape.num_heads, shape.head_size)
        layers = range(num_layers)
        self.held = torch.stack([self.query.roll(layer, 0) for layer in layers])  # of all layers
        self.query_weights = self._uniform(num_kv_heads, case.num_queries)
        self.weights = self._uniform(num_layers).double() + 0.01
        self.scores = self._uniform(num_layers, num_kv_heads, case.tokens) - 0.5
        self.scores[..., ::3] = self.scores[..., :1]  # many equal ones
        self.attention = self.scores.abs() ** 8
        self.merged = self._uniform(*self.scores.shape) / case.tokens
        self.shares = torch.tensor([0.1375, 0.4125], device=device)
        self.precedence = (3 * self._uniform(case.tokens)).long() - 1
        self.kept_pages = self._divide()
        layer = torch.arange(num_layers, device=device)
        # After a first eviction layers differ in length.
        self.own_pages = (full_pages - layer % 3).maximum(self.kept_pages)
        self.capacity = int(self.own_pages.sum())
        order = self._uniform(num_layers, num_kv_heads, full_pages * block_size).argsort(-1)
        self.positions = order[..., : self.max_pages * block_size].sort().values.int()
        self.source = self.pool.block_pages(self._prompt_row())
        self.step = self._mixed_step()

    @property
    def device(self) -> torch.device:
        return self.row.device

    def _noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(
            shape,
            generator=self._generator,
            device=self._generator.device,
            dtype=self.case.dtype,
        )

    def _uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator, device=self._generator.device)

    def _divide(self) -> torch.Tensor:
        """Pages of each layer, int64 ``[num_layers]``: different ones, with the right sum."""
        pages = torch.ones(self.case.shape.num_layers, dtype=torch.int64)
        left = self.total_pages - len(pages)
        for layer in range(len(pages)):
            more = min(left, self.max_pages - 1, left if layer % 3 == 1 else (left + 1) // 2)
            pages[layer] += more
            left -= more
        for layer in range(len(pages)):  # what the caps left over
            more = min(left, self.max_pages - int(pages[layer]))
            pages[layer] += more
            left -= more
        assert left == 0
        return pages.to(self._generator.device)

    def _mixed_step(self) -> tuple[Any, ...]:
        """Arguments of `layer_tables` for a step of evicted and other requests.

        Of the requests, every third is not evicted; one of these runs a chunk of its prefill. Two
        rows and some tokens are the padding of a CUDA graph.
        """
        case, device, num_reqs = self.case, self.row.device, self.case.decoding
        is_evicted = [i % 3 != 1 for i in range(num_reqs)]
        decoded = [1 + (i * 7) % (2 * case.block_size) for i in range(num_reqs)]
        lengths, scheduled = [], []
        for request in range(num_reqs):
            is_prefill = not is_evicted[request] and request % 2 == 1
            lengths.append(case.tokens + (0 if is_prefill else decoded[request]))
            scheduled.append(min(case.tokens, case.block_size + 3) if is_prefill else 1)
        starts = torch.tensor([0, *scheduled]).cumsum(0).int()
        padded = num_reqs + 2
        starts = torch.cat((starts, starts[-1:].expand(2)))

        def of_evicted(value: int) -> torch.Tensor:
            values = [value * evicted for evicted in is_evicted] + [0, 0]
            return torch.tensor(values, dtype=torch.int64, device=device)

        evicted = EvictedRows(
            of_evicted(case.tokens // case.block_size * case.block_size),
            self._kept_row().expand(padded, -1).contiguous(),
            of_evicted(1)[:, None] * self.kept_pages,
        )
        without_kept = self.row[self.kept_blocks :]
        table = without_kept.int().expand(padded, -1).contiguous()
        for request, rolled in enumerate(table[:num_reqs]):
            table[request] = rolled.roll(request)
        num_tokens, width = int(starts[-1]) + 5, self.prompt_blocks + self.decode_blocks
        num_layers = case.shape.num_layers

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(num_layers, *shape, dtype=dtype, device=device)

        return (
            evicted,
            table,
            starts.to(device),
            torch.tensor([*lengths, 0, 0], dtype=torch.int32, device=device),
            LayerTables(empty(padded, width), empty(padded), empty(num_tokens, dtype=torch.int64)),
        )

    def to(self, device: torch.device) -> SyntheticPrompt:
        """A copy on another device, or a second one on the same."""
        other = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(other, name, _copy(value, device))
        # An interleaved pool is a view that repeats cells: copy the cells, keep the view.
        pages = self.pool.pages
        cells = pages.as_strided((pages.untyped_storage().nbytes() // pages.itemsize,), (1,), 0)
        view = _copy(cells, device).as_strided(pages.shape, pages.stride())
        other.pool = replace(self.pool, pages=view)
        return other

    # ----------------------------------------------------------------------------------------------
    # The operations

    def observe(self) -> dict[str, torch.Tensor]:
        """Observe all layers; sums, maxima and counts of dense entries, each of all layers.

        Also one query whose number of keys only the device knows, as in a later eviction.
        """
        case, shape = self.case, self.case.shape
        columns = torch.zeros(
            2, shape.num_layers, shape.num_kv_heads, case.tokens, device=self.device
        )
        dense = torch.zeros(shape.num_layers, dtype=torch.int64, device=self.device)
        self.observe_into(columns[0], columns[1], dense)
        later = torch.zeros_like(columns)
        self._observe_one(later[0], later[1], torch.zeros_like(dense))
        return {
            "sums": columns[0],
            "maxima": columns[1],
            "dense entries": dense,
            "sums of one query": later[0],
            "maxima of one query": later[1],
        }

    def _observe_one(self, sums: torch.Tensor, maxima: torch.Tensor, dense: torch.Tensor) -> None:
        case = self.case
        params = AttentionParams(case.shape.head_size**-0.5, case.softcap, case.threshold)
        pages = self.pool.block_pages(self._prompt_row())
        for layer in range(case.shape.num_layers):
            observe(
                self.query[:1],
                PagedKeys(self.pool, pages[layer]),
                case.tokens - 1,
                params,
                sums[layer],
                dense[layer],
                None,
                maxima[layer],
                num_keys=self.own_pages[layer] * self.block_size,
            )

    def observe_layers(self) -> dict[str, torch.Tensor]:
        """As `observe`; the one query is that of a second request in the same step.

        The first layer is observed in one call, and the others, if any, in another one.
        """
        sums, maxima, later, later_maxima = torch.zeros(
            4,
            self.case.shape.num_layers,
            self.case.shape.num_kv_heads,
            self.case.tokens,
            device=self.device,
        )
        dense = torch.zeros(2, self.case.shape.num_layers, dtype=torch.int64, device=self.device)
        prompt = self._layers_request(sums, maxima, dense[0])
        pages = self.pool.block_pages(self._prompt_row()).int()
        lengths = (self.own_pages * self.block_size).int()
        one = RequestObservation(
            self.case.num_queries - 1,
            1,
            self.case.tokens,
            self.case.threshold,
            pages,
            later,
            dense[1],
            later_maxima,
            num_keys=lengths,
        )
        num_layers = self.case.shape.num_layers
        for first, end in ((0, 1), (1, num_layers)):
            if first < num_layers:
                self._observe_layers([prompt, one], slice(first, end))
        return {
            "sums": sums,
            "maxima": maxima,
            "dense entries": dense[0],
            "sums of one query": later,
            "maxima of one query": later_maxima,
        }

    def _layers_request(
        self, sums: torch.Tensor, maxima: torch.Tensor | None, dense: torch.Tensor
    ) -> RequestObservation:
        case = self.case
        return RequestObservation(
            0,
            case.num_queries,
            case.tokens,
            case.threshold,
            self._prompt_row().int(),
            sums,
            dense,
            maxima,
            case.num_queries // 2 if case.weighted else None,
        )

    def _observe_layers(
        self, requests: list[RequestObservation], layers: slice | None = None
    ) -> None:
        """Observe some layers of requests that are given with all; by default all."""
        case, layers = self.case, layers or slice(0, len(self.held))
        scales = [case.shape.head_size**-0.5 / (1 + layer) for layer in range(len(self.held))]
        observe_layers(
            self.held[layers],
            self.pool,
            scales[layers],
            case.softcap,
            [request.of_layers(layers) for request in requests],
            layers.start,
        )

    def observe_into(
        self, sums: torch.Tensor, maxima: torch.Tensor | None, dense: torch.Tensor
    ) -> None:
        """As `observe`, added to tensors of the caller's; ``maxima`` None: without maxima."""
        case = self.case
        params = AttentionParams(case.shape.head_size**-0.5, case.softcap, case.threshold)
        for layer in range(case.shape.num_layers):
            observe(
                self.query,
                PagedKeys.of_blocks(self.pool, layer, self._prompt_row()),
                case.tokens - case.num_queries,
                params,
                sums[layer],
                dense[layer],
                self.query_weights if case.weighted else None,
                None if maxima is None else maxima[layer],
            )

    def apportion(self) -> dict[str, torch.Tensor]:
        """Pages for random, equal and steep weights; the last meet the cap and the floor."""
        steep = 10.0 ** -torch.arange(len(self.weights), device=self.device).double()
        weights = self.weights, torch.ones_like(self.weights), steep
        return {"": self._apportion(torch.stack(weights))}

    def _apportion(self, weights: torch.Tensor) -> torch.Tensor:
        num_reqs = len(weights)
        own_pages = self.own_pages.expand(num_reqs, -1)
        return apportion(
            weights, [self.total_pages] * num_reqs, own_pages, [self.capacity] * num_reqs
        )

    def select(self) -> dict[str, torch.Tensor]:
        """The first layer, and the others, as in a step that evicts several requests."""
        positions = torch.cat(self._select(self._parts()))
        kept = (self.kept_pages * self.block_size).tolist()  # entries beyond have no meaning
        parts = [row[:, :count] for row, count in zip(positions, kept, strict=True)]
        return {"": torch.cat(parts, 1)}

    def _select(self, parts: Sequence[slice]) -> list[torch.Tensor]:
        return select_all(
            [
                Candidates(
                    self.scores[layers],
                    self.own_pages[layers] * self.block_size,
                    self.kept_pages[layers] * self.block_size,
                    self.case.recent_ratio,
                    self.max_pages * self.block_size,
                    self.precedence if self.case.grouped else None,
                )
                for layers in parts
            ]
        )

    def _parts(self) -> list[slice]:
        return [slice(0, 1), slice(1, self.case.shape.num_layers)]

    def rank(self) -> dict[str, torch.Tensor]:
        return {"": rank(self.scores)}

    def merge_ranking(self) -> dict[str, torch.Tensor]:
        """Merge two rankings into entries that some of their values exceed."""
        merged = self.merged.clone()
        merge_ranking(merged, self.scores, self.shares[0])
        merge_ranking(merged, self.attention, self.shares[1])
        return {"": merged}

    def look_ahead(self) -> dict[str, torch.Tensor]:
        """Decay within a frame, and over several frames."""
        lengths = SHORT_DECAY, LONG_DECAY, 0.5
        return {"": torch.stack([look_ahead(self.attention, length) for length in lengths])}

    def compact(self) -> dict[str, torch.Tensor]:
        """Compact into this prompt's own pool, which changes it; the cells of the kept pages."""
        self._compact(self._parts())
        kept = self._kept_row()
        layers = torch.arange(self.case.shape.num_layers, device=self.device)
        pages = self.pool.page_ids(layers[:, None], kept).flatten()
        return {"": self.pool.pages[pages], "elsewhere": self._without(pages)}

    def _compact(self, parts: Sequence[slice]) -> None:
        pages = self.source, self._kept_row(), self.kept_pages
        moves = [Move(*pages, self.positions[layers], layers.start) for layers in parts]
        compact_all(self.pool, moves)

    def _kept_row(self) -> torch.Tensor:
        return self.row[: self.kept_blocks]

    def _prompt_row(self) -> torch.Tensor:
        return self.row[self.kept_blocks : self.kept_blocks + self.prompt_blocks]

    def _without(self, pages: torch.Tensor) -> torch.Tensor:
        others = torch.ones(len(self.pool.pages), dtype=torch.bool, device=self.device)
        others[pages] = False
        return self.pool.pages[others]

    def layer_tables(self) -> dict[str, torch.Tensor]:
        layer_tables(self.pool, *self.step)
        out: LayerTables = self.step[-1]
        # Entries beyond a row's length have no meaning.
        pages = (out.seq_lens.long() + self.block_size - 1) // self.block_size
        entry = torch.arange(out.block_table.shape[2], device=self.device)
        used = torch.where(entry < pages[..., None], out.block_table, -1)
        return {"pages": used, "lengths": out.seq_lens, "slots": out.slot_mapping}

    @property
    def block_size(self) -> int:
        return self.case.block_size

    def calls(self) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
        """A call of each operation, by its name; it returns the operation's results by theirs."""
        calls = (
            self.observe,
            self.observe_layers,
            self.apportion,
            self.select,
            self.rank,
            self.merge_ranking,
            self.look_ahead,
            self.layer_tables,
            self.compact,  # last: changes the pool
        )
        return {call.__name__: call for call in calls}

    def operations(self) -> list[Operation]:
        """Calls to time, without any allocation or copy of this class."""
        case, shape = self.case, self.case.shape
        heads = shape.num_layers * shape.num_kv_heads
        size = case.dtype.itemsize
        kept = self.total_pages * self.block_size * shape.num_kv_heads  # (token, head) pairs
        sums = torch.zeros(shape.num_layers, shape.num_kv_heads, case.tokens, device=self.device)
        dense = torch.zeros(shape.num_layers, dtype=torch.int64, device=self.device)
        maxima = torch.zeros_like(sums)
        keys = heads * case.tokens * shape.head_size * size + shape.num_layers * (
            self.query.numel() * size
        )
        column = 8 * heads * case.tokens  # float32, read and written
        out: LayerTables = self.step[-1]
        layers = [slice(0, shape.num_layers)]
        return [
            Operation("observe", lambda: self.observe_into(sums, None, dense), keys + column),
            Operation(
                "observe, maxima",
                lambda: self.observe_into(sums, maxima, dense),
                keys + 2 * column,
            ),
            Operation(
                "observe_layers",
                lambda: self._observe_layers([self._layers_request(sums, None, dense)]),
                keys + column,
                copies=True,
            ),
            Operation(
                "observe_layers, maxima",
                lambda: self._observe_layers([self._layers_request(sums, maxima, dense)]),
                keys + 2 * column,
                copies=True,
            ),
            Operation(
                "apportion",
                lambda: self._apportion(self.weights[None]),
                16 * shape.num_layers,
                copies=True,
            ),
            Operation("look_ahead", lambda: look_ahead(self.attention, LONG_DECAY), column),
            Operation(
                "merge_ranking",
                lambda: merge_ranking(maxima, self.attention, self.shares[0]),
                column + column // 2,
            ),
            Operation(
                "select",
                lambda: self._select(layers),
                4 * self.scores.numel() + 4 * kept,
                copies=True,
            ),
            Operation(
                "compact",
                lambda: self._compact(layers),
                kept * (2 * 2 * shape.head_size * size + 4),
                copies=True,
            ),
            Operation(
                "layer_tables",
                lambda: layer_tables(self.pool, *self.step),
                4 * out.block_table.numel()
                + 4 * out.seq_lens.numel()
                + 8 * out.slot_mapping.numel(),
            ),
        ]


def _copy(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(_copy(one, device) for one in value)
    if isinstance(value, EvictedRows | LayerTables):
        return type(value)(**{name: _copy(one, device) for name, one in vars(value).items()})
    return value
