"""What drafting and judging ask of rows of scores and of noise, on the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from s4c.models.native import library
from s4c.verify.noise import CPU, Gumbel
from s4c.verify.tree import top_and_total

MOST_TOP = 64
"""What core.h allows."""


def native_top_and_total(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_and_total` in one pass; its total adds up in another order."""
    if count > MOST_TOP:
        return top_and_total(scores, count)
    scores = scores.contiguous()
    shape, columns = scores.shape[:-1], scores.shape[-1]
    top, index = torch.empty(*shape, count), torch.empty(*shape, count, dtype=torch.int64)
    total = torch.empty(*shape, 1)
    pointers = (top.data_ptr(), index.data_ptr(), total.data_ptr())
    library.check(library.core().s4c_top(scores.data_ptr(), total.numel(), columns, count, *pointers))
    return top, index, total


def native_highest(
    logits: Tensor, temperatures: Sequence[float], noise: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """`highest` of cooled and noisy rows, in one pass; see `s4c.verify.scores.Highest`."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    assert logits.dtype == torch.float32
    assert len(temperatures) == len(noise) == rows
    values, indices = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    cooling = (ctypes.c_float * rows)(*temperatures)
    noisy = library.pointers([None if row is None else row.data_ptr() for row in noise])
    arrays = (cooling, noisy, values.data_ptr(), indices.data_ptr())
    library.check(library.core().s4c_highest(logits.data_ptr(), rows, columns, *arrays))
    return values, indices


def native_gumbel(seed: int, stream: int, position: int, size: int, device: torch.device = CPU) -> Tensor:
    """`s4c.verify.noise.gumbel`, the same bit by bit."""
    row = torch.empty(size)
    library.check(library.core().s4c_noise(seed, stream, position, size, row.data_ptr()))
    return row.to(device)


def noise_kernel() -> Gumbel | None:
    """What makes noise fast, for all runtimes and devices; None where the core is not built."""
    return native_gumbel if library.problem() is None else None
