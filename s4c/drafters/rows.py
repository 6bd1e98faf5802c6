"""The rows that an autoregressive drafter runs in a round: text that it has not read yet, then the nodes it expands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s4c.types import placed
from s4c.verify.tree import TreeBuilder


class Rows:
    """Rows of the passes of one draft, in the order in which they are appended to the caches.

    Args:
        tokens: [B, M] int64, text, padded at the end.
        counts: B numbers of tokens without padding.

    Attributes:
        tokens: [B, R] int64.
        parents: [B, R] int64, the row of the position before; -1 for the first one.
        counts: B numbers of rows of text.
        text: M, their number with padding.
        frontier: [B, W] int64, the rows whose children are drafted next.
    """

    def __init__(self, tokens: Tensor, counts: list[int]) -> None:
        batch, self.text = tokens.shape
        self.tokens = tokens
        self.parents = torch.arange(-1, self.text - 1, device=tokens.device).expand(batch, -1)
        self.counts = counts
        self.frontier = placed(counts, tokens.device)[:, None] - 1
        self._nodes = torch.zeros_like(self.frontier)

    @classmethod
    def of(cls, lines: Sequence[list[int]], device: torch.device) -> Rows:
        """The rows of text, [1 to M] tokens for each sequence."""
        counts = [len(line) for line in lines]
        longest = max(counts)
        return cls(placed([line + [0] * (longest - len(line)) for line in lines], device), counts)

    @property
    def count(self) -> int:
        return self.tokens.shape[1]

    def expand(self, builder: TreeBuilder) -> None:
        """Append the frontier of a tree."""
        nodes, first = builder.frontier, self.count
        above = (builder.parents.gather(1, nodes)[..., None] == self._nodes[:, None]).max(-1).indices
        self.parents = torch.cat([self.parents, self.frontier.gather(1, above)], 1)
        self.tokens = torch.cat([self.tokens, builder.tokens.gather(1, nodes)], 1)
        self.frontier = torch.arange(first, first + nodes.shape[1], device=nodes.device).expand_as(nodes)
        self._nodes = nodes
