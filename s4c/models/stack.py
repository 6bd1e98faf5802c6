"""Decoder layers with the cache that they read and write: what a target and the heads of a drafter run on.

A pass appends the rows of new tokens behind the committed rows of each slot without committing them; `keep`
then keeps those of an accepted path. What was not kept is overwritten by the next pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s4c.models.adapter import AdaptedRows
from s4c.models.cache import KVCache
from s4c.models.layers import NO_TERMS, DecoderLayer, Join, LayerShape, RMSNorm, Rotary, grouped_mask, opened, pack
from s4c.verify.tree import ancestors


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

    @abstractmethod
    def move(self, source: int, destination: int) -> None:
        """Copy the sequence of one slot to another."""


class TorchStack(Stack):
    """`Stack` in torch: any device; also what the native kernels are tested against."""

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
        visible = ancestors(parents)[:, pending:]
        view = self._cache.view(slice(first_slot, first_slot + batch), count, pending)
        positions = view.lengths[:, None] + visible.sum(-1) - 1
        rotary = Rotary(positions, self._rope.frequencies, self._rope.scaling)
        mask = grouped_mask(view.mask(visible), self._shape, self._dtype)
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

    def move(self, source: int, destination: int) -> None:
        self._cache.move(source, destination)

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
