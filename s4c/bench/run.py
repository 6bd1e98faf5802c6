"""Methods side by side: the same questions, one after the other, in one run.

Each question is answered by every method before the next one is asked, in an order that changes from question
to question, so that what else the machine does falls on all of them. The answers of a lossless method must be
those of plain decoding: identical on the native runtime, and elsewhere identical up to a tie, two tokens whose
scores lie within `TIE` of each other; everything else is an error.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from s4c.bench.questions import Question
from s4c.drafters.base import Drafter
from s4c.engine.llm import LLM, choose_drafter
from s4c.types import SamplingParams
from s4c.verify.scores import NoiseTable, Scores
from s4c.verify.tree import root_only

PLAIN = "none"
TIE = {torch.float32: 1e-4, torch.bfloat16: 1.0, torch.float16: 0.1}
"""Two scores no further apart than this may change places with the order of a sum, where that order may change."""
PEER = "transformers"


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question.

    Attributes:
        seconds: prefill and decoding; decode_seconds: without the prefill, where it is told apart.
        rounds: target passes after the prefill.
        equal: against plain decoding: `identical`, `tie: ...` or `different: ...`; empty for plain decoding.
    """

    question: str
    category: str
    method: str
    token_ids: list[int]
    seconds: float
    decode_seconds: float
    rounds: int
    equal: str = ""


class Bench:
    """Methods that share one loaded target.

    Args:
        llm: the target.
        methods: names or checkpoints of drafters, each perhaps with a tree: `none`, `auto`, `auto@best:16`.
        params: how all of them decode.
        peer: transformers' own `generate`, if it is to run too: prompt and most new tokens to output tokens.
    """

    def __init__(
        self,
        llm: LLM,
        methods: Sequence[str],
        params: SamplingParams,
        peer: Callable[[list[int], int], list[int]] | None = None,
    ) -> None:
        self.llm = llm
        self.params = params
        self.peer = peer
        self.methods: dict[str, tuple[Drafter, str]] = {}
        for method in dict.fromkeys([PLAIN, *methods]):
            name, _, tree = method.partition("@")
            self.methods[method] = (choose_drafter(name, llm.target), tree or "auto")

    def run(self, questions: Iterable[Question], seed: int = 0) -> Iterator[Answer]:
        """Ask every question; the first one twice, for the first time does not count."""
        order = random.Random(seed)
        names = [*self.methods, *([PEER] if self.peer else [])]
        warm = True
        for question in questions:
            prompt = self.prompt(question)
            if warm:
                for name in names:
                    self._answer(name, question, prompt, replace(self.params, max_new_tokens=16))
                warm = False
            answers = {n: self._answer(n, question, prompt, self.params) for n in order.sample(names, len(names))}
            plain = answers[PLAIN].token_ids
            for name, answer in answers.items():
                verdict = "" if name == PLAIN else self.compare(prompt, plain, answer.token_ids, name)
                yield replace(answer, equal=verdict)

    def batch(self, questions: Sequence[Question], method: str) -> list[Answer]:
        """One method's answers, decoded in batches; the seconds are those of the whole."""
        drafter, tree = self.methods[method]
        self.llm.use(drafter, tree)
        started = time.perf_counter()
        outcomes = self.llm.generate([self.prompt(question) for question in questions], self.params)
        seconds = time.perf_counter() - started
        return [
            Answer(q.name, q.category, method, g.token_ids, seconds, g.stats.decode_seconds, g.stats.rounds)
            for q, g in zip(questions, outcomes, strict=True)
        ]

    def prompt(self, question: Question) -> list[int]:
        """The question as the target reads it: through its chat template where it has one."""
        if self.llm.tokenizer is not None and self.llm.tokenizer.chat_template:
            return self.llm.token_ids([{"role": "user", "content": question.text}])
        return self.llm.token_ids(question.text)

    def compare(self, prompt: list[int], plain: list[int], other: list[int], method: str) -> str:
        """`identical`, `tie: ...` or `different: ...`; a method on the native runtime has no ties."""
        if other == plain:
            return "identical"
        at = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
        if at is None:
            return f"different: {len(other)} tokens instead of {len(plain)}"
        left, right = self.scores_after(prompt, plain[:at], [plain[at], other[at]])
        exact = method != PEER and self.llm.target.runtime == "native"
        kind = "tie" if not exact and abs(left - right) <= TIE[self.llm.target.dtype] else "different"
        return f"{kind}: token {at} is {other[at]} ({right:.5f}) instead of {plain[at]} ({left:.5f})"

    def scores_after(self, prompt: list[int], written: list[int], tokens: list[int]) -> list[float]:
        """What decides between tokens after a text: processed logit plus noise, by a pass over one token."""
        target, line = self.llm.target, prompt + written
        target.reserve(1, len(line) + 1)
        target.prefill(0, torch.tensor(line[:-1], device=target.device))
        logits = target.verify(root_only(torch.tensor(line[-1:], device=target.device))).logits
        scores = Scores([self.params], [line], [len(prompt)], NoiseTable(target.spec.vocab_size, target.device))
        processed = scores.process(logits)
        noise = scores.noise(torch.tensor([[len(line)]], device=target.device))
        total = processed if noise is None else processed + noise
        values: list[float] = total[0, 0, tokens].tolist()
        return values

    def _answer(self, name: str, question: Question, prompt: list[int], params: SamplingParams) -> Answer:
        started = time.perf_counter()
        if name == PEER:
            assert self.peer is not None
            tokens = self.peer(prompt, params.max_new_tokens)
            seconds = time.perf_counter() - started
            return Answer(question.name, question.category, name, tokens, seconds, seconds, len(tokens))
        drafter, tree = self.methods[name]
        self.llm.use(drafter, tree)
        started = time.perf_counter()
        generation = self.llm.generate(prompt, params)
        seconds = time.perf_counter() - started
        stats = generation.stats
        return Answer(
            question.name,
            question.category,
            name,
            generation.token_ids,
            seconds,
            stats.decode_seconds,
            stats.rounds,
        )


