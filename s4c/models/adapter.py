"""What a drafter may add to its target: tokens of its own, and low-rank terms that act at their rows alone.

The tokens V, V + 1, ... of a draft tree are adaptive: they take their embeddings from the adapter, and at their rows
each product x W^T of a layer becomes x W^T + (x A^T) B^T. Every other row is computed exactly as without an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

PRODUCTS = ("qkv", "out", "gate_up", "down")
"""The products of a layer, by the names of its linear layers."""


@dataclass(frozen=True)
class LowRank:
    """(x A^T) B^T.

    Attributes:
        down: [r, inputs] float32, A.
        up: [outputs, r] float32, B.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Adapter:
    """Adaptive tokens and what acts at their rows.

    Attributes:
        embeddings: [k, d] float32, of the tokens V, V + 1, ...
        layers: for each decoder layer its terms by `PRODUCTS`; none at all leaves it at the embeddings.
    """

    embeddings: Tensor
    layers: Sequence[Mapping[str, LowRank]] = ()


@dataclass(frozen=True)
class AdaptedRows:
    """An adapter in one pass.

    Attributes:
        adapter: the adapter.
        rows: [B, N] bool, where it acts.
    """

    adapter: Adapter
    rows: Tensor

    def terms(self, layer: int) -> Mapping[str, RowTerm]:
        """What is added to the products of a layer."""
        layers, places = self.adapter.layers, self._places
        return {name: RowTerm(low_rank, places) for name, low_rank in layers[layer].items()} if layers else {}

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """The same rows by their numbers: to find them a GPU is waited for."""
        return self.rows.nonzero(as_tuple=True)


@dataclass(frozen=True)
class RowTerm:
    """A low-rank term at some rows of a product.

    Attributes:
        low_rank: the term.
        rows: their sequences and columns, two of [R] int64, or None for all of them.
    """

    low_rank: LowRank
    rows: tuple[Tensor, ...] | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, N, outputs], y with the term of x [B, N, inputs] added; y may be overwritten."""
        down, up = self.low_rank.down, self.low_rank.up
        if self.rows is None:
            return y + F.linear(F.linear(x.to(down.dtype), down), up).to(y.dtype)
        term = F.linear(F.linear(x[self.rows].float(), down), up)
        y[self.rows] = (y[self.rows] + term).to(y.dtype)
        return y
