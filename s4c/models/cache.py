"""A static key-value cache: one tensor, a slot for each sequence, rows in the order of the text.

A pass appends its keys and values behind the committed rows of each slot without committing them; `keep` then
moves the rows of an accepted path together and raises the lengths. What was not kept is overwritten by the
next pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s4c.types import placed

ROWS_PER_GROWTH = 256


class KVCache:
    """Keys and values of a stack of layers.

    Args:
        layers: number of layers.
        heads: number of key-value heads.
        head_dim: size of a head.
        dtype: of the keys and values.
        device: where they lie.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(layers, 2, 0, heads, 0, head_dim, dtype=dtype, device=device)
        self.lengths: list[int] = []

    def twin(self) -> KVCache:
        """An empty one for the same layers."""
        layers, _, _, heads, _, head_dim = self.data.shape
        return KVCache(layers, heads, head_dim, self.data.dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of `length` rows; cached rows stay where they are."""
        layers, two, old_slots, heads, old_length, head_dim = self.data.shape
        if slots <= old_slots and length <= old_length:
            return
        slots = max(slots, old_slots)
        length = max(old_length, -(-length // ROWS_PER_GROWTH) * ROWS_PER_GROWTH)
        grown = self.data.new_zeros(layers, two, slots, heads, length, head_dim)
        grown[:, :, :old_slots, :, :old_length] = self.data
        self.data = grown
        self.lengths += [0] * (slots - len(self.lengths))

    def view(self, slots: slice, count: int, pending: int = 0) -> CacheView:
        """Open the cache for a pass that appends `count` rows to each slot, behind `pending` uncommitted ones."""
        lengths = self.lengths[slots]
        end = max(lengths) + pending + count
        self.reserve(slots.stop, end)
        level = lengths[0] + pending if len(set(lengths)) == 1 else None
        held = placed(lengths, self.device)
        return CacheView(self.data[:, :, slots], held, count, pending, end, level)

    def fixed_view(self, slots: slice, lengths: Tensor, count: int, pending: int, end: int) -> CacheView:
        """`view` for a pass that is to be recorded: the device alone knows the lengths [B], and `end` rows are read."""
        return CacheView(self.data[:, :, slots], lengths, count, pending, end)

    def keep(self, slot: int, rows: list[int]) -> None:
        """Commit appended rows of a slot: ascending, counted from the first appended one."""
        start, count = self.lengths[slot], len(rows)
        if rows[-1] != count - 1:
            index = placed(rows, self.device) + start
            self.data[:, :, slot, :, start : start + count] = self.data[:, :, slot, :, index]
        self.lengths[slot] += count

    def clear(self, slots: slice, pending: int = 0) -> None:
        """Zero what stands behind the committed rows of these slots, and `pending` uncommitted ones."""
        for slot, length in enumerate(self.lengths[slots], slots.start):
            self.data[:, :, slot, :, length + pending :] = 0

    def move(self, source: int, destination: int) -> None:
        """Copy the rows of one slot to another, and nothing behind them."""
        length = self.lengths[source]
        self.data[:, :, destination, :, :length] = self.data[:, :, source, :, :length]
        self.lengths[destination] = length
        self.clear(slice(destination, destination + 1))


class CacheView:
    """The cache as one pass sees it.

    Args:
        data: [layers, 2, B, heads, rows, head_dim], the cache of its slots.
        lengths: [B] int64, the committed rows of each slot.
        count: rows that are appended.
        pending: uncommitted rows before them.
        end: number of rows that the pass reads, at least those of the longest slot, pending and appended ones included.
        level: where the new rows of all slots begin; None where they begin in different places, or nobody knows.
    """

    def __init__(
        self, data: Tensor, lengths: Tensor, count: int, pending: int, end: int, level: int | None = None
    ) -> None:
        self.end = end
        self.lengths = lengths
        self._data = data
        self._count = count
        self._uncommitted = pending + count
        self._level = level
        self._rows = lengths[:, None] + torch.arange(pending, pending + count, device=data.device)
        self._batch = torch.arange(len(lengths), device=data.device)[:, None]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, N, heads, head_dim] keys and values of a layer; get all up to `end`.

        Returns:
            Two tensors [B, heads, end, head_dim].
        """
        for which, new in enumerate((keys, values)):
            if self._level is not None:
                self._data[layer, which, :, :, self._level : self.end] = new.transpose(1, 2)
            else:
                self._data[layer, which][self._batch, :, self._rows] = new
        read = self._data[layer, :, :, :, : self.end]
        return read[0], read[1]

    def mask(self, visible: Tensor) -> Tensor | None:
        """[B, N, end] bool: each new row sees the committed rows of its slot and some uncommitted ones.

        Args:
            visible: [B, N, pending + N] bool, which of the uncommitted rows it sees.

        Returns:
            None where every row sees everything up to `end`.
        """
        if self._uncommitted == 1 and self._level is not None:
            return None
        offset = torch.arange(self.end, device=self.lengths.device) - self.lengths[:, None]
        index = offset.clamp(0, self._uncommitted - 1)[:, None].expand(-1, self._count, -1)
        inside = ((offset >= 0) & (offset < self._uncommitted))[:, None]
        return (offset < 0)[:, None] | (inside & visible.gather(2, index))
