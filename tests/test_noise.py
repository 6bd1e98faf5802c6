"""Noise: where it comes from, the laws it claims, and that the kernel makes the same, bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from verify_oracles import CPU, chi_square, kernel, scores_of

from s4c.models.native import library
from s4c.models.native.rows import native_gumbel
from s4c.types import SamplingParams
from s4c.verify.noise import (
    COIN_STREAM,
    DRAFT_STREAM,
    RESIDUAL_STREAM,
    TARGET_STREAM,
    NoiseTable,
    coins,
    gumbel,
    philox,
    words,
)
from s4c.verify.scores import choose

VOCAB = 11
FALSE_ALARM = 1e-6
"""Chance of a failure of each statistical test, were its seeds not fixed, if the law is as claimed."""

KEYS = [
    (seed, stream, position)
    for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 1)
    for stream in (TARGET_STREAM, DRAFT_STREAM, COIN_STREAM, RESIDUAL_STREAM)
    for position in (0, 1, 2, 100_000, 2**40)
]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_counter_is_philox(counter: list[int], key: tuple[int, int], expected: str) -> None:
    """The known answers that its authors publish with Random123."""
    found = philox([torch.tensor([word]) for word in counter], key)
    assert " ".join(f"{int(word):08x}" for word in found) == expected


def test_noise_is_a_function_of_seed_stream_and_position() -> None:
    rows = {key: gumbel(*key, 16) for key in KEYS}
    assert len({tuple(row.tolist()) for row in rows.values()}) == len(KEYS)
    table = NoiseTable(16, CPU)
    for key in reversed(KEYS):
        assert table.row(*key).tolist() == rows[key].tolist() == table.row(*key).tolist()


def test_noise_is_pinned() -> None:
    """A seed means the same text in every release and on every machine."""
    bits = gumbel(12345, TARGET_STREAM, 7, 20)[[0, 1, 2, 3, 19]].view(torch.int32).tolist()
    assert bits == [-1093389509, -1121808105, 1066030512, -1094307459, 1027474751]


@pytest.mark.skipif(library.problem() is not None, reason="the C++ core is not built")
def test_the_kernel_makes_the_same_noise_with_every_instruction_set() -> None:
    try:
        for name in library.instruction_sets():
            assert library.core().s4c_choose(name.encode()) == 0
            for size in (1, 15, 64, 65, 1000):
                for key in KEYS:
                    assert torch.equal(native_gumbel(*key, size), gumbel(*key, size))
            assert torch.equal(native_gumbel(3, 0, 9, 2_000_000), gumbel(3, 0, 9, 2_000_000))
    finally:
        library.core().s4c_choose(library.instruction_set().encode())


def test_noise_is_what_its_words_say() -> None:
    """-log(-log u) in double precision; u is the middle of the word's share of (0, 1), counted from 1 downwards."""
    word = words(8, TARGET_STREAM, 3, 100_000, CPU).double()
    share = (word + 0.5) / 2**32
    exponential = torch.where(word < 2**31, -torch.log1p(-share), -torch.log(1 - share))
    exact = -exponential.log()
    assert float(((gumbel(8, TARGET_STREAM, 3, 100_000) - exact).abs() / (1 + exact.abs())).max()) < 4e-7


def test_noise_at_nodes() -> None:
    requests = [SamplingParams(temperature=t, seed=seed) for t, seed in ((1.0, 5), (0.0, 6), (0.5, 2**64 - 1))]
    positions = torch.tensor([[3, 4, 4, 5], [9, 9, 10, 10], [1, 2, 3, 2]])
    noise = scores_of(requests, [[0]] * 3, [1] * 3, VOCAB).noise(positions, DRAFT_STREAM)
    assert noise is not None
    for row, node in np.ndindex(3, 4):
        expected = gumbel(requests[row].seed or 0, DRAFT_STREAM, int(positions[row, node]), VOCAB)
        assert noise[row, node].tolist() == ([0.0] * VOCAB if row == 1 else expected.tolist())


