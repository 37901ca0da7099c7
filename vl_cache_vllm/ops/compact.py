# SPDX-License-Identifier: Apache-2.0
"""Copy the selected tokens of every layer and KV head into the kept blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.page_pool import PagePool


@operation
def compact(
    pool: PagePool,
    source_pages: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
    first_layer: int = 0,
) -> None:
    """Gather the keys and values at ``positions`` into the pages of the kept blocks.

    The copy is out of place: the source pages, which other requests may share, are only read.

    The M kept blocks have M * L pages. Page index f is page ``f % L`` of kept block ``f // L``, and
    the layers own consecutive ranges of f, in layer order (see `layer_tables`). Page j of a layer
    receives the layer's selected tokens ``j * block_size`` to ``(j + 1) * block_size - 1``.

    Example: 3 layers, M = 2 kept blocks a and b, kept pages 4, 1 and 1, 4 tokens per page::

        page index f                 0     1     2      3       4     5
        destination page             a.0   a.1   a.2    b.0     b.1   b.2
        layer                        0     0     0      0       1     2
        page j of the layer          0     1     2      3       0     0
        entries of positions[layer]  0-3   4-7   8-11   12-15   0-3   0-3

    In a prompt or decode block, page 1 belongs to layer 1. In a kept block it can belong to any
    layer: a.1 holds tokens of layer 0.

    Each KV head has positions of its own. A token keeps its head, and its key is not rotated again.

    Args:
        pool: the KV cache of all layers.
        source_pages: page ids of each layer in the order of its tokens, int32 ``[L, C]``: page l of
            each block of a prompt, or a layer's table (`layer_tables`) if the request was evicted
            before.
        kept_row: block ids of the destination, int64 ``[M]``, none of whose pages is a source.
        kept_pages: pages of each layer, int64 ``[L]``, with the sum M * L.
        positions: indices in the layer's source pages, int32 ``[n, num_kv_heads, max_kept]``, of
            the n layers from ``first_layer`` on; layer l has ``kept_pages[l] * block_size``
            entries, the others have no meaning.
        first_layer: of ``positions``; only the pages of its layers are filled.
    """
    num_layers, block_size = pool.num_layers, pool.block_size
    total_pages = kept_row.shape[0] * num_layers  # F
    device = positions.device
    page_index = torch.arange(total_pages, device=device)
    end = kept_pages.cumsum(0)  # [L], end of each layer's range
    layer = torch.searchsorted(end, page_index, right=True).clamp_(max=num_layers - 1)
    wanted = (layer >= first_layer) & (layer < first_layer + len(positions))
    page_index, layer = page_index[wanted], layer[wanted]  # [F], of the moved layers
    page_in_layer = page_index - (end - kept_pages)[layer]
    token = page_in_layer[:, None] * block_size + torch.arange(block_size, device=device)
    heads = torch.arange(pool.num_kv_heads, device=device)
    # [F, num_kv_heads, block_size]
    source = positions[layer[:, None, None] - first_layer, heads[:, None], token[:, None]].long()
    source_page = source_pages[layer[:, None, None], source // block_size].long()
    destination = pool.page_ids(page_index % num_layers, kept_row[page_index // num_layers])  # [F]
    pool.copy_tokens(source_page, source % block_size, destination)


@dataclass(frozen=True)
class Move:
    """Kept tokens of some layers of a request; fields as the arguments of `compact`."""

    source_pages: torch.Tensor
    kept_row: torch.Tensor
    kept_pages: torch.Tensor
    positions: torch.Tensor
    first_layer: int = 0


@operation
def compact_all(pool: PagePool, moves: Sequence[Move]) -> None:
    """`compact` for each of the moves, which may be layers of several requests."""
    for move in moves:
        compact(
            pool,
            move.source_pages,
            move.kept_row,
            move.kept_pages,
            move.positions,
            move.first_layer,
        )
