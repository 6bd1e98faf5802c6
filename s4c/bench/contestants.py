"""Who answers: the contract that the methods of this engine and its peers fulfil alike.

A method is written as `NAME[@OPTION...]`: a drafter as `s4c.LLM` takes it (`plain` is another name for `none`), then a
tree, a rule or a temperature of its own, in any order; several stand with commas between:

    ngram    auto@best:24    shipped@comb:4@rule=rejection@temperature=0.8    auto,draft-model=DIRECTORY,stop=0.2,ngram
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from s4c.bench.machine import Footprint
from s4c.drafters import METHODS
from s4c.engine.llm import LLM
from s4c.engine.sequence import Generation
from s4c.types import SamplingParams
from s4c.verify.tree import TreePlan
from s4c.verify.typical import title

PLAIN = "plain"
"""Decoding without a drafter, which drafters' own names call `none`."""

OPTIONS = "a tree (such as best:16), rule=R, temperature=T"


@dataclass(frozen=True)
class Reply:
    """One answer and what it cost.

    Attributes:
        token_ids: the output.
        prefill_seconds: up to the first round, or up to the first token where a peer tells no more.
        decode_seconds: the rest of the wall time.
        decode_tokens: tokens that came within `decode_seconds`.
        histogram: entry a is the number of rounds that committed a + 1 tokens; None where rounds are not told.
        steps: seconds by step of the round, likewise.
        memory: bytes of resident memory that the contestant took at most, its model included; None where not told.
    """

    token_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    histogram: list[int] | None = None
    steps: dict[str, float] | None = None
    memory: int | None = None


class Unavailable(Exception):
    """A peer cannot run here; the message says why, and what to install or give."""


class Contestant(ABC):
    """Something that answers prompts.

    Attributes:
        name: of its rows.
        own: whether it decodes with this engine, so that an answer unlike plain decoding's fails the run.
        nodes: most nodes of its draft trees, the root included; None where there are none or it is open.
        here: whether what it takes, memory and processors, is taken by this process or by `pid`.
        pid: the process that works for it, where that is not this one.
        temperature: the only one at which it takes part; None for those of the run.
    """

    name: str
    own: bool = False
    nodes: int | None = None
    here: bool = True
    pid: int | None = None
    temperature: float | None = None

    @abstractmethod
    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        """Decode one prompt, timed."""

    def rounds(self, prompt: list[int], params: SamplingParams) -> Iterator[Reply | None]:
        """The same piece by piece: None after each piece but the last, which brings the reply."""
        yield self.answer(prompt, params)

    def comparable(self, temperature: float) -> bool:
        """Whether its tokens should be those of plain decoding; a peer has no part in our noise."""
        return temperature == 0

    def close(self) -> None:
        """Let go of what it holds outside this process."""


class Method(Contestant):
    """A drafter, a tree and a rule on the weights that all of them share.

    Args:
        llm: what has the weights; the method decodes on a twin of it.
        spec: as users write it; see the head of this file.
        rule: where the spec names none.
        target_bytes: memory that the target takes, which counts for each of its methods.

    Raises:
        ValueError: there is no such drafter, tree, rule or temperature.
    """

    own = True

    def __init__(self, llm: LLM, spec: str, rule: str = "coupled", target_bytes: int = 0) -> None:
        self.name = canonical(spec, rule)
        drafter, *options = self.name.split("@")
        self.tree, self.rule = "auto", "coupled"
        for option in options:
            self._set(option)
        self.name += title(self.rule).removeprefix(self.rule)  # a lossy one is marked
        self.footprint = Footprint(target_bytes)
        with self.footprint.watch():
            self.llm = llm.twin()
            self.llm.rule = self.rule
            self.llm.use("none" if drafter == PLAIN else drafter, self.tree)
        shape = self.llm.tree
        if drafter != PLAIN and ":" in shape:
            self.nodes = TreePlan.parse(shape).nodes or None

    def _set(self, option: str) -> None:
        key, equals, value = option.partition("=")
        if not equals:
            self.tree = option
        elif key == "rule":
            self.rule = value
        elif key == "temperature":
            try:
                self.temperature = SamplingParams(temperature=float(value)).temperature
            except ValueError as error:
                raise ValueError(f"method {self.name!r}: {error}") from error
        else:
            raise ValueError(f"method {self.name!r}: {option!r} is not known; after an @ may stand {OPTIONS}")

    def answer(self, prompt: list[int], params: SamplingParams) -> Reply:
        with self.footprint.watch():
            started = time.perf_counter()
            generation = self.llm.generate(prompt, params)
            seconds = time.perf_counter() - started
        prefill = seconds - generation.stats.decode_seconds
        return self._reply(generation, prefill, self.footprint.peak)

    def rounds(self, prompt: list[int], params: SamplingParams) -> Iterator[Reply | None]:
        for chunk in self.llm.stream(prompt, params):
            ended = chunk.generation
            yield None if ended is None else self._reply(ended, ended.stats.prefill_seconds)

    def _reply(self, generation: Generation, prefill_seconds: float, memory: int | None = None) -> Reply:
        stats = generation.stats
        return Reply(
            token_ids=generation.token_ids,
            prefill_seconds=prefill_seconds,
            decode_seconds=stats.decode_seconds,
            decode_tokens=len(generation.token_ids),
            histogram=stats.acceptance_histogram,
            steps=stats.steps,
            memory=memory,
        )

    def comparable(self, temperature: float) -> bool:
        return self.rule == "coupled" or temperature == 0


def canonical(spec: str, rule: str = "coupled") -> str:
    """The name under which a method's rows stand: as it is written, with the rule of the run where it names none."""
    name, at, options = spec.strip().partition("@")
    name = (PLAIN if name == "none" else name) + at + options
    return name if rule == "coupled" or name == PLAIN or "@rule=" in name else f"{name}@rule={rule}"


def split_methods(text: str) -> list[str]:
    """Methods with commas between; what a drafter's own form has behind a comma, as `stop=0.2`, stays with it."""
    specs: list[str] = []
    for part in filter(None, map(str.strip, text.split(","))):
        key, equals, _ = part.partition("=")
        if specs and equals and any(f",{key}=" in method.form for method in METHODS.values()):
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    return specs


def counted(reply: Reply, eos_token_ids: Sequence[int], most: int) -> Reply:
    """A reply cut to what counts: up to and including the first end-of-sequence token, at most `most` tokens."""
    tokens = reply.token_ids
    ends = [index for index, token in enumerate(tokens) if token in eos_token_ids]
    kept = tokens[: min([most, *(end + 1 for end in ends[:1])])]
    return replace(reply, token_ids=kept, decode_tokens=reply.decode_tokens - (len(tokens) - len(kept)))
