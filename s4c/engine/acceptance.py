"""How likely a drafted node is to be accepted: the drafter's probability, held against what became of others like it.

A drafter's law says how probable it is that a token follows its parent. The target may think otherwise, and under the
coupled rule the children are drawn with noise. So nodes are counted by who guessed them and by the log-odds of that
law, and the chance of the next one like them is

    law  *  how many of them the target wrote  /  sum of their laws

where the latest count most. All children of an accepted node are counted, those as well that were not checked: the
round tells which token came after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from s4c.types import DraftTree
from s4c.verify.tree import lines

DEEPEST = 8
"""Most levels that are planned."""

MOST_ODDS = 6
"""Log-odds beyond which nodes are counted together."""

NEGLIGIBLE = 0.003
"""Chance below which the children of a node are not looked at."""

MEMORY, SURPRISE = 0.98, 0.001
"""What an observation still counts when another hit was expected; how improbable a run of hits or misses shows that the
text has changed."""

PRIOR_WEIGHT, LASTING_WEIGHT = 4.0, 0.25
"""What a belief beforehand counts for, in times that something was expected: at the start, and for ever."""


class Share:
    """How often something happens, of the times that it is expected: forgotten slowly, but at once after a surprise."""

    def __init__(self) -> None:
        self.hits = self.weight = 0.0
        self._doubt = PRIOR_WEIGHT
        self._last, self._run = False, 1.0

    def observe(self, hit: bool, chance: float, expected: float = 1.0) -> bool:
        """Count an outcome whose chance was put at `chance`, out of one that is `expected`; True at a surprise."""
        self._run = (self._run if hit == self._last else 1.0) * (chance if hit else 1 - chance)
        self._last = hit
        surprised = self._run < SURPRISE
        memory = MEMORY**expected
        self.fade(min(memory, PRIOR_WEIGHT / (self.weight + self._doubt)) if surprised else memory)
        self._run = 1.0 if surprised else self._run
        self.hits += hit
        self.weight += expected
        return surprised

    def fade(self, memory: float) -> None:
        """Let what was counted count less."""
        self.hits *= memory
        self.weight *= memory
        self._doubt *= memory

    def value(self, prior: float) -> float:
        """The share; where little is known, what is believed beforehand."""
        doubt = self._doubt + LASTING_WEIGHT
        return (self.hits + doubt * prior) / (self.weight + doubt)


Cell = tuple[int, int]
"""Who guessed a node (a bit for each drafter, the last one's the lowest), and the log-odds of q."""


NOBODY: Cell = (0, 0)


@dataclass(slots=True)
class Row:
    """The nodes of one sequence's tree, by column.

    Attributes:
        tokens, parents, depths: of the nodes.
        cells, laws: where a node is counted, and q: its drafter's probability of it, given its parent.
        chances: a(v); 0 for what is no candidate.
    """

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    cells: list[Cell]
    laws: list[float]
    chances: list[float]

    def certainty(self) -> list[float]:
        """For each depth the chance that one of its nodes is accepted."""
        sums = [0.0] * (DEEPEST + 1)
        for depth, chance in zip(self.depths[1:], self.chances[1:], strict=True):
            if depth <= DEEPEST:
                sums[depth] += chance
        return sums


class Acceptance:
    """The counts, and the chances that follow from them."""

    def __init__(self) -> None:
        self._shares: dict[Cell, Share] = {}

    def read(self, tree: DraftTree) -> list[Row]:
        """The nodes of a tree, with their calibrated chances; nothing where no drafter says what it believes."""
        rows = lines(tree)
        return [self._row(*row) for row in rows] if rows[0][3] else []

    def chance(self, cell: Cell, law: float) -> float:
        """The calibrated chance of a node whose parent is accepted."""
        return min(1.0, law * self._shares[cell].value(1.0)) if cell in self._shares else law

    def follow(self, row: Row, tokens: Sequence[int]) -> list[int]:
        """Count the nodes that were to be right, and return the columns of those that were.

        Args:
            row: the tree of a sequence.
            tokens: what the round committed.
        """
        children: dict[int, list[int]] = {}
        for v in range(1, len(row.tokens)):
            if row.cells[v][0]:
                children.setdefault(row.parents[v], []).append(v)
        path = [0]
        for token in tokens:
            written = [v for v in children.get(path[-1], []) if row.tokens[v] == token]
            for v in children.get(path[-1], []):
                share = self._shares.setdefault(row.cells[v], Share())
                share.observe(v in written, self.chance(row.cells[v], row.laws[v]), row.laws[v])
            if not written:
                break
            path += written
        return path[1:]

    def _row(self, tokens: list[int], parents: list[int], candidate: list[bool], belief: list[list[float]]) -> Row:
        row = Row(tokens, parents, [0], [NOBODY], [1.0], [1.0])
        members = [(1 << bit, line) for bit, line in enumerate(reversed(belief))]
        for v in range(1, len(tokens)):
            above = parents[v]
            depth, chance, who, law, cell = row.depths[above] + 1, 0.0, 0, 0.0, NOBODY
            if candidate[v] and row.chances[above] >= NEGLIGIBLE:
                for bit, line in members:
                    if not math.isnan(line[v]):
                        who, law = who | bit, line[v] - line[above]
            if who:
                law = min(max(math.exp(min(law, 0.0)), 1e-9), 1 - 1e-9)
                odds = round(math.log(law / (1 - law)))
                cell = (who, min(max(odds, -MOST_ODDS), MOST_ODDS))
                chance = row.chances[above] * self.chance(cell, law)
            row.depths.append(depth)
            row.cells.append(cell)
            row.laws.append(law)
            row.chances.append(chance)
        return row
