# SPDX-License-Identifier: Apache-2.0
"""What a policy knows of a prompt's attention."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attention:
    """Attention that each key received from the observed queries.

    ``sums`` and ``maxima`` are float32 ``[num_layers, num_kv_heads, tokens]``. A policy gets those
    of some layers. What all layers have in common is float32 ``[tokens]``.
    """

    sums: torch.Tensor
    """Sum over the observed queries and the query heads of the KV head's group.

    Of the observed queries, only the last `EvictionPolicy.summed_queries` are in it.
    """
    maxima: torch.Tensor | None = None
    """Largest attention that any observed query pays to the key with any head of the group.

    None unless the policy `wants_maxima`.
    """
    common_sums: torch.Tensor | None = None
    """Root mean square of the sums over all KV heads of all layers on all ranks.

    None unless the policy `wants_common`. Under pipeline parallelism, of the stage's layers.
    """
    common_maxima: torch.Tensor | None = None
    """As ``common_sums``, of the maxima."""

    def of_layers(self, layers: slice) -> "Attention":
        """The attention of some layers; what all have in common stays."""
        maxima = None if self.maxima is None else self.maxima[layers]
        return dataclasses.replace(self, sums=self.sums[layers], maxima=maxima)

    def with_common(
        self, mean_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda values: values
    ) -> "Attention":
        """The same with what all layers have in common.

        Args:
            mean_over_ranks: mean of a tensor over the tensor-parallel ranks, each of which has some
                of the KV heads. It is a collective operation: every rank must call it.
        """
        given = [self.sums] if self.maxima is None else [self.sums, self.maxima]
        # A norm takes no memory of the size of its input.
        norms = torch.stack([torch.linalg.vector_norm(one, dim=(0, 1)) for one in given])
        number = self.sums.shape[0] * self.sums.shape[1]
        common = mean_over_ranks(norms.square() / number).sqrt()
        return dataclasses.replace(
            self, common_sums=common[0], common_maxima=common[1] if len(given) > 1 else None
        )
