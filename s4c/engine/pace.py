"""How passes go now, beside what was measured.

A pass reads the weights and multiplies by them at the same time, and takes about as long as the slower of the two.
A machine's memory may be slower for some seconds by half, and its cores where others share them. So a pass over x
tokens takes

    (m^K f + c^K (1 - f))^(1/K)    times what was measured,    f = 1 / (1 + (x / knee)^K)

with a pace m of the memory and c of the cores: the sum of the K-th powers of both times, in place of the larger one.
Passes of rounds without a tree go other ways, and take s times as long as that. The logarithms of m, c and s are
followed by an extended Kalman filter, so passes over few tokens tell of the memory and those over many of the cores;
and where nothing is drafted for a while, what changes is the memory's pace, for s hardly does.

A pass says how long it took, but not which of the two it waited for. Were cores that have become slow taken for slow
memory, trees would grow, for then nodes cost nothing, and passes over many tokens would tell of the memory no more. So
where a pass is far from what was expected the next one should be over few tokens (`astray`), and what nothing tells of
goes back to what was measured.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import cache
from statistics import median_high

SHARPNESS = 8.0
"""K: how soon a pass takes as long as the slower of reading and multiplying."""

SPREADS, DRIFTS = (0.3, 0.15, 0.1), (0.02, 0.016, 0.004)
NOISE, STRAY = 0.06, 0.25
"""Of logarithms of times: how far m, c and s may be from what was measured, how far they go in a round, how far a pass
is from what they say, and how much farther than that it is believed."""

RETURNING = 0.01
"""Part of the logarithms of m and c that is forgotten with each pass that tells nothing of them."""

RECENT = 31
"""Values of which a median is taken."""


class Recent:
    """The median of the last values.

    Args:
        start: a first value.
        times: that it counts.
        most: values that count.
    """

    def __init__(self, start: float, times: int = 1, most: int = RECENT) -> None:
        self._values = deque([start] * times, maxlen=most)
        self.middle = start

    def add(self, value: float) -> None:
        self._values.append(value)
        self.middle = median_high(self._values)


class Pace:
    """m, c and s of one machine.

    Args:
        knee: tokens by which multiplying takes as long as reading.

    Attributes:
        astray: whether the last pass was so far from what was expected that it is not clear what has changed.
    """

    def __init__(self, knee: float) -> None:
        self.astray = False
        self._part = cache(lambda tokens: 1 / (1 + (tokens / knee) ** SHARPNESS))
        self._logs = [0.0, 0.0, 0.0]
        self._covariance = [[spread**2 if i == j else 0.0 for j in range(3)] for i, spread in enumerate(SPREADS)]
        self._powers = 1.0, 1.0

    @property
    def now(self) -> float:
        """The pace of the memory."""
        return math.exp(self._logs[0])

    def of(self, tokens: int, plain: bool) -> float:
        """How many times as long as it was measured such a pass takes."""
        part, (memory, cores) = self._part(tokens), self._powers
        expected: float = (part * memory + (1 - part) * cores) ** (1 / SHARPNESS)
        return expected * math.exp(self._logs[2]) if plain else expected

    def add(self, tokens: int, plain: bool, quotient: float) -> None:
        """Count a pass that took so many times as long as when it was measured."""
        error = math.log(max(quotient, 1e-6) / self.of(tokens, plain))
        self.astray = abs(error) > STRAY
        part, (memory, cores) = self._part(tokens), self._powers
        waiting = part * memory / (part * memory + (1 - part) * cores)
        self._logs[0] *= 1 - RETURNING * (1 - waiting)
        self._logs[1] *= 1 - RETURNING * waiting
        self._correct((waiting, 1 - waiting, float(plain)), min(max(error, -STRAY), STRAY))
        self._powers = math.exp(SHARPNESS * self._logs[0]), math.exp(SHARPNESS * self._logs[1])

    def _correct(self, slopes: Sequence[float], error: float) -> None:
        """A step of the filter, for an observation that depends on the logarithms by these slopes."""
        covariance = self._covariance
        for i, row in enumerate(covariance):
            row[i] = min(row[i] + DRIFTS[i] ** 2, SPREADS[i] ** 2)
        along = [sum(a * b for a, b in zip(row, slopes, strict=True)) for row in covariance]
        variance = sum(a * b for a, b in zip(along, slopes, strict=True)) + NOISE**2
        for i, row in enumerate(covariance):
            self._logs[i] += along[i] / variance * error
            for j in range(3):
                row[j] -= along[i] * along[j] / variance
