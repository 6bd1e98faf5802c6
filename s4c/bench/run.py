"""Methods side by side: the same questions, one after the other, in one run.

Every turn of a question is answered by every contestant before the next one is asked, in a seeded order that changes
from turn to turn, so that what else the machine does falls on all of them; or round by round, each method a round of
its answer in turn, so that it falls on all of them within milliseconds. The conversation goes on with plain decoding's
answer, so all read the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from s4c.bench.contestants import PLAIN, Contestant, Method, Reply, counted
from s4c.bench.equality import Judge
from s4c.bench.machine import OtherWork
from s4c.bench.questions import Question
from s4c.engine.llm import LLM
from s4c.errors import BadLogits
from s4c.types import SamplingParams

WARM_UP_TOKENS = 16
NOT_ASKED = "not asked"
SINGLY = f"{PLAIN}, one by one"


class Key(NamedTuple):
    """Which answer it is: unique in a run."""

    question: str
    turn: int
    temperature: float
    repeat: int
    method: str


@dataclass(frozen=True)
class Row:
    """One contestant's answer to one turn of a question.

    Attributes:
        turn, repeat: counted from 0.
        prefill_seconds, decode_seconds, decode_tokens, histogram, steps, memory: as in `Reply`; in batches no seconds.
        others: mean number of cores that other processes kept busy meanwhile.
        equal: against plain decoding: `identical`, `tie: ...`, `different: ...`, or `not asked`; empty for plain
            decoding itself.
        error: why there is no answer.
    """

    question: str
    category: str
    turn: int
    temperature: float
    repeat: int
    method: str
    prompt_tokens: int = 0
    token_ids: Sequence[int] = ()
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    histogram: Sequence[int] | None = None
    steps: Mapping[str, float] | None = None
    memory: int | None = None
    others: float = 0.0
    equal: str = ""
    error: str | None = None

    @property
    def key(self) -> Key:
        return Key(self.question, self.turn, self.temperature, self.repeat, self.method)


@dataclass(frozen=True)
class Turn:
    """A prompt that all contestants answer."""

    question: Question
    number: int
    temperature: float
    repeat: int
    prompt: list[int]

    def row(self, method: str) -> Row:
        return Row(
            self.question.name,
            self.question.category,
            self.number,
            self.temperature,
            self.repeat,
            method,
            prompt_tokens=len(self.prompt),
        )

    def key(self, method: str) -> Key:
        return self.row(method).key


class Bench:
    """Contestants that answer the same questions.

    Args:
        llm: the target, whose chat template asks and whose plain decoding is the measure of equality.
        contestants: the one named `plain` among them.
        params: how all of them decode, but for the temperature.
        temperatures: of the run; a contestant with one of its own adds it, for plain decoding too.
        turns: most turns of a question.
        repeats: how often everything is asked.
        seed: of the order of the contestants.
        by_round: whether they take turns round by round, not answer by answer; peers still answer at once.
        done: rows of an earlier part of this run, which are not asked again.
    """

    def __init__(
        self,
        llm: LLM,
        contestants: Sequence[Contestant],
        params: SamplingParams,
        temperatures: Sequence[float] = (0.0,),
        turns: int = 1,
        repeats: int = 1,
        seed: int = 0,
        done: Sequence[Row] = (),
        by_round: bool = False,
    ) -> None:
        assert PLAIN in [c.name for c in contestants]
        own = [c.temperature for c in contestants if c.temperature is not None]
        self.llm, self.contestants, self.params = llm, list(contestants), params
        self._common = list(temperatures)
        self.temperatures = list(dict.fromkeys([*temperatures, *own]))
        self.turns, self.repeats, self.seed, self.by_round = turns, repeats, seed, by_round
        self.done = {row.key: row for row in done if row.error is None}
        self.judge = Judge(llm.target)
        self.dead: set[str] = set()

    def answers(self, questions: Sequence[Question], singly: bool = False) -> int:
        """The number of answers that the questions will get, unless a contestant dies or the context ends."""
        turns = sum(min(self.turns, len(question.turns)) for question in questions)
        return turns * self.repeats * sum(len(self._taking_part(t)) + singly for t in self.temperatures)

    def check(self, questions: Sequence[Question]) -> None:
        """See that every first turn fits.

        Raises:
            ValueError: there are no questions, or one has no room in the context.
        """
        if not questions:
            raise ValueError("no questions are left to ask; see --categories, --sample and --limit")
        most = self.llm.target.spec.context_length
        for question in questions:
            length = len(self.prompt([*question.before, _said("user", question.turns[0])]))
            if length >= most:
                raise ValueError(
                    f"question {question.name} has {length} tokens; the context of {self.llm.target.spec.name} holds "
                    f"{most}; leave it out"
                )

    def run(self, questions: Sequence[Question]) -> Iterator[Row]:
        """Ask every question of every contestant, timed; rows of the same turn come together."""
        warm = False
        for repeat in range(self.repeats):
            for question in questions:
                for temperature in self.temperatures:
                    for turn in self._turns(question, temperature, repeat):
                        if not warm and not self._finished(turn):
                            yield from self._warm_up(turn)
                            warm = True
                        yield from self._ask_all(turn)

    def run_batched(self, questions: Sequence[Question], singly: bool = False) -> Iterator[Row]:
        """Answers of this engine's methods decoded in batches: for equality alone, without times.

        Args:
            singly: also decode each prompt by itself, plainly.
        """
        for temperature in self.temperatures:
            methods = [c for c in self._taking_part(temperature) if isinstance(c, Method)]
            methods.sort(key=lambda method: method.name != PLAIN)
            talks = [self._turns(question, temperature, 0) for question in questions]
            while turns := [turn for talk in talks if (turn := next(talk, None)) is not None]:
                for method in methods:
                    yield from self._batch(method, method.name, turns)
                for turn in turns if singly else ():
                    yield from self._batch(methods[0], SINGLY, [turn])

    def prompt(self, chat: Sequence[Mapping[str, str]]) -> list[int]:
        """A chat as the target reads it: through its chat template where it has one, else as texts in a row."""
        if self.llm.tokenizer is not None and self.llm.tokenizer.chat_template:
            return self.llm.token_ids(list(chat))
        return self.llm.token_ids("\n\n".join(message["content"] for message in chat))

    def _taking_part(self, temperature: float) -> list[Contestant]:
        def wanted(contestant: Contestant) -> bool:
            own = contestant.temperature
            return contestant.name == PLAIN or temperature in (self._common if own is None else [own])

        return [contestant for contestant in self.contestants if wanted(contestant)]

    def _finished(self, turn: Turn) -> bool:
        return all(turn.key(c.name) in self.done for c in self._taking_part(turn.temperature))

    def _turns(self, question: Question, temperature: float, repeat: int) -> Iterator[Turn]:
        """The turns of a question while the context has room; each goes on from plain decoding's answer to the last."""
        chat = list(question.before)
        for number, text in enumerate(question.turns[: self.turns]):
            chat.append(_said("user", text))
            turn = Turn(question, number, temperature, repeat, self.prompt(chat))
            if len(turn.prompt) >= self.llm.target.spec.context_length:
                return
            yield turn
            chat.append(_said("assistant", self.llm.decode(list(self.done[turn.key(PLAIN)].token_ids))))

    def _params(self, temperature: float) -> SamplingParams:
        return replace(self.params, temperature=temperature)

    def _warm_up(self, turn: Turn) -> Iterator[Row]:
        """Let everyone answer once in short, for what is done once does not count; rows come of failures alone."""
        few = replace(self.params, max_new_tokens=min(WARM_UP_TOKENS, self.params.max_new_tokens))
        for contestant in self.contestants:
            row = self._ask(contestant, turn, few)
            if row.error is not None:
                yield row

    def _ask_all(self, turn: Turn) -> Iterator[Row]:
        params = self._params(turn.temperature)
        taking_part = [c for c in self._taking_part(turn.temperature) if c.name not in self.dead]
        missing = [c for c in taking_part if turn.key(c.name) not in self.done]
        order = random.Random(f"{self.seed} {turn.repeat} {turn.question.name} {turn.temperature} {turn.number}")
        if self.by_round:
            rows = self._ask_by_round(missing, turn, params, order)
        else:
            rows = {c.name: self._ask(c, turn, params) for c in order.sample(missing, len(missing))}
        plain = rows.get(PLAIN) or self.done[turn.key(PLAIN)]
        for contestant in missing:
            row = rows[contestant.name]
            if row.error is None:
                row = replace(row, equal=self._verdict(contestant, contestant.name, turn, plain, row))
                self.done[row.key] = row
            yield row

    def _ask(self, contestant: Contestant, turn: Turn, params: SamplingParams) -> Row:
        """The row of one answer, not yet compared; a contestant that fails takes part no more."""
        others = self._other_work()
        try:
            reply = contestant.answer(turn.prompt, params)
        except Exception as error:  # of any class: peers are other people's code
            return self._failed(contestant, turn, error)
        return self._answered(contestant, turn, params, reply, others.look())

    def _ask_by_round(
        self, contestants: Sequence[Contestant], turn: Turn, params: SamplingParams, order: random.Random
    ) -> dict[str, Row]:
        """The same for all of them, a round of each in turn until the last one has ended."""
        others = self._other_work()
        answering = {c: c.rounds(turn.prompt, params) for c in contestants}
        replies: dict[Contestant, Reply] = {}
        rows = {}
        while answering:
            for contestant in order.sample(list(answering), len(answering)):
                try:
                    reply = next(answering[contestant])
                except Exception as error:
                    rows[contestant.name] = self._failed(contestant, turn, error)
                    del answering[contestant]
                    continue
                if reply is not None:
                    replies[contestant] = reply
                    del answering[contestant]
        cores = others.look()
        return rows | {c.name: self._answered(c, turn, params, reply, cores) for c, reply in replies.items()}

    def _other_work(self) -> OtherWork:
        return OtherWork(helper for c in self.contestants if (helper := c.pid) is not None)

    def _failed(self, contestant: Contestant, turn: Turn, error: Exception) -> Row:
        if contestant.name == PLAIN:
            raise error
        self.dead.add(contestant.name)
        return replace(turn.row(contestant.name), error=f"{type(error).__name__}: {error}")

    def _answered(self, contestant: Contestant, turn: Turn, params: SamplingParams, reply: Reply, cores: float) -> Row:
        reply = counted(reply, self.llm.target.spec.eos_token_ids, params.max_new_tokens)
        return replace(
            turn.row(contestant.name),
            token_ids=reply.token_ids,
            prefill_seconds=reply.prefill_seconds,
            decode_seconds=reply.decode_seconds,
            decode_tokens=reply.decode_tokens,
            histogram=reply.histogram,
            steps=reply.steps,
            memory=reply.memory,
            others=round(cores, 3) if contestant.here else 0.0,
        )

    def _verdict(self, contestant: Contestant, name: str, turn: Turn, plain: Row, row: Row) -> str:
        if name == PLAIN:
            return ""
        if not contestant.comparable(turn.temperature):
            return NOT_ASKED
        return self.judge.compare(
            turn.prompt,
            list(plain.token_ids),
            list(row.token_ids),
            self._params(turn.temperature),
            contestant.own,
        )

    def _batch(self, method: Method, name: str, turns: Sequence[Turn]) -> Iterator[Row]:
        """One method's answers; those that differ come last, for their scores are asked of the idle target."""
        missing = [turn for turn in turns if turn.key(name) not in self.done]
        if not missing:
            return
        params = self._params(missing[0].temperature)
        unlike: list[tuple[Turn, Row]] = []
        for index, generation in method.llm.complete([turn.prompt for turn in missing], [params] * len(missing)):
            turn = missing[index]
            if generation.error is not None and name == PLAIN:
                raise BadLogits(generation.error)
            if generation.error is not None:
                yield replace(turn.row(name), error=generation.error)
                continue
            row = replace(
                turn.row(name),
                token_ids=generation.token_ids,
                decode_tokens=len(generation.token_ids),
                histogram=generation.stats.acceptance_histogram,
            )
            plain = row if name == PLAIN else self.done[turn.key(PLAIN)]
            if row.token_ids != list(plain.token_ids):
                unlike.append((turn, row))
                continue
            yield self._kept(replace(row, equal=self._verdict(method, name, turn, plain, row)))
        for turn, row in unlike:
            plain = self.done[turn.key(PLAIN)]
            yield self._kept(replace(row, equal=self._verdict(method, name, turn, plain, row)))

    def _kept(self, row: Row) -> Row:
        self.done[row.key] = row
        return row


def _said(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}
