"""The figures of the page: SVG that takes its colours and its font from the page around it.

They are drawn narrow, so that a telephone shows them as they are and a screen sets them side by side. The colours below
stand for the page's variables and are put in their place in the finished SVG; legends are the page's too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s4c.bench.contestants import PLAIN

Entry = Mapping[str, Any]

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{index:02d}" for index in range(8))
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
WIDTH = 4.6
"""Inches; at 72 points each a little less than a telephone is wide."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Picture:
    """A figure for the page.

    Attributes:
        legend: label and number of the colour of each series.
        svg: the drawing, without width and height.
    """

    name: str
    title: str
    legend: Sequence[tuple[str, int]]
    svg: str


def pictures(summary: Mapping[str, Any]) -> list[Picture]:
    """The figures that a run has the data for."""
    entries = summary["entries"]
    colours = {method: i % len(SERIES) for i, method in enumerate(dict.fromkeys(e["method"] for e in entries))}
    timed = [entry for entry in entries if entry.get("speedup")]
    drafted = [entry for entry in timed if entry["method"] != PLAIN]
    temperatures = sorted({entry["temperature"] for entry in drafted})
    found = [_by_category([e for e in drafted if e["temperature"] == t], t, colours) for t in temperatures]
    if len(temperatures) > 1:
        found.append(_by_temperature(drafted, colours))
    sized = [entry for entry in entries if entry["nodes"] and entry["mal"]]
    if sized:
        found.append(_by_nodes(sized))
    told = [entry for entry in timed if entry["round_ms"]]
    if told:
        found.append(_round_times(told))
    if summary.get("pass_ms"):
        found.append(_passes(summary["pass_ms"]))
    return found


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _by_category(entries: Sequence[Entry], temperature: float, colours: Mapping[str, int]) -> Picture:
    """A line for each category, on it a mark and an interval for each method."""
    names = list(dict.fromkeys(name for entry in entries for name in entry["speedup_by_category"]))
    lines = ["all", *names]
    with mpl.rc_context(STYLE):
        figure, axes = _axes(0.9 + len(lines) * (0.16 + 0.13 * len(entries)))
        for number, entry in enumerate(entries):
            values = {"all": entry["speedup"], **entry["speedup_by_category"]}
            at = [(line, values[name]) for line, name in enumerate(lines) if values.get(name)]
            shift = 0.66 * ((number + 0.5) / len(entries) - 0.5)
            middle = [estimate["value"] for _, estimate in at]
            axes.errorbar(
                middle,
                [line + shift for line, _ in at],
                xerr=_errors([estimate for _, estimate in at]),
                fmt="o",
                color=SERIES[colours[entry["method"]]],
                elinewidth=1.4,
            )
        axes.axvline(1, color=MUTED, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("speedup over plain decoding, 95% interval")
    name = f"speedup-by-category-{temperature:g}".replace(".", "-")
    legend = [(entry["method"], colours[entry["method"]]) for entry in entries]
    return _picture(figure, name, f"Speedup by category, temperature {temperature:g}", legend)


def _errors(estimates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Distances to the ends of the intervals, lower ones first."""
    return [[e["value"] - e["low"] for e in estimates], [e["high"] - e["value"] for e in estimates]]


def _by_temperature(entries: Sequence[Entry], colours: Mapping[str, int]) -> Picture:
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    with mpl.rc_context(STYLE):
        figure, axes = _axes(2.9)
        for method in methods:
            mine = sorted((e for e in entries if e["method"] == method), key=lambda e: float(e["temperature"]))
            axes.errorbar(
                [entry["temperature"] for entry in mine],
                [entry["speedup"]["value"] for entry in mine],
                yerr=_errors([entry["speedup"] for entry in mine]),
                fmt="o-",
                color=SERIES[colours[method]],
                elinewidth=1.2,
                capsize=3,
            )
        axes.axhline(1, color=MUTED, linewidth=1, linestyle="--")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("temperature")
        axes.set_ylabel("speedup, 95% interval")
    return _picture(figure, "speedup-by-temperature", "Speedup against temperature", [(m, colours[m]) for m in methods])


def _by_nodes(entries: Sequence[Entry]) -> Picture:
    """A line for each drafter and temperature that ran with several trees; marks where none did."""
    groups: dict[str, list[Entry]] = {}
    several = len({entry["temperature"] for entry in entries}) > 1
    for entry in entries:
        label = entry["method"].partition("@")[0] + (f", temperature {entry['temperature']:g}" if several else "")
        groups.setdefault(label, []).append(entry)
    lines = {label: group for label, group in groups.items() if len({entry["nodes"] for entry in group}) > 1}
    groups = lines or groups
    with mpl.rc_context(STYLE):
        figure, axes = _axes(2.9)
        for number, group in enumerate(groups.values()):
            mine = sorted(group, key=lambda e: int(e["nodes"]))
            axes.errorbar(
                [entry["nodes"] for entry in mine],
                [entry["mal"]["value"] for entry in mine],
                yerr=_errors([entry["mal"] for entry in mine]),
                fmt="o-",
                color=SERIES[(number + 1) % len(SERIES)],
                elinewidth=1.2,
                capsize=3,
            )
        axes.set_xlim(0, 1.08 * max(entry["nodes"] for group in groups.values() for entry in group))
        axes.set_ylim(bottom=min(1, axes.get_ylim()[0]))
        axes.grid()
        axes.set_xlabel("most nodes of a tree, the root included")
        axes.set_ylabel("tokens a pass (MAL)")
    legend = [(label, (number + 1) % len(SERIES)) for number, label in enumerate(groups)]
    return _picture(figure, "acceptance-by-nodes", "Acceptance length against tree size", legend)


def _round_times(entries: Sequence[Entry]) -> Picture:
    steps = list(entries[0]["round_ms"])
    several = len({entry["temperature"] for entry in entries}) > 1
    labels = [_broken(e["method"]) + (f"\nat {e['temperature']:g}" if several else "") for e in entries]
    with mpl.rc_context(STYLE):
        lines = max(label.count("\n") + 1 for label in labels)
        figure, axes = _axes(0.9 + (0.16 + 0.18 * lines) * len(entries))
        left = [0.0] * len(entries)
        for number, step in enumerate(steps):
            widths = [entry["round_ms"][step] for entry in entries]
            axes.barh(range(len(entries)), widths, left=left, height=0.62, color=SERIES[number])
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(entries)), labels)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_xlabel("milliseconds a round")
    legend = list(zip(steps, range(len(steps)), strict=True))
    return _picture(figure, "round-times", "Where a round's time goes", legend)


def _broken(method: str) -> str:
    """A method's name with its options on lines of their own."""
    return method.replace("@", "\n@")


def _passes(costs: Mapping[str, float]) -> Picture:
    tokens = [int(count) for count in costs]
    with mpl.rc_context(STYLE):
        figure, axes = _axes(2.9)
        axes.plot(tokens, list(costs.values()), "o-", color=SERIES[0])
        axes.set_xticks(tokens, [str(count) if count != 2 else "" for count in tokens])
        axes.set_xlim(0, 1.05 * max(tokens))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.set_xlabel("tokens of a pass")
        axes.set_ylabel("milliseconds")
    return _picture(figure, "cost-of-a-pass", "Cost of a pass against its tokens", [])


def _picture(figure: Figure, name: str, title: str, legend: Sequence[tuple[str, int]]) -> Picture:
    drawn = io.StringIO()
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[^"]*"', "", svg, count=2)  # those of the drawing itself come first
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # one page holds several drawings
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Picture(name, title, legend, svg)
