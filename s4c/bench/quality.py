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

_NUMBER = re.compile(
    r"(?P<sign>(?<!\w)[-\u2212])?[$£€]?"  # a minus behind a digit or a letter is a dash
    r"(?P<size>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:(?P<power>e[-+]?\d{1,3})\b|/(?P<divisor>[1-9]\d*)(?!\.?\d))?",
    re.IGNORECASE,
)


def final_number(text: str) -> Decimal | None:
    """The number that a text ends up with: the one after the last `####` where there is one, else the last of all.

    Read are -5, $1,234.50, 1/2 and 3e5, whatever stands around them: 7%, 12., **4**.
    """
    _, mark, tail = text.rpartition("####")
    found = list(_NUMBER.finditer(tail if mark else text))
    if not found:
        return None
    number = found[0 if mark else -1]
    size = Decimal(number["size"].replace(",", "") + (number["power"] or "")) / Decimal(number["divisor"] or 1)
    return -size if number["sign"] else size


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
    """For each method and temperature: right answers, and answers whose tokens are those of plain decoding there.

    Args:
        rows: of one turn.
        decode: tokens to text.
    """
    references = {q.name: final_number(q.references[0]) for q in questions}
    plain = {row.key: list(row.token_ids) for row in rows if row.method == PLAIN}
    found = []
    for method, temperature in dict.fromkeys((row.method, row.temperature) for row in rows):
        mine = [r for r in rows if (r.method, r.temperature) == (method, temperature) and r.error is None]
        right = [row.question for row in mine if final_number(decode(list(row.token_ids))) == references[row.question]]
        found.append(
            {
                "method": method,
                "temperature": temperature,
                "answers": len(mine),
                "right": len(right),
                "same_answers": sum(list(r.token_ids) == plain[r.key._replace(method=PLAIN)] for r in mine),
                "unlike": [f"question {r.question}: {r.equal}" for r in mine if r.equal not in ("", "identical")],
            }
        )
    return found
