"""Distillation with a made-up engine: what it asks for, what it writes, how it goes on."""

import json
import random
import resource
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from s4c.training.data import read_rows
from s4c.training.distill import ChatFrame, DistillConfig, TokenPrompt, distill, distill_self
from s4c.types import SamplingParams

END = 2
CONFIG = DistillConfig(max_new_tokens=6, max_prompt_tokens=8)
PROMPTS = [TokenPrompt((1, 10 + i % 9, i), "file") for i in range(20)]
FRAME = ChatFrame((1, 5), (END, 6))


class Engine:
    """Writes a function of prompt and seed, last request first; dies after a number of answers, if told to."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.left = dies_after
        self.asked: list[tuple[tuple[int, ...], SamplingParams]] = []

    def __call__(self, prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int]]]:
        for index in reversed(range(len(prompts))):
            if self.left == 0:
                raise MemoryError
            self.left -= 1
            self.asked.append((tuple(prompts[index]), params[index]))
            seed = params[index].seed
            assert seed is not None
            words = random.Random(f"{prompts[index]} {seed}").choices(range(20, 50), k=1 + seed % 3)
            yield index, words if seed % 5 == 0 else [*words, END]


def lines(out: Path) -> list[str]:
    return sorted(out.read_text().splitlines())


def test_rows_are_what_training_reads(tmp_path: Path) -> None:
    engine = Engine()
    result = distill(PROMPTS, engine, tmp_path / "a" / "rows.jsonl", CONFIG)
    rows = read_rows([tmp_path / "a" / "rows.jsonl"], 50)
    assert {row.prompt_ids for row in rows} == {p.token_ids for p in PROMPTS}
    assert {row.source for row in rows} == {"file"}
    assert (result.rows, result.new_rows, result.too_long) == (20, 20, 0)
    assert result.new_tokens == sum(len(row.answer_ids) for row in rows)
    assert all(params.max_new_tokens == 6 for _, params in engine.asked)
    assert {row.temperature for row in rows} == {0.0, 0.8, 1.0}
    assert len({params.seed for _, params in engine.asked}) == 20


def test_temperatures_are_drawn_as_often_as_they_stand() -> None:
    drawn = Counter(CONFIG.answering((1, i)).temperature for i in range(2000))
    # Half, a quarter, a quarter of 2000, within five standard deviations (at most 22.4 each).
    assert abs(drawn[0.0] - 1000) < 112
    assert abs(drawn[0.8] - 500) < 112
    assert abs(drawn[1.0] - 500) < 112


def test_a_stopped_run_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    distill(PROMPTS, Engine(), tmp_path / "whole.jsonl", CONFIG)
    with pytest.raises(MemoryError):
        distill(PROMPTS, Engine(dies_after=7), tmp_path / "broken.jsonl", CONFIG)
    with (tmp_path / "broken.jsonl").open("a") as file:
        file.write('{"prompt_ids": [1, 10')
    engine = Engine()
    result = distill(PROMPTS, engine, tmp_path / "broken.jsonl", CONFIG)
    assert (len(engine.asked), result.rows, result.new_rows) == (13, 20, 13)
    assert lines(tmp_path / "broken.jsonl") == lines(tmp_path / "whole.jsonl")
    engine = Engine()
    assert distill(PROMPTS, engine, tmp_path / "broken.jsonl", CONFIG).new_rows == 0
    assert engine.asked == []


def test_a_prompt_that_stands_twice_is_answered_twice(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    distill(PROMPTS[:1], Engine(), out, CONFIG)
    assert distill([PROMPTS[0], PROMPTS[0]], Engine(), out, CONFIG).new_rows == 1


def test_too_long_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    long = TokenPrompt(tuple(range(9)), "file")
    result = distill([long, *PROMPTS[:2]], Engine(), tmp_path / "rows.jsonl", CONFIG)
    assert (result.new_rows, result.too_long) == (2, 1)


def test_no_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompts to answer"):
        distill([], Engine(), tmp_path / "rows.jsonl", CONFIG)


@pytest.mark.parametrize("line", ["not json", "[]", '{"prompt": "x"}'])
def test_a_file_of_something_else_is_not_touched(tmp_path: Path, line: str) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: not a distilled row; name a new file"):
        distill(PROMPTS, Engine(), out, CONFIG)
    assert out.read_text() == f"{line}\n"


@pytest.mark.parametrize("text", ["my only notes", "my notes\nwithout an end"])
def test_a_file_without_a_last_newline_is_not_cut(tmp_path: Path, text: str) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(text)
    with pytest.raises(ValueError, match="name a new file"):
        distill(PROMPTS, Engine(), out, CONFIG)
    assert out.read_text() == text


def test_two_runs_into_one_file(tmp_path: Path) -> None:
    def rival(prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int]]]:
        with pytest.raises(ValueError, match="is at work here"):
            distill(PROMPTS, Engine(), tmp_path / "rows.jsonl", CONFIG)
        yield 0, [3]

    assert distill(PROMPTS, rival, tmp_path / "rows.jsonl", CONFIG).new_rows == 1


def test_the_frame_is_the_template_around_the_words() -> None:
    def render(messages: list[dict[str, str]]) -> str:
        return f"<user>{messages[0]['content']}<end><bot>"

    frame = ChatFrame.of(render, lambda text: [ord(c) for c in text])
    assert bytes(frame.before) == b"<user>"
    assert bytes(frame.after) == b"<end><bot>"
    with pytest.raises(ValueError, match="give a file of prompts"):
        ChatFrame.of(lambda messages: "no words", lambda text: [])


def test_self_written_prompts(tmp_path: Path) -> None:
    engine = Engine()
    result = distill_self(FRAME, 70, [END], engine, tmp_path / "rows.jsonl", CONFIG)
    assert result.rows == 70
    rows = read_rows([tmp_path / "rows.jsonl"], 50)
    assert len({row.prompt_ids for row in rows}) == 70
    for row in rows:
        assert (row.prompt_ids[:2], row.prompt_ids[-2:], row.source) == ((1, 5), (END, 6), "self")
        assert END not in row.prompt_ids[2:-2]
    writing = [params for prompt, params in engine.asked if prompt == (1, 5)]
    assert {p.temperature for p in writing} == {1.0}
    assert len({p.seed for p in writing}) == len(writing)


def test_self_written_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(MemoryError):
        distill_self(FRAME, 70, [END], Engine(dies_after=100), out, CONFIG)
    before = out.read_text()
    kept = len(before.splitlines())
    assert 0 < kept < 70
    result = distill_self(FRAME, 70, [END], Engine(), out, CONFIG)
    assert (result.rows, result.new_rows) == (70, 70 - kept)
    assert out.read_text().startswith(before)
    assert len({tuple(json.loads(line)["prompt_ids"]) for line in lines(out)}) == 70


def test_a_target_that_never_ends_a_prompt(tmp_path: Path) -> None:
    def babbles(prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int]]]:
        yield from ((i, [9] * p.max_new_tokens) for i, p in enumerate(params))

    with pytest.raises(ValueError, match="wrote no new usable prompt in 512 tries"):
        distill_self(FRAME, 5, [END], babbles, tmp_path / "rows.jsonl", CONFIG)


def test_a_request_that_failed_is_told_and_asked_again(tmp_path: Path) -> None:
    engine, out = Engine(), tmp_path / "rows.jsonl"

    def fails(prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int] | str]]:
        yield from (
            (i, "the logits are NaN" if prompts[i][2] == 3 else answer) for i, answer in engine(prompts, params)
        )

    result = distill(PROMPTS, fails, out, CONFIG)
    assert (result.rows, result.failures) == (19, ["the logits are NaN"])
    assert distill(PROMPTS, engine, out, CONFIG).new_rows == 1


def test_a_target_that_answers_none_of_its_prompts(tmp_path: Path) -> None:
    engine = Engine()

    def writes(prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int] | str]]:
        writing = prompts[0] == list(FRAME.before)
        yield from ((i, answer if writing else "the logits are NaN") for i, answer in engine(prompts, params))

    with pytest.raises(ValueError, match=r"give a file of prompts; \d+ requests failed, such as: the logits are NaN"):
        distill_self(FRAME, 5, [END], writes, tmp_path / "rows.jsonl", CONFIG)


def test_a_full_disk_is_named_with_what_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    distill([replace(prompt, source="x" * 100_000) for prompt in PROMPTS[:3]], Engine(), out, CONFIG)
    before, limits = out.read_text(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rows\.jsonl cannot be written .*; its 3 rows are whole"):
            distill(PROMPTS, Engine(), out, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_text().startswith(before)
