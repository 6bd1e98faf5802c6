"""Tokens of a sequence's own text that a reduced draft vocabulary lacks.

A draft vocabulary holds the tokens that are frequent in all texts. Most of the others that a text does use stand in it
already: names, numbers, words of the passage that is to be summed up. So each sequence may draft these as well. Where
the drafter reads the target's own LM head, that takes the head's rows for them and no training. Of the built-in model's
answers to Spec-Bench's questions a vocabulary of 10,240 holds 93.3% of the tokens, and 98.3% together with those that
stood in prompt or answer before.

The rows are a small product for each sequence, and the latest `most` tokens are kept. What a sequence may draft depends
on its own committed text alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s4c.models.base import Target
from s4c.models.layers import GrowingLinear
from s4c.models.native.linear import NativeGrowing
from s4c.types import placed


@dataclass
class Words:
    """The tokens of one sequence's text that the draft vocabulary lacks.

    Attributes:
        product: of the LM head's rows for them.
        ids: [most] int64, their tokens, in the order of the rows.
        most: there is room for.
        rows: where each of them stands.
        seen: how many there have been, those that later ones took the place of among them.
    """

    product: GrowingLinear | NativeGrowing
    ids: Tensor
    most: int
    rows: dict[int, int] = field(default_factory=dict)
    seen: int = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return min(self.seen, self.most)


class ContextVocabulary:
    """What each slot may draft besides the draft vocabulary.

    Args:
        target: gives the rows of the LM head.
        token_ids: [V'] int64, the draft vocabulary.
        most: tokens of a sequence.
    """

    def __init__(self, target: Target, token_ids: Tensor, most: int) -> None:
        self._target = target
        self._drafted = set(token_ids.tolist())
        self._most = most
        self._slots: dict[int, Words] = {}

    def start(self, slot: int, tokens: Sequence[int]) -> None:
        """A sequence begins with these tokens."""
        size, device = self._target.spec.hidden_size, self._target.device
        native = self._target.runtime == "native"
        product = NativeGrowing(size, self._most) if native else GrowingLinear(size, self._most, device)
        self._slots[slot] = Words(product, torch.zeros(self._most, dtype=torch.int64, device=device), self._most)
        self.add(slot, tokens)

    def add(self, slot: int, tokens: Sequence[int]) -> None:
        """It goes on with these."""
        words = self._slots[slot]
        unknown = (token for token in dict.fromkeys(tokens) if token not in self._drafted and token not in words.rows)
        new = list(unknown)[-self._most :]
        if not new:
            return
        rows = [(words.seen + i) % self._most for i in range(len(new))]
        taken = set(rows)
        words.rows = {token: row for token, row in words.rows.items() if row not in taken}
        words.rows |= dict(zip(new, rows, strict=True))
        words.seen += len(new)
        ids, at = placed([new, rows], self._target.device)
        words.ids[at] = ids
        words.product.place(rows, self._target.head_weight(ids))

    def move(self, source: int, destination: int) -> None:
        """The state of slot `source` becomes that of slot `destination`."""
        self._slots[destination] = self._slots.pop(source)

    def kernels(self, batch: int) -> list[tuple[NativeGrowing, Tensor] | None]:
        """For native drafting in the first slots: products, and the tokens of their outputs; None: no tokens."""
        each = [self._slots[slot] for slot in range(batch)]
        return [(w.product, w.ids) if w.count and isinstance(w.product, NativeGrowing) else None for w in each]

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of outputs [B, W, d] of the drafter in the first B slots.

        Returns:
            [B, W, U] float32, -inf where a token is not of a sequence's text, and [U] int64, the tokens of the columns.
        """
        batch, width, _ = hidden.shape
        each = [self._slots[slot] for slot in range(batch)]
        union = sorted({token for words in each for token in words.rows})
        logits = hidden.new_full((batch, width, len(union)), -torch.inf, dtype=torch.float32)
        ids = placed(union, hidden.device, torch.int64)
        for b, words in enumerate(each):
            if words.count:
                logits[b, :, torch.searchsorted(ids, words.ids[: words.count])] = words.product(hidden[b])
        return logits, ids
