"""Two runs side by side: for each method that both have, on the answers that both have, what changed.

A change is told from noise by the 95% interval of the quotient of the two figures, a bootstrap over the common
questions: each of them is drawn with its answers in both runs, so that what makes a question slow cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s4c.bench import statistics
from s4c.bench.contestants import PLAIN
from s4c.bench.run import Key, Row
from s4c.bench.store import RESULTS, read_rows, read_run
from s4c.bench.summary import committed, decoding

Rows = Mapping[Key, Row]
Figure = Callable[[Rows, Key], tuple[float, ...]]
"""Numerators and denominators of one answer, by turns; empty where it has none."""


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """What two folders have in common: number of `questions`, `settings` that differ, and `rows` of figures.

    Raises:
        ValueError: a folder holds no run, or the two have no answers in common.
    """
    before, after = (read_run(folder)["settings"] for folder in (first, second))
    runs = [{r.key: r for r in read_rows(folder / RESULTS) if r.error is None} for folder in (first, second)]
    common = [key for key in runs[0] if key in runs[1]]
    if not common:
        raise ValueError(f"{first} and {second} have no answers in common: no method on the same questions")
    timed = bool(before.get("timed")) and bool(after.get("timed"))
    rows = []
    for method, temperature in dict.fromkeys((key.method, key.temperature) for key in common):
        keys = [key for key in common if (key.method, key.temperature) == (method, temperature)]
        for name, figure in _figures(method, timed).items():
            row = _compared(figure, keys, *runs)
            rows += [{"method": method, "temperature": temperature, "figure": name, **row}] if row else []
    unlike = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {
        "questions": len({key.question for key in common}),
        "settings": [f"{key}: {before.get(key)!r} and {after.get(key)!r}" for key in unlike],
        "rows": rows,
    }


def _figures(method: str, timed: bool) -> dict[str, Figure]:
    figures: dict[str, Figure] = {"tokens/s": _speed} if timed else {}
    if method == PLAIN:
        return figures
    return {**figures, **({"speedup": _speedup} if timed else {}), "tokens a pass": _passes}


def _speed(rows: Rows, key: Key) -> tuple[float, ...]:
    return decoding(rows[key])


def _speedup(rows: Rows, key: Key) -> tuple[float, ...]:
    plain = rows.get(key._replace(method=PLAIN))
    return (*decoding(rows[key]), *reversed(decoding(plain))) if plain else ()


def _passes(rows: Rows, key: Key) -> tuple[float, ...]:
    return committed(rows[key]) if rows[key].histogram else ()


def _compared(figure: Figure, keys: Sequence[Key], first: Rows, second: Rows) -> dict[str, Any]:
    """A figure in both runs and the second over the first; empty where no question has it in both."""
    sums: dict[str, list[list[float]]] = {}
    for key in keys:
        sides = [list(figure(run, key)) for run in (first, second)]
        if all(sides):
            before = sums.setdefault(key.question, [[0.0] * len(side) for side in sides])
            sums[key.question] = [
                [a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, sides, strict=True)
            ]
    pairs = [pair for pair in sums.values() if all(value > 0 for side in pair for value in side)]
    if not pairs:
        return {}
    change = statistics.quotient([[*after, *_inverse(before)] for before, after in pairs])
    return {
        "first": statistics.quotient([before for before, _ in pairs]).as_dict(),
        "second": statistics.quotient([after for _, after in pairs]).as_dict(),
        "change": change.as_dict(),
        "verdict": "higher" if change.low > 1 else "lower" if change.high < 1 else "within the noise",
    }


def _inverse(columns: Sequence[float]) -> list[float]:
    """The columns of the inverse fraction: numerators and denominators trade places."""
    return [value for pair in zip(columns[1::2], columns[0::2], strict=True) for value in pair]
