"""`s4c bench compare`: two runs side by side, and which differences exceed the noise.

s4c bench compare runs/before runs/after
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from s4c.cli import options


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.", show_default=False)],
    second: Annotated[Path, typer.Argument(help="Folder of another one.", show_default=False)],
    as_json: options.Json = False,
) -> None:
    """Set two runs side by side, on the questions that both asked."""
    from s4c.bench.compare import compare_runs
    from s4c.bench.report import interval

    comparison = compare_runs(first, second)
    if as_json:
        typer.echo(json.dumps(comparison))
        return
    console = options.console()
    for line in comparison["settings"]:
        console.print(f"settings differ: {line}", markup=False, soft_wrap=True)
    table = Table("method", "temp.", "figure", str(first), str(second), "second over first", "verdict")
    for row in comparison["rows"]:
        cells = [interval(row[name]) for name in ("first", "second", "change")]
        table.add_row(row["method"], f"{row['temperature']:g}", row["figure"], *cells, row["verdict"])
    console.print(table)
    console.print(
        f"{comparison['questions']} questions in common. Intervals are 95%, of a bootstrap over questions. Speeds of "
        "plain decoding itself also change with whatever else the machine did; speedups change less with it.",
        soft_wrap=True,
    )
