"""A run in words and tables, from its `summary.json`: what the terminal, `report.md` and `report.html` show alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s4c.bench.contestants import PLAIN
from s4c.bench.peers import SECOND_BASELINE

Entry = Mapping[str, Any]
NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Table:
    """A titled table; the first column names the row.

    Attributes:
        note: what the figures mean.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """The tables of a run, the most wanted first; those with nothing to say are left out."""
    entries = summary["entries"]
    makers = [_equality, _acceptance, _mal_by_category, _rounds]
    if summary["settings"]["timed"]:
        makers = [_speed, _by_category, _by_temperature, *makers]
        makers += [_round_times]
    found = [maker(entries) for maker in makers]
    if summary.get("pass_ms"):
        found.append(_passes(summary["pass_ms"]))
    if summary["skipped"]:
        skipped = [[name, reason] for name, reason in summary["skipped"].items()]
        found.append(Table("Skipped", ["peer", "reason"], skipped))
    return [table for table in found if table.rows]


def label(entry: Entry) -> list[str]:
    return [entry["method"], f"{entry['temperature']:g}"]


def interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return NOTHING
    value, ends = f"{estimate['value']:.2f}", f"[{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return value if ends == f"[{value}, {value}]" else f"{value} {ends}"


def number(value: float | None, form: str = ".1f") -> str:
    return NOTHING if value is None else format(value, form)


def _timed(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if "tokens_per_second" in entry]


def _speed(entries: Sequence[Entry]) -> Table:
    second = any(entry["method"] == SECOND_BASELINE for entry in entries)
    header = ["method", "temp.", "tokens/s", "speedup", "quartiles", "with prefill, tokens/s", "speedup with prefill"]
    header += [f"over {SECOND_BASELINE}", f"over {SECOND_BASELINE} with prefill"] if second else []
    rows = []
    for e in _timed(entries):
        row = [*label(e), number(e["tokens_per_second"]), interval(e["speedup"])]
        row.append(NOTHING if e["quartiles"] is None else " / ".join(f"{q:.2f}" for q in e["quartiles"]))
        row += [number(e["tokens_per_second_with_prefill"]), interval(e["speedup_with_prefill"])]
        row += [interval(e["speedup_over_peer"]), interval(e["speedup_over_peer_with_prefill"])] if second else []
        rows.append([*row, number(e["memory"] and e["memory"] / 2**20, ".0f")])
    note = (
        "Tokens per second of decoding alone, and with the prefill. Speedup: over plain decoding of this engine, all "
        "tokens over all seconds of the same questions; in brackets the 95% interval of a bootstrap over questions; "
        "quartiles are those of single questions. Memory: what a method takes at most beside Python and its libraries."
    )
    if second:
        note += f" The columns over {SECOND_BASELINE} take transformers' generate as the baseline instead."
    return Table("Speed", [*header, "memory, MB"], rows, note)


def _categories(entries: Sequence[Entry], field: str) -> list[str]:
    return list(dict.fromkeys(category for entry in entries for category in entry.get(field) or {}))


def _by_category(entries: Sequence[Entry]) -> Table:
    shown = [entry for entry in _timed(entries) if entry["method"] != PLAIN]
    names = _categories(shown, "speedup_by_category")
    rows = [
        [*label(e), interval(e["speedup"]), *(interval(e["speedup_by_category"].get(name)) for name in names)]
        for e in shown
    ]
    return Table("Speedup by category", ["method", "temp.", "all", *names], rows)


def _by_temperature(entries: Sequence[Entry]) -> Table:
    shown = [entry for entry in _timed(entries) if entry["method"] != PLAIN]
    temperatures = sorted({entry["temperature"] for entry in shown})
    cells = {(entry["method"], entry["temperature"]): entry["speedup"] for entry in shown}
    methods = dict.fromkeys(entry["method"] for entry in shown) if len(temperatures) > 1 else {}
    rows = [[method, *(interval(cells.get((method, t))) for t in temperatures)] for method in methods]
    return Table("Speedup by temperature", ["method", *(f"{t:g}" for t in temperatures)], rows)


def _equality(entries: Sequence[Entry]) -> Table:
    rows = [
        [*label(e), str(e["answers"]), str(e["tokens"])]
        + [str(n) for n in (e["identical"], len(e["ties"]), len(e["different"]), e["not_asked"], len(e["errors"]))]
        for e in entries
    ]
    for row in rows:
        if row[0] == PLAIN:
            row[4:8] = [NOTHING] * 4
    header = ["method", "temp.", "answers", "tokens", "identical", "ties", "different", "not asked", "failed"]
    note = (
        "Against plain decoding, token for token. A tie: the two tokens' scores lie so close that another order of the "
        "same sums decides; the native runtime has none. Peers share our noise at temperature 0 alone, and the "
        "rejection rule promises the law and not the tokens above it: there equality is not asked."
    )
    return Table("Equality", header, rows, note)


def _acceptance(entries: Sequence[Entry]) -> Table:
    told = [e for e in entries if e["mal"] is not None and len(e["histogram"]) > 1]
    depths = max((len(e["acceptance"]["given"]) for e in told), default=0)
    rows = []
    for e in told:
        for kind in ("given", "reached"):
            shares = [number(share, ".0%") for share in e["acceptance"][kind]]
            head = [*label(e), number(e["nodes"], "d"), interval(e["mal"])] if kind == "given" else ["", "", "", ""]
            rows.append([*head, kind, *shares, *[""] * (depths - len(shares))])
    header = ["method", "temp.", "nodes", "MAL", "depth", *map(str, range(1, depths + 1))]
    note = (
        "MAL, mean acceptance length: tokens that a pass commits, the bonus included. Below each depth of the tree the "
        "share of rounds that accepted a token there, given that the one above was accepted, and of all rounds."
    )
    return Table("Acceptance", header, rows, note)


