# SPDX-License-Identifier: Apache-2.0
"""Scores of outputs, and confidence intervals that account for shared documents."""

from collections.abc import Callable, Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein


def exact(output: str, expected: Sequence[str]) -> float:
    """1 if the output equals an expected answer, without surrounding white space."""
    return float(any(output.strip() == answer.strip() for answer in expected))


def characters(output: str, expected: Sequence[str]) -> float:
    """Character accuracy: 1 - edit distance / length of the longer text; best expected answer."""
    return max(Levenshtein.normalized_similarity(output.strip(), e.strip()) for e in expected)


def anls(output: str, expected: Sequence[str]) -> float:
    """Normalised Levenshtein similarity, ignoring case, 0 below one half (ANLS of DocVQA)."""
    best = characters(output.lower(), [answer.lower() for answer in expected])
    return best if best >= 0.5 else 0.0


def contains(output: str, expected: Sequence[str]) -> float:
    """1 if the output contains an expected answer, ignoring case."""
    return float(any(answer.strip().lower() in output.lower() for answer in expected))


SCORES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "characters": characters,
    "anls": anls,
    "contains": contains,
}


def interval(
    values: Sequence[float], groups: Sequence[str], resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean with its 95% confidence interval.

    The interval is a bootstrap over groups, because outputs about one document are not
    independent. If all values are equal, the bootstrap interval would have no width. In that case
    the rule of three for a binomial proportion applies, with the groups as observations.

    Args:
        values: one score for each case.
        groups: the group of each case.
        resamples: number of bootstrap samples.

    Returns:
        Mean, lower end and upper end.
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
