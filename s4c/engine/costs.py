"""What rounds cost: as it was measured (engine/measure.py), corrected while generating.

    T(n)     seconds of a pass over n tokens behind CONTEXT others, its judgement included
    a + b n  seconds that each further token of the context adds to it, for attention
    D(l)     seconds of a draft of l levels; D(0) where the drafter is asked for none; where probes draft, of making a
             tree of the l levels that they drafted in the round before
    P        seconds that probes add to a pass over as many other rows

What the rounds take corrects them: the paces of memory and cores, by which passes take longer now than when they were
measured (engine/pace.py), and that of the drafts of each batch size. So what was measured stays good on a machine that
has become slower or faster since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from s4c.engine.pace import Pace, Recent

CONTEXT = 200
"""Tokens that stand before those of a pass whose time is T(n)."""

NOW = 7
"""Drafts whose median tells how fast they are just now."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds of rounds of one batch behind contexts of one length, as the machine is now.

    Attributes:
        passes: by nodes of each tree.
        drafts: by levels.
        rest: of a round.
        probing: P.
    """

    passes: list[float]
    drafts: list[float]
    rest: float
    probing: float

    def round(self, nodes: int, levels: int, probing: bool = False) -> float:
        """Of a round with trees of that many nodes, probes among them or not, after a draft of that many levels."""
        return self.passes[nodes] + self.beside(levels, probing)

    def beside(self, levels: int, probing: bool = False) -> float:
        """The same without the pass."""
        draft = self.drafts[levels] if levels < len(self.drafts) else 0.0
        return probing * self.probing + draft + self.rest


class Costs:
    """Seconds of rounds.

    Args:
        passes: T(n) by number of tokens.
        drafts: D(l) for one sequence, by levels from 0 on.
        attention: a and b, of one sequence; not negative.
        probing: P.
    """

    def __init__(
        self,
        passes: Mapping[int, float],
        drafts: Mapping[int, float],
        attention: tuple[float, float] = (0.0, 0.0),
        probing: float = 0.0,
    ) -> None:
        self.passes, self.drafts = dict(sorted(passes.items())), dict(sorted(drafts.items()))
        self.attention = attention
        self.probing = probing
        self._table = interpolated(self.passes)
        last = len(self._table) - 1
        self._slope = (self._table[last] - self._table[max(1, last // 2)]) / max(1, last - last // 2)
        self._pace = Pace(last * self._table[1] / self._table[last])
        self._rest, self._probing = Recent(0.0), Recent(probing, NOW)
        self._drafting: dict[int, Recent] = {}
        self._drafts: dict[tuple[int, int], Recent] = {}
        self._passes = lru_cache(maxsize=8)(self._measured)

    def round(self, batch: int, nodes: int, levels: int, further: int = 0) -> float:
        """Seconds of a round with trees of that many nodes after a draft of that many levels.

        Args:
            batch: sequences.
            nodes: of each tree.
            levels: of the draft.
            further: tokens of their contexts, all together, beyond `CONTEXT` for each; below 0 where they are shorter.
        """
        return self.prices(batch, nodes, further).round(nodes, levels)

    def prices(self, batch: int, most: int, further: int = 0) -> Prices:
        """The same for all trees of up to `most` nodes and drafts of any depth."""
        drafting = self._drafting[batch].middle if batch in self._drafting else 1.0
        shares = {level: share.middle for (size, level), share in self._drafts.items() if size == batch}
        paces = [self._pace.of(batch, True)] * 2
        paces += [self._pace.of(batch * nodes, False) for nodes in range(2, most + 1)]
        passes = [pace * seconds for pace, seconds in zip(paces, self._passes(batch, most, further), strict=True)]
        passes[2:] = accumulate(passes[2:], max)  # more tokens never take less
        return Prices(
            passes,
            [
                drafting * shares.get(level, 1.0) * self.drafts.get(level, 0.0)
                for level in range(1 + max(self.drafts, default=0))
            ],
            self._rest.middle,
            self._pace.now * self._probing.middle,
        )

    @property
    def astray(self) -> bool:
        """Whether the last pass was far from its price: one over few tokens would tell why (engine/pace.py)."""
        return self._pace.astray

    def look(self, tokens: int, seconds: float, times: int) -> None:
        """Take in the median of so many passes like those that were measured, apart from any round."""
        for _ in range(times):
            self._pace.add(tokens, False, seconds / self._pass(1, tokens, 0))

    def observe(
        self,
        batch: int,
        nodes: int,
        levels: int,
        seconds: Mapping[str, float],
        further: int = 0,
        probing: bool = False,
    ) -> None:
        """Take in a round: seconds by step, as `StepTimer` names them; the rest as `Prices.round` has it."""
        passed, measured = seconds["verify"] + seconds["judge"], self._pass(batch, nodes, further)
        self._pace.add(batch * nodes, nodes < 2, passed / (measured + probing * self._probing.middle))
        self._rest.add(sum(seconds.values()) - passed - seconds["draft"])
        if probing:
            without = measured * self._pace.of(batch * nodes, nodes < 2)
            hanging = 0.0 if levels else seconds["draft"]  # where no tree was made of what others had said
            self._probing.add(max(0.0, passed + hanging - without) / self._pace.now)
        if levels or not probing:
            self._observe_draft(batch, levels, seconds["draft"])

    def _observe_draft(self, batch: int, levels: int, seconds: float) -> None:
        """A draft goes by the pace of all drafts, and one of so many levels has a share of its own: many end before."""
        pace = self._drafting.setdefault(batch, Recent(1.0, most=NOW))
        share = self._drafts.setdefault((batch, levels), Recent(1.0, 2 * NOW))
        measured = self.drafts.setdefault(levels, seconds / pace.middle)
        if measured:
            quotient = seconds / measured
            share.add(quotient / pace.middle)
            if levels:
                pace.add(quotient / share.middle)

    def _measured(self, batch: int, most: int, further: int) -> list[float]:
        """Seconds of passes over 0 to `most` nodes of each sequence, as they were measured."""
        return [self._pass(batch, nodes, further) for nodes in range(most + 1)]

    def _pass(self, batch: int, nodes: int, further: int) -> float:
        """The same of a pass over so many."""
        beyond = batch * nodes - len(self._table) + 1
        near = self._table[-1] + beyond * self._slope if beyond > 0 else self._table[batch * nodes]
        each, by_node = self.attention
        most = near / (2 * CONTEXT * batch)  # no more than half of a pass was attention
        return near + max(further, -CONTEXT * batch) * min(each + by_node * nodes, most)


def interpolated(passes: Mapping[int, float]) -> list[float]:
    """T(n) for n = 0 .. the largest measured: straight lines between what was measured, never falling.

    More tokens never take less: a pass that took longer than a wider one was measured in a bad moment, and takes no
    longer than that one.
    """
    least = list(accumulate([*passes.values()][::-1], min))[::-1]
    sizes = list(passes)
    table = [least[0]] * (sizes[0] + 1)
    for (low, start), (high, end) in pairwise(zip(sizes, least, strict=True)):
        table += [start + (end - start) * step / (high - low) for step in range(1, high - low + 1)]
    return table
