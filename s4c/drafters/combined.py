"""Two drafters, one tree: what the second guesses is grafted onto the tree of the first.

A model guesses new text, lookup finds repeated text (summaries, retrieval, code edits), and neither knows in
advance which comes. Both are asked, and the pass that checks one checks the other; nodes that both have are shared.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from s4c.drafters.base import Drafter, Sequences
from s4c.types import DraftTree, TargetOutput, Verdict
from s4c.verify.tree import TreePlan, merge


class CombinedDrafter(Drafter):
    """A drafter with another one beside it.

    Args:
        first: the one whose tree it is.
        second: the one whose guesses are added. Of both a `best` tree takes the nodes that either believes most; other
            trees, and those with probes, keep their shape, and it adds to them.

    Raises:
        ValueError: the second one hangs probes into its trees, which only the first can.
    """

    def __init__(self, first: Drafter, second: Drafter) -> None:
        if second.probes:
            raise ValueError(
                f"{second.name} drafts by probes in its own tree, so it must be the first of two, before the +"
            )
        self.first, self.second = first, second
        self.name = f"{first.name}+{second.name}"
        self.default_tree = first.default_tree
        self.settings = f"{first.settings}+{second.settings}"
        self.probes = first.probes
        self.planned = first.planned and not self.probes
        self.taps = tuple(sorted({*first.taps, *second.taps}))
        self._second_plan = TreePlan.parse(second.default_tree)

    def reserve(self, slots: int, length: int) -> None:
        self.first.reserve(slots, length)
        self.second.reserve(slots, length)

    def prefill(self, slot: int, tokens: Tensor, features: Tensor) -> None:
        for drafter in (self.first, self.second):
            drafter.prefill(slot, tokens, self._part(drafter, features))

    def propose(self, sequences: Sequences) -> DraftTree:
        beside = self.second.propose(replace(sequences, plan=self._second_plan))
        tree = self.first.propose(replace(sequences, plan=sequences.plan.beside(beside)))
        if sequences.sampled and bool(tree.sampled.any()):  # its law is that of its draws: nothing may be added
            return tree
        both = merge(tree, beside)
        return both if self.probes else sequences.plan.cut(both)

    def commit(self, tree: DraftTree, verdict: Verdict, output: TargetOutput) -> None:
        for drafter in (self.first, self.second):
            part = self._part(drafter, output.features)
            drafter.commit(tree, verdict, output if part is output.features else replace(output, features=part))

    def _part(self, drafter: Drafter, features: Tensor) -> Tensor:
        """Of features [..., d (1 + taps)] those that a drafter wants."""
        if drafter.taps == self.taps:
            return features
        feature, *tapped = features.chunk(1 + len(self.taps), -1)
        return torch.cat([feature, *(tapped[self.taps.index(tap)] for tap in drafter.taps)], -1)

    def move(self, source: int, destination: int) -> None:
        self.first.move(source, destination)
        self.second.move(source, destination)
