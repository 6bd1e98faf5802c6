"""What drafting asks of rows of scores, on the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from s4c.models.native import library
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
