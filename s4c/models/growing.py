"""Rows that grow in place, such as the target's features along a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s4c.types import placed


class GrowingRows:
    """Rows [n, d] float32.

    Args:
        rows: the first ones, which are copied.
    """

    def __init__(self, rows: Tensor) -> None:
        self._count = 0
        self._rows = rows.new_empty(0, rows.shape[1], dtype=torch.float32)
        self.append(rows)

    def append(self, rows: Tensor) -> None:
        """More of them, [m, d], which are copied."""
        first = self._extend(len(rows))
        self._rows[first : self._count] = rows

    def take(self, source: Tensor, slot: int, columns: Sequence[int]) -> None:
        """More of them: some of source [B, N, d]."""
        self.append(source[slot, placed(columns, source.device)])

    def last(self, count: int) -> Tensor:
        """The last `count` of them, a view."""
        return self._rows[self._count - count : self._count]

    def _extend(self, more: int) -> int:
        """Makes room, and says where it begins."""
        first, self._count = self._count, self._count + more
        if self._count > len(self._rows):
            self._rows = torch.cat([self._rows[:first], self._rows.new_empty(2 * self._count, self._rows.shape[1])])
        return first

    def __len__(self) -> int:
        return self._count
