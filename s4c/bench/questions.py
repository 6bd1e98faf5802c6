"""Questions to measure with: Spec-Bench's JSONL (`question_id`, `category`, `turns`), or any file of that form."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""Spec-Bench counts these eight categories as one."""


@dataclass(frozen=True)
class Question:
    """A question, of which the first turn is asked.

    Attributes:
        name: the question's id.
        category: Spec-Bench's kind; `mt_bench` for its eight chat categories.
        text: the first turn.
    """

    name: str
    category: str
    text: str


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        ValueError: a line is not JSON or lacks a field; file and line are named.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            category = "mt_bench" if row["category"] in MT_BENCH else row["category"]
            questions.append(Question(str(row["question_id"]), category, row["turns"][0]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; each line must be a JSON object with question_id, category "
                "and turns"
            ) from error
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


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
