"""N-gram lookup: what followed the last tokens when they stood in the text before.

It needs no training and no model. The longest suffix of the text that occurred earlier (up to `LONGEST`
tokens) is looked up, the most recent occurrences first; their continuations, merged, are the draft tree.
"""

from __future__ import annotations

import numpy as np

from s4c.drafters.base import Drafter, Method, Sequences
from s4c.types import DraftTree
from s4c.verify.tree import from_paths

LONGEST, SHORTEST = 4, 2
CONTINUATIONS = 4
DEPTH = 8


class NgramDrafter(Drafter):
    """Continuations of earlier occurrences of the present suffix."""

    name = "ngram"
    default_tree = f"chain:{DEPTH}"

    def propose(self, sequences: Sequences) -> DraftTree:
        plan = sequences.plan.deepened(DEPTH)
        branches = 1 if plan.kind == "chain" else CONTINUATIONS
        found = [matches(tokens, plan.depth, branches) for tokens in sequences.tokens]
        paths = [[path for path, _ in row] for row in found]
        chances = [[(1 - 0.5 ** (length - 1)) / (1 + rank) for rank, (_, length) in enumerate(row)] for row in found]
        return from_paths(sequences.roots, paths, plan.nodes, chances)


def matches(tokens: list[int], depth: int, branches: int) -> list[tuple[list[int], int]]:
    """Up to `branches` different continuations of up to `depth` tokens, the longest match's first.

    Args:
        tokens: the committed text; the match must have a token after it.

    Returns:
        The continuations, each with the length of its match.
    """
    text = np.asarray(tokens)
    found: list[tuple[list[int], int]] = []
    for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
        for start in np.flatnonzero((windows == text[-length:]).all(1))[::-1]:
            path = text[start + length : start + length + depth].tolist()
            if path not in (other for other, _ in found):
                found.append((path, length))
            if len(found) == branches:
                return found
        if found:
            return found
    return found


METHOD = Method(name=NgramDrafter.name, create=lambda target: NgramDrafter())
