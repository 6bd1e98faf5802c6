"""The arithmetic of the figures: pooling, intervals, acceptance.

A ratio of speeds is pooled, all tokens over all seconds, so that a long answer counts for what it takes. Its interval
is a bootstrap over questions: they are what another run would draw anew, and the answers to one belong together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval; of a single question there is no interval, and it is that of the figure."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def quotient(rows: Sequence[Sequence[float]]) -> Estimate:
    """Sums over sums: the columns of the rows are by turns numerators and denominators of one fraction.

    (tokens, rounds) is a mean acceptance length, (tokens, seconds) a rate, (tokens, seconds, seconds of the baseline,
    tokens of the baseline) a speedup.

    Args:
        rows: one for each question, all sums above 0; for the interval questions are drawn with replacement.
    """
    table = np.asarray(rows, dtype=np.float64)
    value = float(_fraction(table.sum(0)))
    if len(table) < 2:
        return Estimate(value, value, value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_fraction(_draws(len(table)) @ table), [tail, 1 - tail])
    return Estimate(value, float(low), float(high))


def _fraction(sums: Floats) -> Floats:
    value: Floats = np.prod(sums[..., 0::2], -1) / np.prod(sums[..., 1::2], -1)
    return value


@lru_cache(maxsize=8)
def _draws(count: int) -> Floats:
    """[RESAMPLES, count]: how often each question is drawn, always the same draws."""
    picks = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    return np.stack([np.bincount(pick, minlength=count) for pick in picks]).astype(np.float64)


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75]).tolist()
    return found


def added(histograms: Sequence[Sequence[int]]) -> list[int]:
    """The sum of histograms of unequal length."""
    total = [0] * max(map(len, histograms), default=0)
    for histogram in histograms:
        for index, count in enumerate(histogram):
            total[index] += count
    return total


def acceptance(histogram: Sequence[int]) -> tuple[list[float], list[float]]:
    """How often the token at depth 1, 2, ... of the tree was accepted: given that the one above was, and at all.

    A round that an end of the answer cut short counts with the tokens that stayed.
    """
    reached = [sum(histogram[depth:]) for depth in range(len(histogram))]
    given = [here / above for above, here in pairwise(reached) if above]
    return given, [here / reached[0] for here in reached[1:]]
