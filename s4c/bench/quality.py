"""Whether speculation costs answers: right ones are counted, and then the answers themselves compared.

The task is one with references that end in a number, such as Spec-Bench's maths rows. An equal score could hide answers
that differ and happen to balance, so what counts is that the tokens are the same, one question after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from s4c.bench.contestants import PLAIN
from s4c.bench.questions import Question
from s4c.bench.run import Row

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> Decimal | None:
    """The number that a text ends up with: the one after the last `####` where there is one, else the last of all."""
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail if mark else text)
    return None if not found else Decimal((found[0] if mark else found[-1]).replace(",", "").rstrip("."))


def with_numbers(questions: Sequence[Question]) -> list[Question]:
    """The questions whose first reference ends in a number.

    Raises:
        ValueError: there are none.
    """
    found = [q for q in questions if q.references and final_number(q.references[0]) is not None]
    if not found:
        raise ValueError("no question has a reference with a number; give such a category, as math_reasoning")
    return found


def scored(
    questions: Sequence[Question], rows: Sequence[Row], decode: Callable[[list[int]], str]
) -> list[dict[str, Any]]:
    """For each method: right answers, and answers whose tokens are those of plain decoding.

    Args:
        rows: of one temperature and one turn.
        decode: tokens to text.
    """
    references = {q.name: final_number(q.references[0]) for q in questions}
    plain = {row.question: list(row.token_ids) for row in rows if row.method == PLAIN}
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method and row.error is None]
        right = [row.question for row in mine if final_number(decode(list(row.token_ids))) == references[row.question]]
        found.append(
            {
                "method": method,
                "answers": len(mine),
                "right": len(right),
                "same_answers": sum(list(row.token_ids) == plain[row.question] for row in mine),
                "unlike": [f"question {r.question}: {r.equal}" for r in mine if r.equal not in ("", "identical")],
            }
        )
    return found
