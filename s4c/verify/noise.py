"""Noise: random numbers that are a function of seed, stream, position and token alone.

A token at position t of a request with seed s is `argmax(log p + g)`, where g is the row of Gumbel noise of s and t, so
that the token has the law p and is the same whoever computes it (Gumbel coupling: Daliri, Musco and Suresh 2024). The
row comes from a counter (Philox4x32-10: Salmon, Moraes, Dror and Shaw 2011) by sums, products and roundings that every
machine makes alike: a seed means the same noise, bit by bit, on every processor, device and runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TARGET_STREAM, DRAFT_STREAM, COIN_STREAM, RESIDUAL_STREAM = range(4)
"""Independent streams of noise of one seed."""

COUNTERS = 16
"""Counters of a block of a row: its words are the first ones of them all, then the second, third and fourth ones."""

MULTIPLIERS, STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
"""Of Philox4x32."""

AHEAD = 32
"""Positions whose rows a request keeps; those further on are made anew each round, which few trees reach."""

WORD = 0xFFFFFFFF

CPU = torch.device("cpu")

SERIES = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
"""log(1 + r) = r - r^2 / 2 + r^3 (c_0 r^8 + ... + c_8) to the precision of float32; 1 + r from sqrt(1/2) to sqrt(2)."""

Gumbel = Callable[[int, int, int, int, torch.device], Tensor]
"""What there may be a kernel for: `gumbel`, the same bit by bit."""


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10: four words of each counter, which is four words itself; all int64 from 0 to 2^32 - 1."""
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        first, second = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # they wrap, and all 64 bits are right
        a, b = (second >> 32 & WORD) ^ b ^ low, second & WORD
        c, d = (first >> 32 & WORD) ^ d ^ high, first & WORD
        low, high = low + STEPS[0] & WORD, high + STEPS[1] & WORD
    return [a, b, c, d]


def words(seed: int, stream: int, position: int, size: int, device: torch.device) -> Tensor:
    """[size] int64 from 0 to 2^32 - 1: the words of a row; a longer row begins with a shorter one."""
    counters = torch.arange(-(-size // (4 * COUNTERS)) * COUNTERS, device=device)
    fixed = [torch.full_like(counters, word) for word in (position & WORD, stream, position >> 32)]
    rows = philox([counters, *fixed], (seed & WORD, seed >> 32))
    return torch.stack([row.view(-1, COUNTERS) for row in rows], 1).flatten()[:size]


def gumbel(seed: int, stream: int, position: int, size: int, device: torch.device = CPU) -> Tensor:
    """[size] float32 of standard Gumbel noise: -log of a standard exponential, -log u for u uniform in (0, 1).

    A word says which half of (0, 1) u is in, and how far it is from the outer end, so that neither tail is coarse.
    """
    word = words(seed, stream, position, size, device)
    near_zero = word > WORD >> 1
    tail = (torch.where(near_zero, WORD - word, word).float() + 0.5) * 2.0**-32
    r, e = _split(torch.where(near_zero, tail, 1 - tail))
    exponential = -_logarithm(torch.where(~near_zero & (e == 0), -tail, r), e)
    return -_logarithm(*_split(exponential))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """r and e of x = 2^e (1 + r), 1 + r from sqrt(1/2) to sqrt(2)."""
    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.5**0.5
    return torch.where(low, mantissa + mantissa, mantissa) - 1, (exponent - low.to(exponent.dtype)).float()


def _logarithm(r: Tensor, e: Tensor) -> Tensor:
    """log(1 + r) + e log 2, every step rounded to float32."""
    p = torch.full_like(r, SERIES[0])
    for coefficient in SERIES[1:]:
        p = p * r + coefficient
    square = r * r
    rest = p * r * square + e * -2.12194440e-4
    return r + (rest - square * 0.5) + e * 0.693359375


def coins(seed: int, position: int, count: int) -> np.ndarray:
    """[count] float64, uniform in [0, 1): the coins of one position of a request."""
    # uint64 from the start: a list with a seed of 2**63 or more would become floats, and seeds would coincide.
    key, counter = np.array([seed, COIN_STREAM], np.uint64), np.array([0, 0, 0, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)


class NoiseTable:
    """Noise rows by (seed, stream, position), each made once while it is in use: up to `AHEAD` of a request.

    Args:
        size: tokens of a row.
        device: where they are wanted.
        kernel: makes rows there; None for `gumbel` itself.
    """

    def __init__(self, size: int, device: torch.device, kernel: Gumbel | None = None) -> None:
        self.size = size
        self.device = device
        self._make = kernel or gumbel
        self._rows: dict[tuple[int, int, int], Tensor] = {}

    def row(self, seed: int, stream: int, position: int) -> Tensor:
        """[V] float32."""
        key = (seed, stream, position)
        if key not in self._rows:
            self._rows[key] = self._make(seed, stream, position, self.size, self.device)
        return self._rows[key]

    def keep(self, positions: Sequence[tuple[int, int]]) -> None:
        """Drop what no running request will soon ask for.

        Args:
            positions: of each running request its seed, and the position of its next token.
        """
        for key in list(self._rows):
            if not any(key[0] == seed and 0 <= key[2] - start < AHEAD for seed, start in positions):
                del self._rows[key]
