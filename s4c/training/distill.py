"""Text that the target writes itself: answers to prompts, and prompts of its own.

A drafter learns from what its target writes, so the training text is the target's, at mixed temperatures. Given
no prompts, the target writes them too: its chat template up to the place of the user's words is a text that
it can go on with, and what it writes there until it ends the turn is a prompt (Magpie, arXiv 2406.08464).

The generating itself comes in as a function, for this room does not know the engine. Each row is written as it is
finished; a run that is started again skips the rows that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from s4c.training.checkpoint import exclusive
from s4c.types import SamplingParams

Generate = Callable[[list[list[int]], list[SamplingParams]], Iterator[tuple[int, list[int] | str]]]
"""Prompts and their parameters in; (index, answer token ids) out, as they are finished, in any order; where a request
failed the reason in place of the tokens."""

SELF_PROMPTS_AT_ONCE = 64
PATIENCE = 8
"""So many groups of self-written prompts that bring no row end a run."""
ROW_BEGINS = b'{"prompt_ids":'
"""How each line begins that is written here."""

MARKER = "s4c-user-words-stand-here"


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as token ids, the chat template applied, and where it came from."""

    token_ids: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class ChatFrame:
    """What stands before and after the user's words in a chat of one turn: token ids."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, render: Callable[[list[dict[str, str]]], str], encode: Callable[[str], list[int]]) -> ChatFrame:
        """Cut a rendered chat at the user's words.

        Args:
            render: applies the chat template and opens the answer.
            encode: text to token ids, without special tokens of its own.

        Raises:
            ValueError: the template does not show the user's words once.
        """
        parts = render([{"role": "user", "content": MARKER}]).split(MARKER)
        if len(parts) != 2 or not parts[0]:
            raise ValueError("the target's chat template does not frame the user's words; give a file of prompts")
        return cls(tuple(encode(parts[0])), tuple(encode(parts[1])))


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation.

    Attributes:
        max_new_tokens: most tokens of an answer.
        max_prompt_tokens: longer prompts are left out; also the limit of a prompt that the target writes.
        temperatures: of the answers, each as likely as it stands here often.
        seed: of everything drawn.
    """

    max_new_tokens: int = 256
    max_prompt_tokens: int = 512
    temperatures: tuple[float, ...] = (0.0, 0.0, 0.8, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ValueError("temperatures is empty; give one at least")
        for name in ("max_new_tokens", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def answering(self, prompt: Sequence[int]) -> SamplingParams:
        """The parameters of one answer: a function of the seed and the prompt."""
        digest = hashlib.sha256(f"{self.seed} {list(prompt)}".encode()).digest()
        temperature = self.temperatures[digest[0] % len(self.temperatures)]
        return SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=temperature, seed=int.from_bytes(digest[1:5], "big")
        )


@dataclass
class DistillResult:
    """What a run did.

    Attributes:
        rows: in the file now.
        new_rows: of this run.
        new_tokens: of their answers.
        too_long: prompts that were left out.
        failures: why requests failed, which gave no row.
    """

    rows: int
    new_rows: int
    new_tokens: int
    too_long: int
    failures: list[str]


def distill(prompts: Sequence[TokenPrompt], generate: Generate, out: Path, config: DistillConfig) -> DistillResult:
    """Answer prompts, a row of `out` (JSONL) each.

    Raises:
        ValueError: no prompts, or `out` holds something else than such rows.
        OSError: `out` cannot be written; the rows in it are whole.
    """
    if not prompts:
        raise ValueError("there are no prompts to answer")
    fitting = _fitting(prompts, config)
    engine = _Engine(generate)
    with _Rows(out) as rows:
        answered = Counter(tuple(row["prompt_ids"]) for row in rows.present)
        todo = []
        for prompt in fitting:
            answered[prompt.token_ids] -= 1
            if answered[prompt.token_ids] < 0:
                todo.append(prompt)
        with _bar() as bar:
            task = bar.add_task("answers", total=len(fitting), completed=len(fitting) - len(todo), tokens=0)
            _answer(todo, engine, rows, config, lambda: bar.update(task, advance=1, tokens=rows.new_tokens))
        return rows.result(len(prompts) - len(fitting), engine.failures)


def _fitting(prompts: Sequence[TokenPrompt], config: DistillConfig) -> list[TokenPrompt]:
    return [p for p in prompts if len(p.token_ids) <= config.max_prompt_tokens]


def distill_self(
    frame: ChatFrame, count: int, ends: Sequence[int], generate: Generate, out: Path, config: DistillConfig
) -> DistillResult:
    """Let the target write prompts and answer them, until `out` holds `count` rows of this kind (source `self`).

    Args:
        frame: the chat around the user's words.
        count: rows wanted.
        ends: tokens that end a turn; a prompt that was not ended is dropped.
        generate: the engine.
        out: JSONL.
        config: the settings.

    Raises:
        ValueError: the target writes nothing new that it ends or fails to answer, or `out` holds something else than
            such rows.
        OSError: `out` cannot be written; the rows in it are whole.
    """
    engine = _Engine(generate)
    with _Rows(out) as rows, _bar() as bar:
        before = [row for row in rows.present if row["source"] == "self"]
        known = {tuple(row["prompt_ids"]) for row in before}
        task = bar.add_task("self-written", total=count, completed=len(before), tokens=0)

        def tell() -> None:
            bar.update(task, advance=1, tokens=rows.new_tokens)

        # A group that a stop cut short is not taken up again: the next one has seeds of its own.
        group = max((row.get("group", -1) for row in before), default=-1) + 1
        barren = 0
        while len(before) + rows.new < count:
            written = _write_prompts(frame, group, ends, engine, config)
            fresh = [p for p in _fitting(written, config) if p.token_ids not in known]
            known |= {p.token_ids for p in fresh}
            held = rows.new
            _answer(fresh[: count - len(before) - held], engine, rows, config, tell, {"group": group})
            barren = 0 if rows.new > held else barren + 1
            if barren == PATIENCE:
                failed = [f"; {len(engine.failures)} requests failed, such as: {why}" for why in engine.failures[:1]]
                raise ValueError(
                    f"the target wrote no new usable prompt in {PATIENCE * SELF_PROMPTS_AT_ONCE} tries (each must end "
                    f"its turn within {config.max_prompt_tokens} tokens); give a file of prompts{''.join(failed)}"
                )
            group += 1
        return rows.result(0, engine.failures)


@dataclass
class _Engine:
    """Gives what was answered alone, as it is finished, and keeps why the rest failed."""

    generate: Generate
    failures: list[str] = field(default_factory=list)

    def __call__(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int]]]:
        for index, answer in self.generate(prompts, params):
            if isinstance(answer, str):
                self.failures.append(answer)
            else:
                yield index, answer


