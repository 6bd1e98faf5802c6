"""The planner: each round the tree that makes the most tokens per second on this machine.

                          B + sum of a(v) over the nodes v of the B trees, their roots not counted
    tokens per second  =  ------------------------------------------------------------------------
                                    T(B n) + D(l) + the rest of the round

n is the size of a tree, its probes included, and l the number of levels that were drafted, T and D are measured
(engine/costs.py; T for the lengths of the contexts and for probes), and a(v) is the chance that v is accepted: the
product, along its path, of the chances that a node is where its parent is.

The chance is not the drafter's probability q, but that calibrated: of the nodes with a like q, guessed by the same
drafters, it is known how often the target wrote them. That is known of every node below an accepted one,
checked or not, for the round tells which token came there. So are the sizes decided, in three steps.

    Before drafting    l, from what level i added on average when level i - 1 was right, and the n that trees of l
                       levels had lately. Nothing is drafted where the formula is highest at l = 0; what another drafter
                       found (`beside`) is counted first.
    While drafting     the draft ends before a level that is not worth its time: where the paths that lead there are
                       too improbable, all together (`TreePlan.floor`).
    Before the pass    n, from the nodes that are there: those of highest a(v) enter, as many as make it highest but for
                       a hundredth (`MARGIN`). No node is more probable than its parent, so the tree is whole.

A drafter with probes drafts for the round after: l says whether it hangs them, and what the probes of the round before
have drafted is checked as far as it is worth its pass, whatever l is.

What is not tried is not known. Now and then a tree is a little smaller than the best one (`LOOK`), for what a node
costs is seen in trees of several sizes, and after a pass far from its price it has `FEW` tokens. Where nothing is
drafted, the planner tries all the same, but spends no more than `TRYING` of the time on what the tries lose; what they
win is spent on further ones, so it returns quickly when the text changes. An estimate of a level that is not drafted,
though the one before was right, fades to that of the one before.

Lossless: under the coupled rule the output does not depend on the trees at all. Under the rejection rule it is exact in
law when a tree is a function of the committed text, of the drafter's laws below it, and of randomness that the
judgement does not see. Trees of kind `best` take the most probable children, not drawn ones, and what is remembered
here, seconds included, was seen when the tokens before the root were judged; the coins and draws at later positions
have not been looked at. The tree, and with the rejection rule the text for a seed, differ from run to run, for
seconds do; that is why a plan has to be asked for there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from s4c.engine.acceptance import DEEPEST, Acceptance, Row, Share
from s4c.engine.costs import CONTEXT, Costs, Prices
from s4c.types import DraftTree, Verdict
from s4c.verify.tree import TreePlan, lines, most_believed, pruned

NAME = "plan"
"""What users write in place of a tree."""

WIDTH, POOL = 8, 32
"""Most children of a node, and nodes to choose from."""

SPARE, RECEDING = 2, 1.0
"""Nodes that are drafted beyond the largest of the latest trees, and how much smaller that one counts each round."""

ALIKE = 32
"""Tokens of the contexts by which rounds are not told apart."""

TRYING, OWED = 0.01, 4
"""Part of the time that tries may lose, and how many of them may be owed: further ones wait until that is paid back."""

CLEARLY = 0.05
"""By how much more tokens per second drafting has to promise; with less it is a try."""

FADING = 0.5
"""What is left of an estimate of a level each time that there is a reason to doubt it, but nothing to observe."""

LEVEL_PRIOR = 0.6
"""Chance that the next level is right, before anything is known."""

LOOK, LESS = 24, 2
"""In each so manieth round a tree has so many nodes less than the best one."""

FEW = 4
"""Tokens of a pass that tells how fast the memory is."""

REPRICED = 4
"""Rounds after which it is asked again what they cost, and where nothing is drafted how long they took."""

MARGIN = 0.01
"""By how much more tokens per second larger trees have to promise: costs are not better known than that."""

SIZE_MEMORY = 0.9
"""What the sizes of trees so far still count when another one is seen."""

STALLED = 1.5
"""A round that takes so many times as long as it should was held up by something else."""

OVERLAPS = 4
"""Degrees of certainty of the other drafter, by which what a level adds to it is told apart."""


class Planner(Protocol):
    """Decides the trees of an engine's rounds."""

    @property
    def pool(self) -> int:
        """Most nodes of a tree."""

    def plan(self, contexts: Sequence[int]) -> TreePlan:
        """The plan that the drafter of this round gets; each sequence has so many tokens cached."""

    def prune(self, tree: DraftTree) -> DraftTree:
        """The part of a drafted tree that is worth its pass."""

    def record(self, verdict: Verdict, seconds: Mapping[str, float]) -> None:
        """Take in what became of the round; seconds by step."""


