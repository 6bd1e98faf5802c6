"""Decoder layers on the native kernels: one call runs all of them for all rows of a pass."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s4c.models.adapter import PRODUCTS, AdaptedRows, Adapter
from s4c.models.cache import ROWS_PER_GROWTH
from s4c.models.layers import DecoderLayer, Join, LayerShape, RMSNorm
from s4c.models.native import library, memory
from s4c.models.native.library import CCache, CLayer, CLinear, CStack
from s4c.models.native.linear import BLOCK, NativeLinear, NativeLowRank
from s4c.models.stack import Rope, Stack


class NativeStack(Stack):
    """`Stack` on the native kernels; the cache holds keys in blocks of sixteen rows, as the kernels read them."""

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
        assert device.type == "cpu"
        self._shape = shape
        self._dtype = dtype
        self._cell = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._frequencies = rope.frequencies.float().contiguous()
        self._final_norm = None if norm is None else norm.weight.data.float().contiguous()
        self._layers = (CLayer * layers)()
        self._width = shape.hidden if join is None else 2 * shape.hidden
        self._join_norm = None if join is None else join.norm.weight.data.float().contiguous()
        self._join = None if join is None else NativeLinear(join.linear.weight, join.linear.bias, dtype)
        self._kept: dict[int, list[Any]] = {}
        self.c_stack = CStack(
            shape.hidden,
            shape.intermediate,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            layers,
            shape.eps,
            rope.scaling,
            self._frequencies.data_ptr(),
            None if self._final_norm is None else self._final_norm.data_ptr(),
            None if self._join_norm is None else self._join_norm.data_ptr(),
            CLinear() if self._join is None else self._join.c,
            self._layers,
        )
        self._start()

    def _start(self) -> None:
        """Nothing is cached, and there is no adapter."""
        self.lengths = []
        self._keys, self._values = _cells(len(self._layers), self._shape, self._cell)
        self.c_cache = CCache(half=int(self._cell != torch.float32))
        self._adapter: Adapter | None = None
        self._terms: list[NativeLowRank] = []

    def place(self, index: int, layer: DecoderLayer) -> None:
        attention, mlp = layer.attention, layer.mlp
        norms = [layer.attention_norm.weight.data.float()]
        norms += [n.weight.data.float() for n in (attention.q_norm, attention.k_norm)] if self._shape.head_norms else []
        norms += [layer.mlp_norm.weight.data.float()]
        first, *heads, last = (norm.data_ptr() for norm in norms)
        products = []
        for linear in (attention.qkv, attention.out, mlp.gate_up, mlp.down):
            products.append(NativeLinear(linear.weight, linear.bias, self._dtype, pair=linear is mlp.gate_up))
            linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self._kept[index] = [norms, products]
        self._layers[index] = CLayer(first, *(heads or (None, None)), last, *(product.c for product in products))

    def reserve(self, slots: int, length: int) -> None:
        old_slots, old_rows = self.c_cache.slots, self.c_cache.rows
        if slots <= old_slots and length <= old_rows:
            return
        slots, rows = max(slots, old_slots), max(old_rows, -(-length // ROWS_PER_GROWTH) * ROWS_PER_GROWTH)
        self._keys, self._values = self._keys.grown(slots, rows), self._values.grown(slots, rows)
        self.c_cache.keys, self.c_cache.values = self._keys.tensor.data_ptr(), self._values.tensor.data_ptr()
        self.c_cache.slots, self.c_cache.rows = slots, rows
        self.lengths += [0] * (slots - len(self.lengths))

    def run(
        self,
        x: Tensor,
        parents: Tensor,
        first_slot: int = 0,
        pending: int = 0,
        adapted: AdaptedRows | None = None,
        taps: Sequence[int] = (),
    ) -> Tensor:
        batch, count, width = x.shape
        slots = slice(first_slot, first_slot + batch)
        self.reserve(slots.stop, max(self.lengths[slots], default=0) + pending + count)
        x, parents = x.float().contiguous(), parents.contiguous()
        assert width == self._width
        assert parents.shape == (batch, pending + count)
        assert parents.dtype == torch.int64
        lengths = (ctypes.c_int32 * batch)(*self.lengths[slots])
        rows = None if adapted is None else self._adapt(adapted)
        out = torch.empty(batch, count, self._shape.hidden * (1 + len(taps)))
        status = library.core().s4c_pass(
            ctypes.byref(self.c_stack),
            ctypes.byref(self.c_cache),
            x.data_ptr(),
            out.data_ptr(),
            batch,
            count,
            pending,
            first_slot,
            lengths,
            parents.data_ptr(),
            None if rows is None else rows.data_ptr(),
            (ctypes.c_int32 * len(taps))(*taps),
            len(taps),
        )
        library.check(status)
        return out

    def _adapt(self, adapted: AdaptedRows) -> Tensor:
        """[B, N] uint8, where the low-rank terms act; those of another adapter are taken away."""
        if adapted.adapter is not self._adapter:
            self._adapter = adapted.adapter
            terms = [
                {name: NativeLowRank(term, name == "gate_up") for name, term in layer.items()}
                for layer in adapted.adapter.layers
            ]
            for index, layer in enumerate(self._layers):
                for name in PRODUCTS:
                    pointer = ctypes.pointer(terms[index][name].c) if terms else None
                    getattr(layer, name).low_rank = pointer
            self._terms = [term for layer in terms for term in layer.values()]
        return adapted.rows.to(torch.uint8).contiguous()

    def keep(self, slot: int, rows: list[int]) -> None:
        shape, start = self._shape, self.lengths[slot]
        if rows[-1] != len(rows) - 1:
            library.core().s4c_keep(
                ctypes.byref(self.c_cache),
                len(self._layers),
                shape.kv_heads,
                shape.head_dim,
                slot,
                start,
                (ctypes.c_int32 * len(rows))(*rows),
                len(rows),
            )
        self.lengths[slot] += len(rows)

    def move(self, source: int, destination: int) -> None:
        length = self.lengths[source]
        for cells in (self._keys, self._values):
            cells.rows(destination, length).copy_(cells.rows(source, length))
        self.lengths[destination] = length

    def twin(self) -> NativeStack:
        twin = copy.copy(self)
        twin._layers = type(self._layers).from_buffer_copy(self._layers)
        for layer in twin._layers:
            for name in PRODUCTS:
                getattr(layer, name).low_rank = None
        twin.c_stack = CStack.from_buffer_copy(self.c_stack)
        twin.c_stack.layer = twin._layers
        twin._start()
        return twin


@dataclass(frozen=True)
class _Cells:
    """The keys or the values of a cache, as core.h has them.

    Attributes:
        tensor: [layers, slots, ...], rows `together` of a kind along the dimension `axis`.
    """

    tensor: Tensor
    axis: int
    together: int

    def rows(self, slot: int, count: int) -> Tensor:
        """A view of the first rows of a slot, whole groups of them."""
        return self.tensor[:, slot].narrow(self.axis - 1, 0, -(-count // self.together))

    def grown(self, slots: int, rows: int) -> _Cells:
        """The same cells with room for more; what is new is zero."""
        old = self.tensor
        sizes = list(old.shape)
        sizes[1], sizes[self.axis] = slots, rows // self.together
        tensor = memory.zeros(sizes, old.dtype)
        tensor[:, : old.shape[1]].narrow(self.axis, 0, old.shape[self.axis]).copy_(old)
        return _Cells(tensor, self.axis, self.together)


def _cells(layers: int, shape: LayerShape, cell: torch.dtype) -> tuple[_Cells, _Cells]:
    """Keys and values without any slot."""
    slots, wide = (layers, 0, shape.kv_heads), -(-shape.head_dim // BLOCK)
    if cell == torch.float32:
        keys = torch.zeros(*slots, 0, shape.head_dim, BLOCK)
        return _Cells(keys, 3, BLOCK), _Cells(torch.zeros(*slots, 0, wide * BLOCK), 3, 1)
    keys = torch.zeros(*slots, 0, -(-shape.head_dim // 32) * 16, BLOCK, 2, dtype=cell)
    return _Cells(keys, 3, BLOCK), _Cells(torch.zeros(*slots, wide, 0, BLOCK, 2, dtype=cell), 4, 2)