def summarise(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """A row for each method: speed, acceptance and equality over all questions, and speedup by category.

    The speedup is the ratio of decode tokens per second over plain decoding, pooled over the questions; a method
    whose prefill is not told apart is compared by whole seconds.
    """
    by_method: dict[str, list[Answer]] = {}
    for answer in answers:
        by_method.setdefault(answer.method, []).append(answer)
    plain = {answer.question: answer for answer in by_method[PLAIN]}

    def speedup(rows: Sequence[Answer]) -> float:
        whole = any(row.seconds == row.decode_seconds for row in rows)
        mine = [(len(row.token_ids), row.seconds if whole else row.decode_seconds) for row in rows]
        base = [(len(p.token_ids), p.seconds if whole else p.decode_seconds) for p in (plain[r.question] for r in rows)]
        rates = [sum(n for n, _ in pairs) / sum(s for _, s in pairs) for pairs in (mine, base)]
        return rates[0] / rates[1]

    summary = []
    for method, rows in by_method.items():
        tokens = sum(len(row.token_ids) for row in rows)
        categories = sorted({row.category for row in rows})
        summary.append(
            {
                "method": method,
                "questions": len(rows),
                "tokens": tokens,
                "tokens_per_second": tokens / sum(row.decode_seconds for row in rows),
                "tokens_per_second_with_prefill": tokens / sum(row.seconds for row in rows),
                "speedup": speedup(rows),
                "mean_acceptance_length": tokens / sum(row.rounds for row in rows),
                "identical": sum(row.equal in ("", "identical") for row in rows),
                "ties": [f"{row.question}: {row.equal}" for row in rows if row.equal.startswith("tie")],
                "different": [f"{row.question}: {row.equal}" for row in rows if row.equal.startswith("different")],
                "speedup_by_category": {c: speedup([r for r in rows if r.category == c]) for c in categories},
            }
        )
    return summary


def write_jsonl(path: Path, answers: Iterable[Answer]) -> None:
    """Append answers to a file, a line each."""
    with path.open("a", encoding="utf-8") as file:
        for answer in answers:
            file.write(json.dumps(asdict(answer)) + "\n")
