"""Weights in the layout that the kernels read, and their products.

    [outputs / 16][inputs / P][16][P]      P inputs of a kind side by side: 1 (fp32), 2 (bf16), 4 (int8)

int8 is symmetric, with a scale for each output; inputs are quantised row by row in the kernel.

One large number among many small ones would leave the others few steps of a scale. So each block of 64 inputs is
multiplied by the Hadamard matrix H before, and each block of weights too, which spreads what stands out and leaves the
product as it was: w x = (w H / 64) (H x), for H H = 64. (The idea is that of QuIP, arXiv 2307.13304, and of QuaRot,
arXiv 2404.00456.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s4c.models.adapter import LowRank
from s4c.models.native import library
from s4c.models.native.library import CLinear, CLowRank
from s4c.models.native.memory import Arena

BLOCK = 16
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class _Format:
    kind: int
    together: int
    unit: int
    """Inputs are padded to a multiple of this, what a tile register takes in."""


_FORMATS = {torch.float32: _Format(0, 1, 1), torch.bfloat16: _Format(1, 2, 32), torch.int8: _Format(2, 4, 64)}


SPREAD = 64
"""Inputs of int8 that are spread over one another."""


def spread(x: Tensor) -> Tensor:
    """[O, I'] float32: the blocks of x [O, I], with zeros behind it to whole ones, times H."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < SPREAD:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    padded = F.pad(x.float(), (0, -x.shape[1] % SPREAD))
    blocks: Tensor = padded.unflatten(1, (-1, SPREAD)) @ hadamard
    return blocks.flatten(1)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[O, I'] int8 and [O] float32: the spread weights are about 64 * values * scale, row by row."""
    weight = spread(weight) / SPREAD
    scale = weight.abs().amax(1) / 127
    values = (weight / scale.clamp(min=1e-30)[:, None]).round()
    return values.to(torch.int8), scale


def _blocks(weight: Tensor, pair: bool) -> Tensor:
    """Whole blocks of outputs; where gate and up are a pair, their blocks take turns."""
    if pair:
        gate, up = (_blocks(half, False).unflatten(0, (-1, BLOCK)) for half in weight.chunk(2))
        return torch.stack([gate, up], 1).flatten(0, 2)
    missing = -weight.shape[0] % BLOCK
    return F.pad(weight, (0,) * (2 * weight.ndim - 1) + (missing,)) if missing else weight


_ARENA = Arena()


class NativeLinear:
    """y = x W^T + b on packed weights, each row for itself.

    Args:
        weight: [outputs, inputs].
        bias: [outputs] or None.
        dtype: float32, bfloat16 or int8.
        pair: whether the outputs are those of gate and up, which the MLP's kernel combines.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, pair: bool = False) -> None:
        self.dtype = dtype
        self.shape = weight.shape
        self._pair = pair
        form = _FORMATS[dtype]
        outputs, inputs = weight.shape
        padded = -(-inputs // form.unit) * form.unit
        self._scale = self._sums = None
        if dtype == torch.int8:
            weight, scale = quantise(weight)
            self._scale = _blocks(scale, pair)
            self._sums = _blocks(weight.sum(1, dtype=torch.int32), pair).contiguous()
        self._bias = None if bias is None else _blocks(bias.detach().float(), pair).contiguous()
        rows = _blocks(weight.detach().to(dtype), pair)
        if padded > rows.shape[1]:
            rows = F.pad(rows, (0, padded - rows.shape[1]))
        blocks = rows.view(-1, BLOCK, padded // form.together, form.together).transpose(1, 2)
        self._packed = _ARENA.empty(blocks.shape, dtype).copy_(blocks)
        pointers = (self._packed, self._scale, self._sums, self._bias)
        counted = rows.shape[0] if pair else outputs  # a pair is finished by whole blocks, each with its other half
        self.c = CLinear(form.kind, inputs, padded, counted, *(None if t is None else t.data_ptr() for t in pointers))

    def __call__(self, x: Tensor) -> Tensor:
        """[..., outputs] float32 of [..., inputs]."""
        x = x.detach().float().contiguous()
        out = torch.empty(*x.shape[:-1], self.shape[0])
        rows = x.numel() // self.shape[1]
        if rows:
            library.check(library.core().s4c_linear(ctypes.byref(self.c), x.data_ptr(), rows, out.data_ptr()))
        return out

    def rows(self, rows: Tensor) -> Tensor:
        """[R, inputs], some rows of `dense`."""
        assert not self._pair
        return self._weights(self._packed[rows // BLOCK, :, rows % BLOCK].flatten(1), rows)

    def dense(self) -> Tensor:
        """[outputs, inputs], the weight that the products are of, in float32 for int8."""
        assert not self._pair
        packed = self._packed.transpose(1, 2).flatten(2).flatten(0, 1)[: self.shape[0]]
        return self._weights(packed, torch.arange(self.shape[0]))

    def _weights(self, packed: Tensor, rows: Tensor) -> Tensor:
        """[R, inputs] of the packed numbers [R, padded] of some rows."""
        weights = packed if self._scale is None else spread(packed * self._scale[rows, None])
        return weights[:, : self.shape[1]]


class NativeGrowing:
    """`GrowingLinear` for the kernels.

    Args:
        inputs: of x.
        most: rows.
    """

    def __init__(self, inputs: int, most: int) -> None:
        self._packed = torch.zeros(-(-most // BLOCK), inputs, BLOCK)
        self.c = CLinear(_FORMATS[torch.float32].kind, inputs, inputs, 0, self._packed.data_ptr())

    def place(self, places: Sequence[int], rows: Tensor) -> None:
        """Put rows [R, inputs] at R places; no place before the highest stays empty."""
        at = torch.tensor(places)
        self._packed[at // BLOCK, :, at % BLOCK] = rows.float()
        self.c.outputs = max(self.c.outputs, max(places) + 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., rows so far] float32 of [..., inputs]."""
        x = x.float().contiguous()
        out = torch.empty(*x.shape[:-1], self.c.outputs)
        library.check(
            library.core().s4c_linear(ctypes.byref(self.c), x.data_ptr(), x.numel() // x.shape[-1], out.data_ptr())
        )
        return out


class NativeLowRank:
    """A low-rank term in the layout that the kernels read.

    Args:
        term: what is added to a product.
        pair: whether its outputs are those of gate and up.
    """

    def __init__(self, term: LowRank, pair: bool) -> None:
        self._down = term.down.float().contiguous()
        self._up = _blocks(term.up.float(), pair).T.contiguous()
        self.c = CLowRank(len(self._down), self._down.data_ptr(), self._up.data_ptr())
