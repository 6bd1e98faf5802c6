"""The figures of a run: an entry for each method and temperature, from its rows.

Speeds are compared with the rows of the baseline on the same question, turn and repeat, so a method that died midway
is compared on what it answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from s4c.bench import statistics
from s4c.bench.contestants import PLAIN
from s4c.bench.machine import BUSY
from s4c.bench.peers import SECOND_BASELINE
from s4c.bench.run import Key, Row
from s4c.bench.statistics import Estimate

Cost = Callable[[Row], tuple[float, float]]
"""Tokens of a row, and what they cost."""


def decoding(row: Row) -> tuple[float, float]:
    """What came after the prefill."""
    return row.decode_tokens, row.decode_seconds


def committed(row: Row) -> tuple[float, float]:
    """Tokens and the rounds that committed them."""
    histogram = row.histogram or ()
    return sum((a + 1) * count for a, count in enumerate(histogram)), sum(histogram)


def whole(row: Row) -> tuple[float, float]:
    """All tokens, and all seconds."""
    return len(row.token_ids), row.prefill_seconds + row.decode_seconds


def summarise(rows: Sequence[Row], timed: bool, nodes: Mapping[str, int | None] | None = None) -> list[dict[str, Any]]:
    """The entries of a run, in order of first appearance.

    Args:
        timed: whether the seconds of the rows mean anything.
        nodes: most nodes of the trees of each method.
    """
    latest = {row.key: row for row in rows}
    good = {key: row for key, row in latest.items() if row.error is None}
    entries = []
    for method, temperature in dict.fromkeys((row.method, row.temperature) for row in latest.values()):
        mine = [row for row in latest.values() if (row.method, row.temperature) == (method, temperature)]
        answered = [row for row in mine if row.error is None]
        entry: dict[str, Any] = {
            "method": method,
            "temperature": temperature,
            "nodes": (nodes or {}).get(method),
            "questions": len({row.question for row in answered}),
            "answers": len(answered),
            "tokens": sum(len(row.token_ids) for row in answered),
            **_equality(mine),
            **_acceptance(answered),
        }
        if timed and answered:
            entry |= _speed(answered, good)
        entries.append(entry)
    return entries


def _equality(rows: Sequence[Row]) -> dict[str, Any]:
    def of(kind: str) -> list[str]:
        return [f"{place(row)}: {row.equal}" for row in rows if row.error is None and row.equal.startswith(kind)]

    return {
        "identical": sum(row.equal == "identical" for row in rows),
        "ties": of("tie"),
        "different": of("different"),
        "not_asked": len(of("not asked")),
        "errors": [f"{place(row)}: {row.error}" for row in rows if row.error is not None],
    }


def place(row: Row) -> str:
    """Question, turn and repeat of a row, as far as they say anything."""
    parts = [f"question {row.question}"]
    parts += [f"turn {row.turn + 1}"] if row.turn else []
    parts += [f"repeat {row.repeat + 1}"] if row.repeat else []
    return ", ".join(parts)


def _acceptance(rows: Sequence[Row]) -> dict[str, Any]:
    """Of methods that tell their rounds: MAL over all and by category, histogram, acceptance by depth."""
    told = [row for row in rows if row.histogram]
    if not told:
        return {"mal": None}
    histogram = statistics.added([row.histogram or () for row in told])
    given, reached = statistics.acceptance(histogram)
    return {
        "mal": _mal(told).as_dict(),
        "mal_by_category": {c: _mal(some).as_dict() for c, some in _by(told, lambda row: row.category).items()},
        "histogram": histogram,
        "acceptance": {"given": given, "reached": reached},
    }


def _mal(rows: Iterable[Row]) -> Estimate:
    questions = _by(rows, lambda row: row.question).values()
    return statistics.quotient([_summed(committed(row) for row in some) for some in questions])


def _speed(rows: Sequence[Row], good: Mapping[Key, Row]) -> dict[str, Any]:
    memory = [row.memory for row in rows if row.memory is not None]
    rounds = sum(sum(row.histogram or ()) for row in rows)
    steps: dict[str, float] = {}
    for row in rows:
        for name, seconds in (row.steps or {}).items():
            steps[name] = steps.get(name, 0.0) + seconds
    return {
        "tokens_per_second": _rate(rows, decoding),
        "tokens_per_second_with_prefill": _rate(rows, whole),
        "prefill_tokens_per_second": _rate(rows, lambda row: (row.prompt_tokens, row.prefill_seconds)),
        "speedup": speedup(rows, good, PLAIN, decoding),
        "speedup_with_prefill": speedup(rows, good, PLAIN, whole),
        "speedup_over_peer": speedup(rows, good, SECOND_BASELINE, decoding),
        "speedup_over_peer_with_prefill": speedup(rows, good, SECOND_BASELINE, whole),
        "speedup_by_category": {
            category: speedup(some, good, PLAIN, decoding) for category, some in _by(rows, lambda r: r.category).items()
        },
        "quartiles": _quartiles(rows, good),
        "round_ms": {name: 1e3 * seconds / rounds for name, seconds in steps.items()} if rounds else {},
        "memory": max(memory, default=None),
    }


def _rate(rows: Sequence[Row], cost: Cost) -> float | None:
    tokens, seconds = (sum(column) for column in zip(*map(cost, rows), strict=True))
    return tokens / seconds if tokens and seconds else None


def _pairs(rows: Iterable[Row], good: Mapping[Key, Row], base: str, cost: Cost) -> list[list[float]]:
    """For each question tokens and seconds of the rows, then seconds and tokens of the baseline in the same places."""
    pairs = []
    for some in _by(rows, lambda row: row.question).values():
        both = [(row, other) for row in some if (other := good.get(row.key._replace(method=base))) is not None]
        sums = _summed((*cost(row), *reversed(cost(other))) for row, other in both)
        if sums and all(value > 0 for value in sums):
            pairs.append(sums)
    return pairs


def _summed(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]


def speedup(rows: Iterable[Row], good: Mapping[Key, Row], base: str, cost: Cost) -> dict[str, float] | None:
    """The rows' rate over that of the baseline, pooled; None where they share no answer."""
    pairs = _pairs(rows, good, base, cost)
    return statistics.quotient(pairs).as_dict() if pairs else None


def _quartiles(rows: Sequence[Row], good: Mapping[Key, Row]) -> list[float] | None:
    """Of the speedups of single questions."""
    ratios = [(a / b) * (c / d) for a, b, c, d in _pairs(rows, good, PLAIN, decoding)]
    return statistics.quartiles(ratios) if ratios else None


def _by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def work_of_others(rows: Sequence[Row]) -> dict[str, Any]:
    """How much other processes worked while the answers were timed, weighted by time, and whether that is busy."""
    seconds = [row.prefill_seconds + row.decode_seconds for row in rows if row.error is None]
    cores = [row.others for row in rows if row.error is None]
    mean = sum(s * c for s, c in zip(seconds, cores, strict=True)) / sum(seconds) if sum(seconds) else 0.0
    return {"cores": mean, "most": max(cores, default=0.0), "busy": mean > BUSY}


def failed(entries: Iterable[Mapping[str, Any]], own: Sequence[str]) -> bool:
    """Whether an own method gave an answer unlike plain decoding's, or none."""
    return any((entry["different"] or entry["errors"]) and entry["method"] in own for entry in entries)
