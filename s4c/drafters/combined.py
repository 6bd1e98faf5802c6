"""Two drafters, one tree: what the second guesses is grafted onto the tree of the first.

A model guesses new text, lookup finds repeated text (summaries, retrieval, code edits), and neither knows in
advance which comes. Both are asked, and the pass that checks one checks the other; nodes that both have are shared.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from s4c.drafters.base import Drafter, Sequences
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import TreePlan, merge


class CombinedDrafter(Drafter):
    """A drafter with another one beside it.

    Args:
        first: the one whose tree it is.
        second: the one whose guesses are added. Of a `best` tree it gets up to half of the nodes, and those that
            it leaves go to the first; other trees keep their shape, and it adds to them.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.default_tree = first.default_tree
        self.probes = first.probes or second.probes
        self.planned = first.planned and not self.probes
        self._second_plan = TreePlan.parse(second.default_tree)

    def reserve(self, slots: int, length: int) -> None:
        self.first.reserve(slots, length)
        self.second.reserve(slots, length)

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        self.first.prefill(slot, tokens, features)
        self.second.prefill(slot, tokens, features)

    def propose(self, sequences: Sequences) -> DraftTree:
        beside = self.second.propose(replace(sequences, plan=self._second_plan))
        plan = sequences.plan.beside(beside)
        tree = self.first.propose(replace(sequences, plan=plan))
        if bool(tree.sampled.any()):  # its law is that of its draws: nothing may be added
            return tree
        return merge(tree, beside, sequences.plan.limit + max(0, tree.size - plan.nodes))

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        self.first.commit(tree, verdict, output)
        self.second.commit(tree, verdict, output)

    def move(self, source: int, destination: int) -> None:
        self.first.move(source, destination)
        self.second.move(source, destination)
