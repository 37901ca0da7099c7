# SPDX-License-Identifier: Apache-2.0
"""What a policy knows of a prompt's attention."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """Attention that each key received from the observed queries.

    Both tensors are float32 ``[num_layers, num_kv_heads, tokens]``.
    """

    sums: torch.Tensor
    """Sum over the observed queries and the query heads of the KV head's group.

    Of the observed queries, only the last `EvictionPolicy.summed_queries` are in it.
    """
    maxima: torch.Tensor | None = None
    """Largest attention that any observed query pays to the key with any head of the group.

    None unless the policy `wants_maxima`.
    """
