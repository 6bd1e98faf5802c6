"""Memory in large pages, which the processor finds its way in more quickly than in small ones."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

PAGE = 2 << 20

_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


def pages(size: int) -> Tensor:
    """[at least `size`] uint8, zero, from the beginning of a page on; freed with its last view."""
    memory = mmap.mmap(-1, size + PAGE, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :]


def zeros(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Like `torch.zeros`; in large pages where it fills one."""
    wanted = torch.empty(shape, dtype=dtype, device="meta")
    size = wanted.numel() * wanted.itemsize
    return pages(size)[:size].view(dtype).view(shape) if size >= PAGE else torch.zeros(shape, dtype=dtype)


class Arena:
    """Room for many tensors; what they share is freed with the last of them."""

    SIZE = 32 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor at a cache line."""
        size = -(-shape.numel() * dtype.itemsize // 64) * 64
        if size > self._free.numel():
            self._free = pages(max(size, self.SIZE))
        taken, self._free = self._free[:size], self._free[size:]
        return taken[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
