# SPDX-License-Identifier: Apache-2.0
"""Scores of answers, and confidence intervals that respect shared documents."""

from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def exact(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, surrounding white space aside."""
    return float(any(answer.strip() == r.strip() for r in right))


def characters(answer: str, right: Sequence[str]) -> float:
    """Character accuracy: 1 - edit distance / length of the longer text, best of the right ones."""
    return max(Levenshtein.normalized_similarity(answer.strip(), r.strip()) for r in right)


def anls(answer: str, right: Sequence[str]) -> float:
    """Normalised Levenshtein similarity, case ignored, 0 below one half (DocVQA's ANLS)."""
    best = characters(answer.lower(), [r.lower() for r in right])
    return best if best >= 0.5 else 0.0


def contains(answer: str, right: Sequence[str]) -> float:
    """1 if a right answer occurs in the answer, case ignored."""
    return float(any(r.strip().lower() in answer.lower() for r in right))


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "characters": characters,
    "anls": anls,
    "contains": contains,
}


def interval(
    values: Sequence[float], groups: Sequence[str], resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean and its 95 % confidence interval.

    A bootstrap over groups, because answers about one document are not independent. Where all
    values are equal the bootstrap would claim certainty: then the interval is that of a binomial
    share with as many observations as groups (the rule of three).
    """
    value = np.asarray(values, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums, sizes = np.bincount(group, value), np.bincount(group)
    mean = float(value.mean())
    if np.ptp(value) == 0:
        slack = min(1.0, 3.0 / len(sizes))
        return mean, max(0.0, mean - slack), min(1.0, mean + slack)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(sizes), size=(resamples, len(sizes)))
    means = sums[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return mean, float(low), float(high)
