"""Decoder layers with the cache that they read and write: what a target and the heads of a drafter run on.

A pass appends the rows of new tokens behind the committed rows of each slot without committing them; `keep`
then keeps those of an accepted path. What was not kept is overwritten by the next pass.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s4c.models.adapter import AdaptedRows
from s4c.models.cache import ROWS_PER_GROWTH, CacheView, KVCache
from s4c.models.layers import NO_TERMS, DecoderLayer, Join, LayerShape, RMSNorm, Rotary, grouped_mask, opened, pack
from s4c.models.recorded import Recordings
from s4c.types import placed
from s4c.verify.tree import ancestors

MOST_RECORDED, MOST_RECORDINGS = 64, 512
"""Uncommitted rows of a slot up to which passes are recorded on a GPU, and recordings that are kept."""


@dataclass(frozen=True)
class Rope:
    """Rotary angles: [head_dim / 2] radians per position, and the factor on cosines and sines."""

    frequencies: Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class OpenLayers:
    """The layers of a stack for training through them: their own weights stay fixed, gradients pass."""

    layers: list[DecoderLayer]
    rope: Rope
    norm: RMSNorm


class Stack(ABC):
    """Decoder layers; a join before them and a norm after them where there are such.

    Args:
        layers: their number; `place` brings them.
        shape: of each.
        rope: their rotary angles.
        dtype: of the weights and of the inputs of products.
        device: where they run.
        norm: after the last layer.
        join: before the first one.

    Attributes:
        lengths: the committed rows of each slot.
    """

    lengths: list[int]

    @abstractmethod
    def __init__(
        self,
        layers: int,
        shape: LayerShape,
        rope: Rope,
        dtype: torch.dtype,
        device: torch.device,
        norm: RMSNorm | None = None,
        join: Join | None = None,
    ) -> None: ...

    @abstractmethod
    def place(self, index: int, layer: DecoderLayer) -> None:
        """Take the weights of a layer, packed for speed; the layer itself is used up."""

    @abstractmethod
    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of `length` rows each; cached rows stay."""

    @abstractmethod
    def run(
        self,
        x: Tensor,
        parents: Tensor,
        first_slot: int = 0,
        pending: int = 0,
        adapted: AdaptedRows | None = None,
        taps: Sequence[int] = (),
    ) -> Tensor:
        """Append the rows of a pass and run the layers.

        Args:
            x: [B, N, d], rows for the slots from `first_slot` on; [B, N, 2d] where a join comes first.
            parents: [B, pending + N] int64: the uncommitted row one position before each uncommitted row,
                smaller than its own; -1 where it follows the committed ones. A row sees these, and the
                uncommitted rows from parent to parent.
            pending: uncommitted rows of earlier calls that still stand in each slot.
            adapted: the adapter of the pass and its rows [B, N].
            taps: numbers of layers, ascending from 1, behind which the residual stream is given as well.

        Returns:
            [B, N, d (1 + taps)] float32: what the layers give, then what was tapped.
        """

    @abstractmethod
    def keep(self, slot: int, rows: list[int]) -> None:
        """Commit appended rows of a slot: ascending, counted from the first uncommitted one."""

    def start(self, slot: int) -> None:
        """Begin a sequence in a slot, whatever it held."""
        self.lengths[slot] = 0

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Copy the sequence of one slot to another."""

    @abstractmethod
    def twin(self) -> Stack:
        """The same layers with an empty cache of their own, and without an adapter."""


class TorchStack(Stack):
    """`Stack` in torch: any device; also what the native kernels are tested against.

    Where an output is not finite, a row that others do not see may have spoilt it (a sibling, or what an ended
    sequence left in the cache), and the pass is run again with masks that hold such rows off. Recorded passes are
    not looked at, for the look would wait for them: there slots are emptied for each sequence, and siblings are not
    safe from each other.

    Attributes:
        records: whether passes over few rows are recorded and replayed (recorded.py), as on a GPU.
    """

    def __init__(
        self,
        layers: int,
        shape: LayerShape,
        rope: Rope,
        dtype: torch.dtype,
        device: torch.device,
        norm: RMSNorm | None = None,
        join: Join | None = None,
    ) -> None:
        self._shape = shape
        self._rope = Rope(rope.frequencies.to(device), rope.scaling)
        self._dtype = dtype
        self._norm = norm
        self._join = join
        if join is not None:
            join.linear.pack(dtype)
        self._layers: dict[int, DecoderLayer] = {}
        self._recordings = Recordings(device)
        self._recorded_of: Tensor | None = None
        self.records = device.type == "cuda"
        self._cache = KVCache(layers, shape.kv_heads, shape.head_dim, dtype, device)
        self.lengths = self._cache.lengths

    def place(self, index: int, layer: DecoderLayer) -> None:
        pack(layer, self._dtype)
        self._layers[index] = layer

    def reserve(self, slots: int, length: int) -> None:
        self._cache.reserve(slots, length)

    def run(
        self,
        x: Tensor,
        parents: Tensor,
        first_slot: int = 0,
        pending: int = 0,
        adapted: AdaptedRows | None = None,
        taps: Sequence[int] = (),
    ) -> Tensor:
        batch, count, _ = x.shape
        slots = slice(first_slot, first_slot + batch)
        if self.records and adapted is None and pending + count <= MOST_RECORDED:
            return self._replay(x, parents, slots, pending, taps)
        view = self._cache.view(slots, count, pending)
        output = self._pass(x, parents, view, pending, self._dtype, adapted, taps)
        if not self.records and not math.isfinite(output.sum().item()):
            self._cache.clear(slots, pending)
            output = self._pass(x, parents, view, pending, torch.bool, adapted, taps)
        return output

    def _replay(self, x: Tensor, parents: Tensor, slots: slice, pending: int, taps: Sequence[int]) -> Tensor:
        """`run` by a recorded pass: rows and cache rows are filled up to the next fixed size, and nobody sees that."""
        count = x.shape[1]
        fixed = 1 << (count - 1).bit_length()
        self.reserve(slots.stop, max(self.lengths[slots]) + pending + fixed)
        end = -(-(max(self.lengths[slots]) + pending + fixed) // ROWS_PER_GROWTH) * ROWS_PER_GROWTH
        filled = F.pad(x, (0, 0, 0, fixed - count)), F.pad(parents, (0, fixed - count), value=-1)
        inputs = (*filled, placed(self.lengths[slots], x.device))
        key = (slots.start, x.shape[0], fixed, pending, end, tuple(taps))
        if self._recorded_of is not self._cache.data or len(self._recordings) > MOST_RECORDINGS:
            self._recordings.forget()
            self._recorded_of = self._cache.data

        def fixed_pass(x: Tensor, parents: Tensor, lengths: Tensor) -> Tensor:
            view = self._cache.fixed_view(slots, lengths, fixed, pending, end)
            return self._pass(x, parents, view, pending, self._dtype, None, taps)

        return self._recordings.run(key, fixed_pass, inputs)[:, :count]

    def _pass(
        self,
        x: Tensor,
        parents: Tensor,
        view: CacheView,
        pending: int,
        masked: torch.dtype,
        adapted: AdaptedRows | None,
        taps: Sequence[int],
    ) -> Tensor:
        """`run` with a mask of dtype `masked`."""
        visible = ancestors(parents)[:, pending:]
        positions = view.lengths[:, None] + visible.sum(-1) - 1
        rotary = Rotary(positions, self._rope.frequencies, self._rope.scaling)
        mask = grouped_mask(view.mask(visible), self._shape, masked)
        x = x.float() if self._join is None else self._join(x)
        tapped = []
        for index in range(len(self._layers)):
            terms = NO_TERMS if adapted is None else adapted.terms(index)
            x = self._layers[index](x, rotary, mask, view, index, terms)
            if index + 1 in taps:
                tapped.append(x)
        return torch.cat([x if self._norm is None else self._norm(x), *tapped], -1)

    def keep(self, slot: int, rows: list[int]) -> None:
        self._cache.keep(slot, rows)

    def start(self, slot: int) -> None:
        super().start(slot)
        if self.records:
            self._cache.clear(slice(slot, slot + 1))

    def move(self, source: int, destination: int) -> None:
        self._cache.move(source, destination)

    def twin(self) -> TorchStack:
        twin = copy.copy(self)
        twin._recordings, twin._recorded_of = Recordings(self._cache.device), None
        twin._cache = self._cache.twin()
        twin.lengths = twin._cache.lengths
        return twin

    def open(self) -> OpenLayers:
        """Copies of the layers to train through."""
        assert self._norm is not None
        return OpenLayers([opened(self._layers[i]) for i in range(len(self._layers))], self._rope, self._norm)


def stack_class(native: bool) -> type[Stack]:
    """The stack of a runtime."""
    if not native:
        return TorchStack
    from s4c.models.native.stack import NativeStack

    return NativeStack
