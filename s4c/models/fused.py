"""Sampling on a GPU, fused: a row of noise, the token of each node of a tree, the walk down it, one launch each.

Kernels in Triton, which comes with torch where that has CUDA. What they compute is said, and tested, by the eager
operations: `s4c.verify.noise.gumbel` bit by bit, and the coupled rule of `s4c.verify.rules`. Nothing waits for the
device. With TRITON_INTERPRET=1 Triton interprets them on a CPU.

Products and sums must not be fused where bits count, nor divisions approximated.
"""

# Kernels are no Python that can be typed.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from s4c.types import DraftTree, Verdict, placed
from s4c.verify.noise import COUNTERS, MULTIPLIERS, ROUNDS, SERIES, STEPS, WORD
from s4c.verify.scores import ALL_EXCLUDED, NOT_FINITE

BLOCK = 4096
"""Tokens that a program looks at together."""

_WORD, _COUNTERS, _ROUNDS = tl.constexpr(WORD), tl.constexpr(COUNTERS), tl.constexpr(ROUNDS)
_MULTIPLIERS, _STEPS = tl.constexpr(MULTIPLIERS), tl.constexpr(STEPS)
_SERIES = tl.constexpr(SERIES)
_NOT_FINITE, _ALL_EXCLUDED = tl.constexpr(NOT_FINITE), tl.constexpr(ALL_EXCLUDED)


def fused_gumbel(seed: int, stream: int, position: int, size: int, device: torch.device) -> Tensor:
    """`s4c.verify.noise.gumbel`, the same bit by bit."""
    out = torch.empty(size, device=device)
    counter = (stream, position & WORD, position >> 32)
    grid = (triton.cdiv(size, BLOCK),)
    with torch.cuda.device_of(out):
        _gumbel[grid](out, seed & WORD, seed >> 32, *counter, size, BLOCK, enable_fp_fusion=False)
    return out


def fused_judge(
    tree: DraftTree, logits: Tensor, temperatures: Sequence[float], noise: Sequence[Tensor | None]
) -> Verdict:
    """The coupled rule, see `s4c.verify.scores.Judge`; its paths have room for all nodes."""
    batch, nodes, columns = logits.shape
    device = logits.device
    logits, tokens, parents, candidate = (
        x.contiguous() for x in (logits, tree.tokens, tree.parents, tree.candidate.to(torch.uint8))
    )
    cooling = placed([temperature or 1.0 for temperature in temperatures], device, torch.float32)
    rows = logits
    if noise:
        none = torch.zeros(columns, device=device)
        rows = torch.stack([none if row is None else row for row in noise])
    choice = torch.empty(batch, nodes, dtype=torch.int64, device=device)
    levels = len(noise) // batch
    paths, chosen = torch.empty(2, batch, nodes, dtype=torch.int64, device=device)
    accepted = torch.empty(batch, dtype=torch.int64, device=device)
    wide = triton.next_power_of_2(nodes)
    with torch.cuda.device_of(logits):
        _choose[(batch * nodes,)](logits, rows, parents, cooling, choice, nodes, columns, levels, bool(noise), BLOCK)
        _walk[(batch,)](tokens, parents, candidate, choice, paths, chosen, accepted, nodes, wide)
    return Verdict(paths, accepted, chosen[:, -1], chosen)


