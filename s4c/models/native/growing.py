"""Rows that grow in place, for the kernels: in a round they are copies of memory and no tensor operations."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import memmove

import torch
from torch import Tensor

from s4c.models.growing import GrowingRows


class NativeGrowingRows(GrowingRows):
    """`GrowingRows` that the kernels read."""

    def take(self, source: Tensor, slot: int, columns: Sequence[int]) -> None:
        assert source.dtype == torch.float32
        assert source.is_contiguous()
        _, rows, width = source.shape
        size, first = width * source.itemsize, source.data_ptr() + slot * rows * width * source.itemsize
        self._extend(len(columns))
        place = self.address(len(columns))
        if columns[-1] == len(columns) - 1:  # a path goes on to the right, so these are the first rows
            memmove(place, first, len(columns) * size)
            return
        for index, column in enumerate(columns):
            memmove(place + index * size, first + column * size, size)

    def address(self, count: int) -> int:
        """Where the last `count` of them begin."""
        return self._rows.data_ptr() + (self._count - count) * self._rows.shape[1] * self._rows.itemsize
