"""Questions to measure with: Spec-Bench's JSONL, any JSONL of prompts or chats, or the set that comes with s4c.

A line is a JSON object with one of these, and with `question_id`, `category` and `reference` as it likes:

    {"turns": ["Why is the sky blue?", "And at dusk?"]}       Spec-Bench's form
    {"prompt": "Why is the sky blue?"}
    {"messages": [{"role": "user", "content": "Why is the sky blue?"}]}
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "questions.jsonl"
"""The project's own questions, of Spec-Bench's kinds."""

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""Spec-Bench counts these eight categories as one."""

Message = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """A question of one turn or several; the model's own answers stand between the turns.

    Attributes:
        name: the question's id, unique in its file.
        category: Spec-Bench's kind; `mt_bench` for its eight chat categories.
        turns: what the user says.
        before: messages that stand before the first turn.
        references: right answers, one for each turn, where there are any.
    """

    name: str
    category: str
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()
    references: tuple[str, ...] = ()


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        ValueError: a line is no question or repeats an id; file and line are named.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; questions are a JSONL file in UTF-8") from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(json.loads(line), number)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error}; each line must be a JSON object with turns (a list of texts), a "
                "prompt (a text) or messages (a chat that ends with the user)"
            ) from error
        if question.name in questions:
            raise ValueError(f"{path}, line {number}: question_id {question.name} stands there a second time")
        questions[question.name] = question
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return list(questions.values())


def _question(row: Any, number: int) -> Question:
    if not isinstance(row, dict):
        raise TypeError(f"{row!r} is no JSON object")
    forms: dict[str, Callable[[Any], tuple[tuple[Message, ...], list[str]]]] = {
        "turns": lambda turns: ((), turns),
        "prompt": lambda prompt: ((), [prompt]),
        "messages": _chat,
    }
    named = [form for form in forms if form in row]
    if len(named) != 1:
        raise ValueError(f"it has {' and '.join(named) or 'neither turns nor prompt nor messages'}")
    before, turns = forms[named[0]](row[named[0]])
    if not isinstance(turns, list) or not turns or not all(isinstance(text, str) and text.strip() for text in turns):
        raise ValueError(f"{named[0]} is {row[named[0]]!r}")
    category = str(row.get("category", "all"))
    reference = row.get("reference", [])
    return Question(
        name=str(row.get("question_id", number)),
        category="mt_bench" if category in MT_BENCH else category,
        turns=tuple(turns),
        before=before,
        references=tuple(map(str, reference if isinstance(reference, list) else [reference])),
    )


def _chat(messages: Any) -> tuple[tuple[Message, ...], list[str]]:
    """A chat as the messages before its last one, and that one."""
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not well_formed or not messages or messages[-1]["role"] != "user":
        raise ValueError(f"messages are {messages!r}")
    return tuple(messages[:-1]), [messages[-1]["content"]]


def of_categories(questions: Sequence[Question], wanted: Sequence[str]) -> list[Question]:
    """The questions of some categories, in order.

    Raises:
        ValueError: there is no such category; the message lists what there is.
    """
    there = sorted({question.category for question in questions})
    unknown = [category for category in wanted if category not in there]
    if unknown:
        raise ValueError(f"category {unknown[0]!r} is not among the questions; there are {', '.join(there)}")
    return [question for question in questions if question.category in wanted]


def sample(questions: Sequence[Question], count: int, seed: int) -> list[Question]:
    """A seeded choice, spread evenly over the categories, in random order."""
    shuffled = random.Random(seed).sample(list(questions), len(questions))
    rank: dict[str, int] = {}
    keys = []
    for question in shuffled:
        rank[question.category] = rank.get(question.category, 0) + 1
        keys.append(rank[question.category])
    order = sorted(range(len(shuffled)), key=lambda index: keys[index])
    chosen = sorted(order[:count])
    return [shuffled[index] for index in chosen]