def _write_prompts(
    frame: ChatFrame, group: int, ends: Sequence[int], engine: _Engine, config: DistillConfig
) -> list[TokenPrompt]:
    """One group of prompts by the target, each different, in the order of their seeds."""
    first = (config.seed * 1_000_003 + group) * SELF_PROMPTS_AT_ONCE
    params = [
        SamplingParams(max_new_tokens=config.max_prompt_tokens, temperature=1.0, seed=(first + i) % 2**64)
        for i in range(SELF_PROMPTS_AT_ONCE)
    ]
    written = sorted(engine([list(frame.before)] * len(params), params))
    words = [ids[:-1] for _, ids in written if len(ids) > 1 and ids[-1] in ends]
    distinct = dict.fromkeys((*frame.before, *ids, *frame.after) for ids in words)
    return [TokenPrompt(ids, "self") for ids in distinct]


def _answer(
    prompts: Sequence[TokenPrompt],
    engine: _Engine,
    rows: _Rows,
    config: DistillConfig,
    tell: Callable[[], None],
    more: dict[str, Any] | None = None,
) -> None:
    params = [config.answering(p.token_ids) for p in prompts]
    if not prompts:
        return
    for index, answer in engine([list(p.token_ids) for p in prompts], params):
        prompt = prompts[index]
        rows.append(
            {
                "prompt_ids": list(prompt.token_ids),
                "answer_ids": answer,
                "temperature": params[index].temperature,
                "source": prompt.source,
                **(more or {}),
            }
        )
        tell()


class _Rows:
    """A JSONL file that grows row by row; a last line that was torn by a kill is dropped when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.new = 0
        self.new_tokens = 0

    def __enter__(self) -> _Rows:
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive(self.path.with_name(f".{self.path.name}.lock")))
            self.present = self._read()
            self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def append(self, row: dict[str, Any]) -> None:
        """Write a row at once."""
        try:
            self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # closing writes what is left, which fails again with fewer words
                self._file.close()
            whole = len(self.present) + self.new
            raise OSError(
                error.errno, f"{self.path} cannot be written ({error}); its {whole} rows are whole"
            ) from error
        self.new += 1
        self.new_tokens += len(row["answer_ids"])

    def result(self, too_long: int, failures: list[str]) -> DistillResult:
        return DistillResult(len(self.present) + self.new, self.new, self.new_tokens, too_long, failures)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if not whole and not data.startswith(ROW_BEGINS[: len(data)]):
            raise ValueError(f"{self.path} holds something else than distilled rows; name a new file")
        present = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                fine = isinstance(row["prompt_ids"], list) and isinstance(row["source"], str)
            except (ValueError, KeyError, TypeError):
                fine = False
            if not fine:
                raise ValueError(f"{self.path}, line {number}: not a distilled row; name a new file")
            present.append(row)
        if whole < len(data):
            os.truncate(self.path, whole)
        return present


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