def test_greedy_batches_have_no_noise() -> None:
    assert scores_of([SamplingParams()], [[0]], [1], VOCAB).noise(torch.tensor([[1]])) is None


def test_noise_table_keeps_what_may_be_asked_again() -> None:
    table = NoiseTable(4, CPU)
    for seed, position in ((1, 3), (1, 4), (1, 400), (1, 700), (2, 9), (3, 9)):
        table.row(seed, TARGET_STREAM, position)
    table.keep([(1, 4), (1, 698), (2, 9)])
    assert sorted(table._rows) == [(1, TARGET_STREAM, 4), (1, TARGET_STREAM, 700), (2, TARGET_STREAM, 9)]


def test_noise_has_the_gumbel_law() -> None:
    """Kolmogorov-Smirnov over positions and tokens; exceeding 2.7 has a chance of 2 exp(-2 2.7^2) < 1e-6."""
    noise = torch.cat([gumbel(3, TARGET_STREAM, position, 500) for position in range(100)]).double().sort().values
    law = torch.exp(-torch.exp(-noise))
    steps = torch.arange(len(law) + 1) / len(law)
    largest = max(float((law - steps[1:]).abs().max()), float((law - steps[:-1]).abs().max()))
    assert largest * math.sqrt(len(law)) < 2.7


def drawn(noise: list[Tensor], logits: Tensor) -> list[int]:
    return choose(logits.expand(len(noise), 1, -1), torch.stack(noise)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("across", ["positions", "seeds"])
def test_tokens_drawn_have_the_law(across: str) -> None:
    law = torch.tensor([0.5, 0.25, 0.15, 0.0, 0.07, 0.03])
    keys = [(11, t) if across == "positions" else (t, 11) for t in range(20_000)]
    tokens = drawn([kernel(seed, TARGET_STREAM, position, 6, CPU) for seed, position in keys], law.log())
    assert chi_square([tokens.count(token) for token in range(6)], law.tolist()) > FALSE_ALARM


def test_improbable_tokens_are_drawn_as_often_as_their_law_says() -> None:
    """The upper tail of the noise decides: 50 tokens of chance 1e-3 each against one of 0.95, a thousand times over."""
    rows = kernel(2, TARGET_STREAM, 5, 51 * 100_000, CPU).view(-1, 51)
    law = torch.tensor([0.95] + [0.001] * 50)
    counts = (law.log() + rows).argmax(-1).bincount(minlength=51).tolist()
    assert chi_square(counts, law.tolist()) > FALSE_ALARM


@pytest.mark.parametrize(
    "pair",
    [
        [(TARGET_STREAM, 5), (TARGET_STREAM, 6)],
        [(TARGET_STREAM, 5), (DRAFT_STREAM, 5)],
        [(DRAFT_STREAM, 5), (RESIDUAL_STREAM, 5)],
        [(DRAFT_STREAM, 5), (DRAFT_STREAM, 6)],
    ],
)
def test_draws_of_other_positions_and_streams_are_independent(pair: list[tuple[int, int]]) -> None:
    logits = torch.zeros(4)
    one, other = (drawn([kernel(seed, *key, 4, CPU) for seed in range(6000)], logits) for key in pair)
    counts = [0] * 16
    for a, b in zip(one, other, strict=True):
        counts[4 * a + b] += 1
    assert chi_square(counts, [1 / 16] * 16) > FALSE_ALARM


def test_coins_are_uniform_and_independent_of_each_other_and_of_the_residual_draw() -> None:
    counts = [0] * 64
    for seed in range(8000):
        first, second = coins(seed, 5, 2)
        residual = int(kernel(seed, RESIDUAL_STREAM, 5, 4, CPU).argmax())
        counts[16 * int(4 * first) + 4 * int(4 * second) + residual] += 1
    assert chi_square(counts, [1 / 64] * 64) > FALSE_ALARM