@dataclass
class FixedPlanner:
    """The same plan for every round."""

    fixed: TreePlan

    @property
    def pool(self) -> int:
        return self.fixed.nodes

    def plan(self, contexts: Sequence[int]) -> TreePlan:
        return self.fixed

    def prune(self, tree: DraftTree) -> DraftTree:
        return tree

    def record(self, verdict: Verdict, seconds: Mapping[str, float]) -> None:
        pass


@dataclass
class _Round:
    """What was decided for a round, and what the record of it needs."""

    batch: int
    prices: Prices
    further: int = 0
    levels: int = 0
    certainties: list[list[float]] = field(default_factory=list)
    undrafted_rate: float = 0.0
    stake: float = 0.0
    first: int = 1
    rows: list[Row] | None = None
    kept: list[list[int]] = field(default_factory=list)
    size: int = 1
    told: int = 0


class CostPlanner:
    """The planner of the head of this file, for one target and drafter.

    Args:
        costs: of rounds.
        probes: rows that a drafter with probes adds to a tree to draft the next one.
    """

    def __init__(self, costs: Costs, probes: int = 0) -> None:
        self.costs = costs
        self.probes = probes
        self.pool = POOL + probes
        self.acceptance = Acceptance()
        self.levels = [Share() for _ in range(DEEPEST + 1)]
        self.added = [Share() for _ in range(OVERLAPS + 1)]
        self._likely = [LEVEL_PRIOR] * (DEEPEST + 1)
        self._credit = math.inf
        self._sizes: dict[int, float] = {}
        self._largest = float(POOL)
        self._rounds = 0
        self._rest: TreePlan | None = None
        self._accompanied = False
        self._round = _Round(1, costs.prices(1, self.pool))

    def plan(self, contexts: Sequence[int]) -> TreePlan:
        batch, further = len(contexts), (sum(contexts) - CONTEXT * len(contexts)) // ALIKE * ALIKE
        self._rounds += 1
        alike = batch == self._round.batch and abs(further - self._round.further) < CONTEXT
        if self._rest and alike and self._credit < self._round.stake:
            self._round.rows = None
            return self._rest  # for where nothing is drafted nothing is learnt
        known = alike and not self._rest and self._rounds % REPRICED and not self.costs.astray
        prices = self._round.prices if known else self.costs.prices(batch, self.pool, further)
        self._round = _Round(batch, prices, further)
        if self._accompanied:  # it is decided when the other drafter has found what it finds
            return self._planned(1, 0.0)
        plan = self._decide([])
        self._rest = None if self._round.levels else plan
        return plan

    def beside(self, other: DraftTree) -> TreePlan:
        """The plan for a drafter whose tree that one is to be merged into."""
        self._rest, self._accompanied = None, True
        return self._decide(self.acceptance.read(other))

    def prune(self, tree: DraftTree) -> DraftTree:
        now = self._round
        if now.rows is not None:  # its candidates have been chosen, and probes hang below them
            return tree
        if tree.size == 1 and not now.levels:
            now.size, now.told = 1, 0
            return tree
        now.size, now.told = tree.size, now.levels
        believing = len(lines(tree)[0][3])
        if not believing:
            return tree
        now.rows = self.acceptance.read(tree)
        if self.probes:  # it was drafted by the probes of the round before, whether or not there are any now
            deepest = max(now.levels, *(max(row.depths) for row in now.rows))
            now.told = min(deepest, DEEPEST) if tree.size > 1 else 0
        now.first = 1 << (believing - 1)
        now.size = self._size(now.rows)
        self._largest = max(now.size, self._largest - RECEDING)
        columns = range(1, tree.size)
        orders = [sorted(columns, key=row.chances.__getitem__, reverse=True) for row in now.rows]
        now.kept = [[0, *sorted(order[: now.size - 1])] for order in orders]  # of equals the first: parents stay
        return tree if now.size == tree.size else pruned(tree, now.kept)

    def record(self, verdict: Verdict, seconds: Mapping[str, float]) -> None:
        now = self._round
        if self._rest and now.size == 1 and self._rounds % REPRICED:
            self._credit += TRYING * self._seconds(1, 0, 0)
            return  # nothing was drafted, and little is to be learnt
        probes = self._beside(now.levels)
        self.costs.observe(now.batch, now.size + probes, now.told, seconds, now.further, probes > 0)
        for b, (_, tokens) in enumerate(verdict.lines):
            self._learn(b, tokens)
        size = self._sizes.get(now.told, now.size)
        self._sizes[now.told] = size + (1 - SIZE_MEMORY) * (now.size - size)
        self._settle(sum(len(tokens) for _, tokens in verdict.lines), sum(seconds.values()))

    def _seconds(self, size: int, levels: int, told: int) -> float:
        """What this round costs with trees of that size, or of the largest that are planned.

        Args:
            levels: that are drafted; probes draft them for the next round.
            told: that were drafted for the tree of this one.
        """
        probes = self._beside(levels)
        return self._round.prices.round(min(size + probes, self.pool), told, probes > 0)

    def _beside(self, levels: int) -> int:
        """Rows of probes in the pass of a round that drafts that many levels."""
        return self.probes if levels else 0

    def _size(self, rows: Sequence[Row]) -> int:
        """The size of the trees of this round: that of the best ones, or one that tells more."""
        size, _, _ = self._best(rows, self._round.levels, self._round.told)
        if self._rounds % LOOK == 0 and size - LESS > 1:
            size -= LESS
        return min(size, max(2, FEW // self._round.batch)) if self.costs.astray else size

    def _best(self, rows: Sequence[Row], levels: int, told: int) -> tuple[int, float, float]:
        """The size of the trees that makes the formula highest, the tokens expected of it and its seconds."""
        ordered = [sorted(row.chances[1:], reverse=True) for row in rows]
        probes = self._beside(levels)
        passes, rest = self._round.prices.passes[probes:], self._round.prices.beside(told, probes > 0)
        tokens = float(self._round.batch)
        best = highest = (1, tokens, passes[1] + rest)
        for size, column in enumerate(islice(zip(*ordered, strict=True), POOL - 1), start=2):
            tokens += sum(column)
            seconds = passes[size] + rest
            if tokens * highest[2] > highest[1] * seconds:
                highest = (size, tokens, seconds)
                if tokens * best[2] > best[1] * seconds * (1 + MARGIN):
                    best = highest
        return best

    def _decide(self, beside: list[Row]) -> TreePlan:
        """How many levels to draft, where another drafter has found what it has."""
        now = self._round
        now.certainties = [row.certainty() for row in beside] or [[0.0] * (DEEPEST + 1)] * now.batch
        found, tokens, seconds = self._best(beside, 0, 0)
        now.undrafted_rate = best_rate = tokens / seconds
        best, tried, tried_rate = 0, 1, 0.0
        self._likely = self._chances_of_levels()
        reach, size = 1.0, 1.0
        for level in range(1, DEEPEST + 1):
            reach *= self._likely[level]
            tokens += reach * sum(self._added(certainty[level]) for certainty in now.certainties)
            size = self._sizes.get(level, size + 1)
            cost = self._seconds(max(found, min(math.ceil(size), POOL)), level, level)
            if tokens / cost > best_rate:
                best, best_rate = level, tokens / cost
            if tokens / cost > tried_rate:
                tried, tried_rate, now.stake = level, tokens / cost, cost - seconds
        if best_rate < (1 + CLEARLY) * now.undrafted_rate:
            best = 0
        now.levels = best or (tried if self._credit >= now.stake else 0)
        nodes = max(2, min(POOL - found + 1, int(self._largest) + SPARE))
        return self._planned(nodes if now.levels else 1, best_rate if best else 0.0)

    def _planned(self, nodes: int, rate: float) -> TreePlan:
        """The plan of a decision; its floor is where one more level costs more than it can bring."""
        levels = self._round.levels
        floor = -math.inf
        if rate and levels > 1:
            cost = self._seconds(1, levels, levels) - self._seconds(1, 1, 1)
            worth = rate * max(cost, 0.0) / (levels - 1) / self._likely[levels]
            floor = math.log(worth) if worth > 0 else -math.inf
        return Planned("best", WIDTH, max(levels, 1), nodes, min(floor, -0.1), self)

    def _chances_of_levels(self) -> list[float]:
        """By level the chance that it is right where the one before is; if little is known, what that one has."""
        likely = [LEVEL_PRIOR]
        for known in self.levels[1:]:
            likely.append(known.value(likely[-1]))
        return likely

    def _added(self, certainty: float) -> float:
        """Of what a level gets right, the part that the other drafter has not got, given how sure that one is."""
        if certainty == 0:
            return 1.0
        return self.added[_degree(certainty)].value(max(0.0, 1 - certainty))

    def _learn(self, b: int, tokens: list[int]) -> None:
        """Follow what a round committed down the tree of a sequence, and count who guessed it."""
        now = self._round
        if now.rows is None:
            self._learn_levels(len(tokens) - 1)
            return
        row, kept = now.rows[b], now.kept[b]
        right = 0
        for depth, v in enumerate(self.acceptance.follow(row, tokens)[:DEEPEST], start=1):
            if v not in kept or not row.cells[v][0] & now.first:
                break
            right = depth
            certainty = now.certainties[b][depth]
            if certainty:
                self.added[_degree(certainty)].observe(row.cells[v][0] == now.first, self._added(certainty))
        self._learn_levels(right)

    def _learn_levels(self, right: int) -> None:
        """Count which levels of the first drafter were right, down to the first that was not or was not drafted."""
        levels = self._round.told
        for level in range(1, levels + 1):
            if right >= level - 1 and self.levels[level].observe(right >= level, self._likely[level]):
                for deeper in self.levels[level + 1 :]:
                    deeper.fade(FADING)
        if 0 < levels < DEEPEST and right >= levels:
            self.levels[levels + 1].fade(FADING)

    def _settle(self, tokens: int, taken: float) -> None:
        """Keep account of what drafting wins and loses against not drafting, and of the time that tries may cost."""
        now = self._round
        most = max(now.stake, self._seconds(1, 0, 0))
        seconds = min(taken, STALLED * self._seconds(now.size, now.levels, now.told))
        self._credit = min(self._credit, most) + TRYING * seconds
        if now.levels or now.told:
            self._credit -= seconds - tokens / now.undrafted_rate
        self._credit = min(max(self._credit, -OWED * most), most)


def _degree(certainty: float) -> int:
    return min(1 + int(OVERLAPS * certainty), OVERLAPS)


@dataclass(frozen=True)
class Planned(TreePlan):
    """A plan of this round alone, made by a planner."""

    planner: CostPlanner | None = field(default=None, compare=False, repr=False)

    def beside(self, other: DraftTree) -> TreePlan:
        assert self.planner is not None
        return self.planner.beside(other)

    def cut(self, tree: DraftTree) -> DraftTree:
        return most_believed(tree, POOL)

    def with_probes(self, depth: int) -> TreePlan:
        return replace(self, depth=depth, nodes=POOL, floor=-math.inf)

    def worth_checking(self, tree: DraftTree) -> DraftTree:
        assert self.planner is not None
        return self.planner.prune(tree)

    def __str__(self) -> str:
        return NAME


def plans_by_levels() -> dict[int, TreePlan]:
    """What is drafted when the costs of drafts are measured: as deep as is said, as wide as the planner asks for."""
    return {n: TreePlan("best", WIDTH, max(n, 1), POOL if n else 1) for n in range(DEEPEST + 1)}
