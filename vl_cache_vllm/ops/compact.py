# SPDX-License-Identifier: Apache-2.0
"""Copy the surviving tokens of every layer and KV head into the destination pages."""

import torch

from vl_cache_vllm.ops.dispatch import operation
from vl_cache_vllm.ops.page_pool import PagePool


@operation
def compact(
    pool: PagePool,
    prompt_row: torch.Tensor,
    kept_row: torch.Tensor,
    kept_pages: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Gather survivors out of place; the prompt's pages are only read.

    Destination page f of the deal (see `layer_tables`) receives ``block_size`` consecutive
    survivors of the layer that the deal gives it to.

    Args:
        pool: the page pool of all layers.
        prompt_row: block ids of the prompt, int64 ``[N]``.
        kept_row: block ids of the destination, int64 ``[M]``; disjoint from ``prompt_row``.
        kept_pages: pages of each layer, int64 ``[L]``, summing to M * L.
        positions: kept positions, int64 ``[L, num_kv_heads, max_kept]``, valid up to
            ``kept_pages[l] * block_size``.
    """
    num_layers, block_size = pool.num_layers, pool.block_size
    total_pages = kept_row.shape[0] * num_layers
    device = positions.device
    deal = torch.arange(total_pages, device=device)  # [F]
    end = kept_pages.cumsum(0)
    layer = torch.searchsorted(end, deal, right=True).clamp_(max=num_layers - 1)  # [F]
    page_in_layer = deal - (end - kept_pages)[layer]
    token = page_in_layer[:, None] * block_size + torch.arange(block_size, device=device)  # [F, N]
    heads = torch.arange(pool.num_kv_heads, device=device)
    source = positions[layer[:, None, None], heads[:, None], token[:, None]]  # [F, K, N]
    source_page = pool.page_ids(layer[:, None, None], prompt_row[source // block_size])
    destination = pool.page_ids(deal % num_layers, kept_row[deal // num_layers])  # [F]
    pool.copy_tokens(source_page, source % block_size, destination)
