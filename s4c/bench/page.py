"""`report.html`: all of a run on one page, with nothing to fetch, in light and dark, on screens of any width."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from s4c.bench.plots import pictures
from s4c.bench.report import differences, facts, tables, warnings

TEMPLATE = Path(__file__).with_name("page.html")


def page(summary: Mapping[str, Any]) -> str:
    """The page of a run, from its summary."""
    places = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return places.get_template(TEMPLATE.name).render(
        target=summary["settings"]["target"],
        date=summary["parts"][-1]["date"],
        warnings=warnings(summary),
        pictures=pictures(summary),
        tables=tables(summary),
        differences=differences(summary),
        facts=facts(summary),
    )