@triton.jit(do_not_specialize=["nodes", "levels"])
def _choose(logits, noise, parents, cooling, choice, nodes, columns, levels, NOISY: tl.constexpr, BLOCK: tl.constexpr):
    """The token of one node: where its cooled and noisy logits are highest, of equals the first."""
    row = tl.program_id(0).to(tl.int64)
    sequence, node = row // nodes, row % nodes
    divisor = tl.load(cooling + sequence)
    depth = node * 0
    while node > 0:
        node = tl.load(parents + sequence * nodes + node)
        depth += 1
    scores, gumbel = logits + row * columns, noise + (sequence * levels + depth) * columns
    best, at, nothing = float("-inf"), 0, 0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        score = tl.math.div_rn(tl.load(scores + column, mask=inside, other=float("-inf")), divisor)
        if NOISY:
            score += tl.load(gumbel + column, mask=inside, other=0.0)
        nan = score != score
        nothing = tl.maximum(nothing, tl.max(nan.to(tl.int32), 0))
        top, where = tl.max(tl.where(nan, float("-inf"), score), 0, return_indices=True)
        at = tl.where(top > best, start + where, at)
        best = tl.maximum(best, top)
    token = tl.where(best == float("-inf"), _ALL_EXCLUDED, at)
    token = tl.where((best == float("inf")) | (nothing > 0), _NOT_FINITE, token)
    tl.store(choice + row, token)


@triton.jit(do_not_specialize=["nodes"])
def _walk(tokens, parents, candidate, choice, paths, chosen, accepted, nodes, WIDE: tl.constexpr):
    """Down one tree along the candidates that bear the chosen tokens; what comes after the last is repeated."""
    first = tl.program_id(0) * nodes
    column = tl.arange(0, WIDE)
    inside = column < nodes
    token = tl.load(tokens + first + column, mask=inside, other=0)
    parent = tl.load(parents + first + column, mask=inside, other=-1)
    may = inside & (tl.load(candidate + first + column, mask=inside, other=0) != 0)
    choices = tl.load(choice + first + column, mask=inside, other=0)
    node, count = 0, 0
    for step in range(nodes):
        wanted = tl.sum(tl.where(column == node, choices, 0), 0)
        tl.store(paths + first + step, node)
        tl.store(chosen + first + step, wanted)
        child = tl.min(tl.where(may & (parent == node) & (token == wanted), column, WIDE), 0)
        count += (child < WIDE).to(tl.int32)
        node = tl.where(child < WIDE, child, node)
    tl.store(accepted + tl.program_id(0), count)


@triton.jit(do_not_specialize=["low", "high", "stream", "position", "beyond"])
def _gumbel(out, low: tl.int64, high: tl.int64, stream, position: tl.int64, beyond, size, BLOCK: tl.constexpr):
    """A row of noise; see `s4c.verify.noise`, whose names these are."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    which = index // _COUNTERS % 4
    a = index // (4 * _COUNTERS) * _COUNTERS + index % _COUNTERS
    b, c, d = a * 0 + position, a * 0 + stream, a * 0 + beyond
    low, high = low + a * 0, high + a * 0
    for _ in tl.static_range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((second >> 32) & _WORD) ^ b ^ low, second & _WORD
        c, d = ((first >> 32) & _WORD) ^ d ^ high, first & _WORD
        low, high = (low + _STEPS[0]) & _WORD, (high + _STEPS[1]) & _WORD
    word = tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))
    near_zero = word > (_WORD >> 1)
    tail = (tl.where(near_zero, _WORD - word, word).to(tl.float32) + 0.5) * 2.0**-32
    r, e = _split(tl.where(near_zero, tail, 1 - tail))
    exponential = -_logarithm(tl.where((near_zero == 0) & (e == 0), -tail, r), e)
    r, e = _split(exponential)
    tl.store(out + index, -_logarithm(r, e), mask=index < size)


@triton.jit
def _split(x):
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    exponent = (bits >> 23) - 126
    low = mantissa < 0.5**0.5
    return tl.where(low, mantissa + mantissa, mantissa) - 1, (exponent - low.to(tl.int32)).to(tl.float32)


@triton.jit
def _logarithm(r, e):
    p = r * 0 + _SERIES[0]
    for i in tl.static_range(1, 9):
        p = p * r + _SERIES[i]
    square = r * r
    rest = p * r * square + e * -2.12194440e-4
    return r + (rest - square * 0.5) + e * 0.693359375
