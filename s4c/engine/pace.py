"""How passes go now, beside what was measured.

A pass reads the weights and multiplies by them at the same time, and takes about as long as the slower of the two.
A machine's memory may be slower for some seconds by half, and its cores where others share them. So a pass over x
tokens takes

    (m^K f + c^K (1 - f))^(1/K)    times what was measured,    f = 1 / (1 + (x / knee)^K)

with a pace m of the memory and c of the cores: the sum of the K-th powers of both times, in place of the larger one.
The logarithms of m and c are followed by an extended Kalman filter, so passes over few tokens tell of the memory and
those over many of the cores.
"""

from __future__ import annotations

import math
from collections import deque
from functools import cache
from statistics import median_high

SHARPNESS = 8.0
"""K: how soon a pass takes as long as the slower of reading and multiplying."""

MEMORY_SPREAD, CORES_SPREAD = 0.3, 0.15
MEMORY_DRIFT, CORES_DRIFT = 0.02, 0.012
NOISE, STRAY = 0.06, 0.25
"""Of logarithms of times: how far the paces of memory and cores may be from what was measured, how far they go in a
round, how far a pass is from what they say, and how much farther than that it is believed."""

RECENT, BELIEVED = 31, 3
"""Values of which a median is taken; those for which 1 stands before the first pass without a tree is seen."""


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
    """The paces of memory and cores.

    Passes of rounds without a tree go other ways, and have a share of their own beside them.

    Args:
        knee: tokens by which multiplying takes as long as reading.
    """

    def __init__(self, knee: float) -> None:
        self._part = cache(lambda tokens: 1 / (1 + (tokens / knee) ** SHARPNESS))
        self._plain = Recent(1.0, BELIEVED)
        self._memory = self._cores = 0.0
        self._memory_variance, self._covariance, self._cores_variance = MEMORY_SPREAD**2, 0.0, CORES_SPREAD**2
        self._powers = 1.0, 1.0

    @property
    def now(self) -> float:
        """The pace of the memory."""
        return math.exp(self._memory)

    def of(self, tokens: int, plain: bool) -> float:
        """How many times as long as it was measured such a pass takes."""
        part, (memory, cores) = self._part(tokens), self._powers
        expected: float = (part * memory + (1 - part) * cores) ** (1 / SHARPNESS)
        return expected * self._plain.middle if plain else expected

    def add(self, tokens: int, plain: bool, quotient: float) -> None:
        """Count a pass that took so many times as long as when it was measured."""
        if plain:
            self._plain.add(quotient / self.of(tokens, False))
        error = min(max(math.log(max(quotient, 1e-6) / self.of(tokens, plain)), -STRAY), STRAY)
        part, (memory, cores) = self._part(tokens), self._powers
        waiting = part * memory / (part * memory + (1 - part) * cores)
        self._memory_variance = min(self._memory_variance + MEMORY_DRIFT**2, MEMORY_SPREAD**2)
        self._cores_variance = min(self._cores_variance + CORES_DRIFT**2, CORES_SPREAD**2)
        of_memory = self._memory_variance * waiting + self._covariance * (1 - waiting)
        of_cores = self._covariance * waiting + self._cores_variance * (1 - waiting)
        variance = of_memory * waiting + of_cores * (1 - waiting) + NOISE**2
        self._memory += of_memory / variance * error
        self._cores += of_cores / variance * error
        self._memory_variance -= of_memory * of_memory / variance
        self._covariance -= of_memory * of_cores / variance
        self._cores_variance -= of_cores * of_cores / variance
        self._powers = math.exp(SHARPNESS * self._memory), math.exp(SHARPNESS * self._cores)
