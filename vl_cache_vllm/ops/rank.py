# SPDX-License-Identifier: Apache-2.0
"""The place of each entry in a descending order."""

import torch


def rank(scores: torch.Tensor) -> torch.Tensor:
    """0 for the highest entry along the last dimension; ties to the lower position. int64."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
