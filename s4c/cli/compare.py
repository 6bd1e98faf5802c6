"""Plain decoding against drafting: the same tokens, and how much faster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from s4c.cli import options
from s4c.drafters.base import Drafter
from s4c.engine.llm import LLM
from s4c.engine.sequence import Generation
from s4c.types import SamplingParams

WARM_UP_TOKENS = 8


def warm_up(llm: LLM, drafter: Drafter, tree: str, request: Any, params: SamplingParams) -> None:
    """Decode a few tokens both ways, so that neither pays for what is done once."""
    few = replace(params, max_new_tokens=min(WARM_UP_TOKENS, params.max_new_tokens))
    for name, shape in (("none", "auto"), (drafter, tree)):
        llm.use(name, shape)
        llm.generate(request, few)


@dataclass(frozen=True)
class Comparison:
    """Two outcomes of one request.

    Attributes:
        plain: of plain decoding.
        drafted: with the drafter.
        drafter: its name.
        half: whether the target runs in half precision, where sums in another order may turn a near-tie.
        same_law_only: whether the rule promises at most the law of the tokens and not the tokens themselves.
    """

    plain: Generation
    drafted: Generation
    drafter: str
    half: bool
    same_law_only: bool

    @classmethod
    def of(cls, llm: LLM, plain: Generation, drafted: Generation, params: SamplingParams) -> Comparison:
        """Compare two outcomes of an LLM."""
        half = llm.target.dtype != torch.float32
        return cls(plain, drafted, llm.drafter.name, half, llm.rule != "coupled" and params.temperature > 0)

    @property
    def equal(self) -> bool:
        return self.plain.token_ids == self.drafted.token_ids

    @property
    def failed(self) -> bool:
        """Whether the tokens differ where they must not."""
        return not self.equal and not self.same_law_only

    @property
    def speedup(self) -> float:
        """Decode tokens per second over those of plain decoding; for equal tokens the ratio of decode times."""
        plain = self.plain.stats.tokens_per_second
        return self.drafted.stats.tokens_per_second / plain if plain else 0.0

    @property
    def first_difference(self) -> dict[str, Any] | None:
        """Where the outcomes part: place and both tokens, None for a token past the end."""
        if self.equal:
            return None
        ids = (self.plain.token_ids, self.drafted.token_ids)
        longest = max(map(len, ids))
        first, second = ([*tokens, *[None] * (longest - len(tokens))] for tokens in ids)
        index = next(i for i in range(longest) if first[i] != second[i])
        return {
            "index": index,
            "plain": first[index],
            "drafted": second[index],
            "possible_tie": self.half and not self.same_law_only,
        }

    @property
    def verdict(self) -> str:
        """One sentence: whether the tokens are equal, or what differs."""
        difference = self.first_difference
        if difference is None:
            return f"all {len(self.plain.token_ids)} tokens are equal"
        place = f"token {difference['index']} is {difference['plain']} plain and {difference['drafted']} drafted"
        if self.same_law_only:
            lossy = "(lossy)" in self.drafted.stats.rule
            promise = "is lossy and promises nothing" if lossy else "promises the same law, not the same tokens"
            return f"{place}: the rule {self.drafted.stats.rule} {promise}"
        if self.half:
            return f"the tokens DIFFER: {place}; possibly a tie in half precision, --dtype float32 is exact"
        return f"the tokens DIFFER: {place}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "drafter": self.drafter,
            "plain": self.plain.stats.as_dict(),
            "speedup": self.speedup,
            "equal": self.equal,
            "first_difference": self.first_difference,
        }

    def report(self) -> None:
        """Print both speeds and the verdict to stdout."""
        table = Table("decoding", *("tokens/s", "tokens a pass", "prefill s", "decode s", "passes"))
        for column in table.columns[1:]:
            column.justify = "right"
        for name, stats in (("plain", self.plain.stats), (self.drafter, self.drafted.stats)):
            table.add_row(
                name,
                f"{stats.tokens_per_second:.1f}",
                f"{stats.mean_acceptance_length:.2f}",
                f"{stats.prefill_seconds:.2f}",
                f"{stats.decode_seconds:.2f}",
                str(stats.rounds),
            )
        console = options.console()
        console.print(table)
        colour = "red" if self.failed else "green"
        console.print(f"speedup [bold]{self.speedup:.2f}x[/]; [{colour}]{self.verdict}[/]", soft_wrap=True)