def _mal_by_category(entries: Sequence[Entry]) -> Table:
    told = [e for e in entries if e["mal"] is not None and len(e["histogram"]) > 1]
    names = _categories(told, "mal_by_category")
    rows = [
        [*label(e), number(e["mal"]["value"], ".2f")]
        + [number((e["mal_by_category"].get(name) or {}).get("value"), ".2f") for name in names]
        for e in told
    ]
    return Table("Mean acceptance length by category", ["method", "temp.", "all", *names], rows)


def _rounds(entries: Sequence[Entry]) -> Table:
    told = [e for e in entries if e["mal"] is not None and len(e["histogram"]) > 1]
    most = max((len(e["histogram"]) for e in told), default=0)
    rows = []
    for e in told:
        total = sum(e["histogram"])
        shares = [f"{count / total:.1%}" for count in e["histogram"]]
        rows.append([*label(e), str(total), *shares, *[""] * (most - len(shares))])
    header = ["method", "temp.", "rounds", *map(str, range(1, most + 1))]
    return Table("Rounds by the tokens that they commit", header, rows)


def _round_times(entries: Sequence[Entry]) -> Table:
    told = [entry for entry in _timed(entries) if entry["round_ms"]]
    steps = list(told[0]["round_ms"]) if told else []
    rows = []
    for e in told:
        total = sum(e["round_ms"].values())
        rows.append([*label(e), f"{total:.2f}", *(f"{e['round_ms'][step] / total:.1%}" for step in steps)])
    return Table("Where a round's time goes", ["method", "temp.", "ms a round", *steps], rows)


def _passes(costs: Mapping[str, float]) -> Table:
    rows = [[tokens, f"{cost:.2f}"] for tokens, cost in costs.items()]
    return Table("Cost of a pass against its tokens", ["tokens", "ms"], rows)


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """What must be known before a figure is believed."""
    found = []
    if not summary["complete"]:
        found.append(f"Partial: {summary['answers']} of {summary['expected']} answers; --resume goes on.")
    others = summary["others"]
    if summary["settings"]["timed"] and others["busy"]:
        found.append(
            f"Busy machine: other processes kept {others['cores']:.2f} cores busy on average (at most "
            f"{others['most']:.2f}) while answers were timed. Speeds are not to be trusted."
        )
    for entry in summary["entries"]:
        if entry["different"] and entry["method"] in summary["own"]:
            found.append(f"NOT EQUAL: {entry['method']} at temperature {entry['temperature']:g} differs from plain.")
        if entry["errors"]:
            found.append(f"Failed: {entry['method']}, {entry['errors'][0]}")
    return found


def differences(summary: Mapping[str, Any]) -> list[str]:
    """Every answer that is not identical to plain decoding's, with both scores."""
    return [
        f"{entry['method']}, temperature {entry['temperature']:g}, {line}"
        for entry in summary["entries"]
        for line in [*entry["ties"], *entry["different"]]
    ]


def facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, how and where: name and value."""
    s, part, others = summary["settings"], summary["parts"][-1], summary["others"]
    machine, load = part["machine"], summary["load"]
    found = [
        ("target", f"{s['target']} ({s['fingerprint'][:12]}), {s['dtype']} on {s['device']}, runtime {s['runtime']}"),
        ("questions", f"{summary['questions']} ({', '.join(summary['categories'])}), at most {s['turns']} turns each"),
        ("answers", f"at most {s['max_new_tokens']} new tokens; top-p {s['top_p']:g}; seed {s['seed']}"),
    ]
    if s["timed"]:
        order = "a round of each method in turn, peers at once" if s["by_round"] else "every method in turn"
        found += [
            ("order", f"on each question {order}, in seeded order, {s['repeats']} times; a warm-up first"),
            ("counting", "one function for all: output tokens up to and including the end-of-sequence token"),
            (
                "prefill",
                "this engine and llama.cpp: the prompt but its last token; other peers: up to the first token, which "
                "then does not count as decoded",
            ),
            ("peers", "each in a process of its own, with the same prompt tokens, stop rules and number of threads"),
        ]
    else:
        found.append(("order", f"each method in batches of {s['batch']}; nothing is timed"))
    found += [
        ("threads", str(s["threads"])),
        (
            "load",
            f"averages {load['before']} before and {load['after']} after; others used {others['cores']:.2f} cores",
        ),
        (
            "machine",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}"
            + (f"; {machine['gpu']}, CUDA {machine['cuda']}" if "gpu" in machine else ""),
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in part["versions"].items())),
        ("commit", ", ".join(dict.fromkeys(str(p["commit"]) for p in summary["parts"]))),
        ("date", part["date"] if len(summary["parts"]) == 1 else f"{summary['parts'][0]['date']} to {part['date']}"),
        ("command", part["command"]),
    ]
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# s4c bench", ""]
    lines += [f"**{warning}**\n" for warning in warnings(summary)]
    for table in tables(summary):
        lines += [f"## {table.title}", "", _line(table.header), _line(["---"] * len(table.header))]
        lines += [*map(_line, table.rows), ""]
        lines += [table.note, ""] if table.note else []
    unlike = differences(summary)
    if unlike:
        lines += ["## Answers unlike plain decoding's", "", *(f"- {line}" for line in unlike), ""]
    lines += ["## How it was measured", ""]
    lines += [f"- {name}: `{value}`" if name == "command" else f"- {name}: {value}" for name, value in facts(summary)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
