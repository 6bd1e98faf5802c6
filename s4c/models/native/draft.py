"""A whole draft in one call of the native kernels: heads, LM head, the growing tree."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from s4c.models.layers import Linear
from s4c.models.native import library
from s4c.models.native.decoder import c_embedding
from s4c.models.native.growing import NativeGrowingRows
from s4c.models.native.library import CHeads, CPlan, CRound, pointers
from s4c.models.native.linear import NativeGrowing, NativeLinear
from s4c.models.native.rows import MOST_TOP
from s4c.models.native.stack import NativeStack
from s4c.models.stack import Stack
from s4c.types import DraftTree
from s4c.verify.noise import CPU
from s4c.verify.tree import EXPANDED_PER_LEVEL, ListedTree, TreePlan


@dataclass
class Texts:
    """What the kernels need to echo what followed in the text before (s4c/drafters/echo.py).

    Attributes:
        tokens: of each sequence its text, numbers of 64 bits, the root last.
        weights: [L] float32, of a place whose last 1, 2, .., L tokens are those of a path.
        near, telling: places further back than the one weigh nothing with fewer tokens than the other.
    """

    tokens: Sequence[array[int]]
    weights: Tensor
    near: int
    telling: int


class NativeDraft:
    """Heads that draft one after the other, each on a stack with a join.

    Args:
        stacks: of the heads, in drafting order.
        lm_head: packed linear layers that make logits of a head's output, one after the other.
        embedding: [V, d], the target's, float32 or bfloat16.
        token_ids: [V'] int64, the target's token of each logit.
    """

    def __init__(self, stacks: Sequence[Stack], lm_head: nn.Module, embedding: Tensor, token_ids: Tensor) -> None:
        self._stacks = [stack for stack in stacks if isinstance(stack, NativeStack)]
        packed = [layer.packed for layer in lm_head.modules() if isinstance(layer, Linear)]
        products = [product for product in packed if isinstance(product, NativeLinear)]
        assert len(self._stacks) == len(stacks) > 0
        assert len(products) == len(packed) > 0
        self._kept = (products, embedding, token_ids)
        self._heads = CHeads(
            len(stacks),
            len(products),
            pointers([ctypes.addressof(stack.c_stack) for stack in self._stacks]),
            pointers([ctypes.addressof(stack.c_cache) for stack in self._stacks]),
            pointers([ctypes.addressof(product.c) for product in products]),
            token_ids.data_ptr(),
            c_embedding(embedding),
        )

    @staticmethod
    def grows(plan: TreePlan) -> bool:
        """Whether the kernels can grow that tree."""
        return plan.width <= MOST_TOP

    def grow(
        self,
        plan: TreePlan,
        unread: Sequence[Sequence[int]],
        features: Sequence[NativeGrowingRows],
        carry: Sequence[Tensor],
        temperatures: Sequence[float],
        noise: Sequence[Tensor | None],
        further: Sequence[tuple[NativeGrowing, Tensor] | None],
        texts: Texts | None = None,
    ) -> DraftTree:
        """A tree below the last token of each sequence; none of its rows is sampled.

        Args:
            plan: a tree that `grows`.
            unread: of each sequence 1 to M tokens, what the heads have not seen yet, the root last.
            features: of each sequence rows [at least as many, d]: the last ones are the target's, one position before
                each of them.
            carry: of each sequence [H - 1, d] float32, what all heads but the last gave at the last committed position;
                it is brought up to the root.
            temperatures: of the B requests.
            noise: B times D rows [V] float32, of the levels of each sequence; None where there is no noise.
            further: of each sequence the product that makes the logits of tokens beyond the draft vocabulary, and
                [at least as many as its outputs] int64, these tokens; None where there are none.
            texts: of the sequences, where they are to be echoed.
        """
        batch, longest = len(unread), max(map(len, unread))
        tokens = (ctypes.c_int64 * (batch * longest))(
            *chain.from_iterable([*u, *[0] * (longest - len(u))] for u in unread)
        )
        most = plan.nodes if plan.kind == "best" else plan.width * plan.depth + 1
        lengths = self._stacks[0].lengths[:batch]
        for stack in self._stacks:
            stack.reserve(batch, max(lengths) + longest + EXPANDED_PER_LEVEL * plan.depth)
        assert len(noise) == batch * plan.depth
        assert len(further) == batch
        assert all(rows.dtype == torch.float32 and rows.is_contiguous() for rows in carry)
        held: list[Any] = [
            tokens,
            (ctypes.c_int32 * batch)(*(len(line) for line in unread)),
            (ctypes.c_int32 * batch)(*lengths),
            pointers([rows.address(len(line)) for rows, line in zip(features, unread, strict=True)]),
            pointers([rows.data_ptr() for rows in carry]),
            (ctypes.c_float * batch)(*temperatures),
            pointers([None if row is None else row.data_ptr() for row in noise]),
            pointers([None if more is None else ctypes.addressof(more[0].c) for more in further]),
            pointers([None if more is None else more[1].data_ptr() for more in further]),
        ]
        echoed: tuple[Any, ...] = (None, 0, 0, 0)
        if texts is not None:
            held.append(pointers([text.buffer_info()[0] for text in texts.tokens]))
            held.append((ctypes.c_int32 * batch)(*(len(text) for text in texts.tokens)))
            echoed = (texts.weights.data_ptr(), len(texts.weights), texts.near, texts.telling)
        addresses = [ctypes.addressof(array) for array in held]
        heard = () if texts is not None else (None, None)
        shape = CPlan(plan.kind == "best", plan.width, plan.depth, plan.nodes, EXPANDED_PER_LEVEL, plan.floor)
        room = batch * most
        drafted, parents = (ctypes.c_int64 * room)(), (ctypes.c_int64 * room)()
        paths, candidate = (ctypes.c_float * room)(), (ctypes.c_bool * room)()
        size = library.core().s4c_draft(
            ctypes.byref(self._heads),
            ctypes.byref(shape),
            ctypes.byref(CRound(batch, longest, *addresses, *heard, *echoed)),
            most,
            drafted,
            parents,
            paths,
            candidate,
        )
        library.check(size)
        rows = (slice(b * size, (b + 1) * size) for b in range(batch))
        return ListedTree([(drafted[row], parents[row], candidate[row], [paths[row]]) for row in rows], CPU)
