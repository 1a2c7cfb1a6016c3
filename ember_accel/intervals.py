"""Intervals: how sure a mean is, and a difference of two, in 95 of 100 cases.

    from ember_accel.intervals import interval

    low, high = interval(np.array([1.0, 0.0, 1.0, 1.0]))

Wilson's and McNemar's ways where all scores are 0 or 1, resampling where they are not.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]
_Z = 1.959963984540054  # 95% of a normal distribution are within so many deviations


def is_binary(scores: Scores) -> bool:
    """Whether all scores are 0 or 1."""
    return bool(((scores == 0) | (scores == 1)).all())


def interval(scores: Scores) -> tuple[float, float]:
    """The 95% interval of the mean: Wilson's where all scores are 0 or 1, else bootstrapped."""
    n, mean = len(scores), float(scores.mean())
    if not is_binary(scores):
        return _percentiles(_means(scores), n)
    width, half = _Z**2 / n, _Z * math.sqrt((mean * (1 - mean) + _Z**2 / n / 4) / n)
    low, high = (mean + width / 2 - half) / (1 + width), (mean + width / 2 + half) / (1 + width)
    return low if mean > 0 else 0.0, high if mean < 1 else 1.0


def _means(values: Scores, most: int = 10_000) -> Scores:
    """The means of many resamples of values, always the same, drawn in small parts."""
    n, random = len(values), np.random.default_rng(0)
    times, part = max(1_000, min(most, 10_000_000 // n)), max(1, 1_000_000 // n)
    sizes = [(min(part, times - at), n) for at in range(0, times, part)]
    draws = (random.integers(n, size=size, dtype=np.int32) for size in sizes)
    return np.concatenate([values[draw].mean(axis=1) for draw in draws])


def _percentiles(means: Scores, n: int) -> tuple[float, float]:
    """Hesterberg's expanded percentiles: as wide as Student's t makes an interval of n values."""
    if n < 2:
        return math.nan, math.nan
    z, v = _Z, n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)  # as Cornish and Fisher
    tail = math.erfc(math.sqrt(n / v / 2) * t) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def paired(more: Scores, most: int = 10_000) -> tuple[tuple[float, float], float]:
    """The interval of a mean difference, and the share of resamples that centred are as far off."""
    means, mean = _means(more, most), more.mean()
    far = int((abs(means - mean) >= abs(mean) - 1e-12).sum())
    p = (1 + far) / (1 + len(means)) if len(more) > 1 else math.nan
    return _percentiles(means, len(more)), p


def mcnemar(won: int, lost: int, n: int) -> tuple[tuple[float, float], float]:
    """Bonett and Price's interval for the difference of two shares of n, and McNemar's exact p."""
    more, less = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    term = total = 1
    for heads in range(min(won, lost)):
        term = term * (won + lost - heads) // (heads + 1)
        total += term
    interval = max(-1.0, more - less - half), min(1.0, more - less + half)
    return interval, min(1.0, 2 * total / 2 ** (won + lost))
