"""Estimates and the intervals that belong to them."""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev
from typing import NamedTuple


class Estimate(NamedTuple):
    """A measured value and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def percent(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"

    def signed(self, digits: int = 3) -> str:
        """With its sign, as one writes a difference."""
        return f"{self.value:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"

    def verdict(self, above: str, below: str) -> str:
        """What the interval of a difference says in words: it lies above zero, below, or contains it."""
        return above if self.low > 0 else below if self.high < 0 else "no measurable difference"


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """A proportion p = k/n with Wilson's score interval (Wilson 1927), which holds near 0 and 1 too.

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

    Raises:
        ValueError: no trials, or successes outside 0 … trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials are no proportion; count both again")
    n, p, z = trials, successes / trials, NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1))
    return Estimate(p, max(0.0, low), min(1.0, high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of a few runs with its t interval: mean ± t · s/√n, which knows that three seeds are few.

    Raises:
        ValueError: fewer than two values; one run has no interval.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"{n} value has no interval; run at least two seeds, better three")
    half = t.ppf((1 + confidence) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean(values), mean(values) - half, mean(values) + half)


def paired_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of `values − others`, run by run, with its t interval: what both runs of a pair share cancels.

    Raises:
        ValueError: fewer than two pairs, or a value without another.
    """
    if len(values) != len(others):
        raise ValueError(f"{len(values)} values and {len(others)} others are no pairs; give one for each")
    return mean_interval([value - other for value, other in zip(values, others, strict=True)], confidence)
