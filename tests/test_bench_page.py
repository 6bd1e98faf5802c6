"""The page in a real browser: tables and figures are there, and nothing overlaps, is cut off or is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from s4c.bench.contestants import PLAIN
from s4c.bench.machine import provenance
from s4c.bench.page import page
from s4c.bench.run import Row
from s4c.bench.summary import summarise, work_of_others

NAMES = ("chromium", "chromium-browser", "google-chrome")
METHODS = ("auto", "ngram", "shipped@best:8", "shipped@best:24", "shipped@comb:3x3@rule=rejection", "hf")
CATEGORIES = ("mt_bench", "translation", "summarization", "math_reasoning")

OVERFLOWING = """() => [...document.querySelectorAll('body *')].filter(e => !e.closest('svg')).filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > innerWidth + 1 || box.left < -1);
}).map(e => e.outerHTML.slice(0, 80))"""

CUT_OFF = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1
            || box.bottom > frame.bottom + 1;
    }).map(text => text.textContent);
})"""

OVERLAPPING = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    return texts.flatMap(([name, a], i) => texts.slice(i + 1).filter(([, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4).map(([other]) => name + ' | ' + other));
})"""


def summary() -> dict[str, Any]:
    """Of a run with everything in it: temperatures, trees, a skipped peer, one that died, an answer that differs."""
    rows = []
    for temperature in (0.0, 0.6, 1.0):
        for number in range(12):
            for place, method in enumerate((PLAIN, *METHODS)):
                own = method not in (PLAIN, "hf")
                row = Row(str(number), CATEGORIES[number % 4], 0, temperature, 0, method, prompt_tokens=50)
                rows.append(
                    replace(
                        row,
                        token_ids=[1] * 64,
                        decode_tokens=64,
                        prefill_seconds=0.2,
                        decode_seconds=2.0 / (1 + 0.3 * place * own) * (1 + 0.05 * (number % 3)),
                        histogram=[4, 6, 4 + place, 3, 2] if own else [64] if method == PLAIN else None,
                        steps={"draft": 0.2 * own, "verify": 1.0, "judge": 0.1, "commit": 0.02, "schedule": 0.01},
                        memory=900 << 20,
                        equal="" if method == PLAIN else "identical",
                        others=0.5,
                    )
                )
    rows[1] = replace(rows[1], equal="different: token 3 is 7 (1.25000) instead of 9 (2.50000)")
    rows.append(Row("0", "mt_bench", 0, 0.0, 0, "llama.cpp-q4_1", error="ChildProcessError: ended by SIGSEGV"))
    nodes = {"auto": 10, "ngram": 9, "shipped@best:8": 8, "shipped@best:24": 24, "shipped@comb:3x3@rule=rejection": 10}
    settings = {"target": "smollm2-135m", "fingerprint": "f" * 64, "dtype": "float32", "device": "cpu", "turns": 1}
    settings |= {"runtime": "native", "max_new_tokens": 64, "top_p": 1.0, "seed": 0, "timed": True}
    settings |= {"repeats": 1, "by_round": False}
    return {
        "complete": False,
        "answers": len(rows) - 1,
        "expected": 300,
        "questions": 12,
        "categories": list(CATEGORIES),
        "own": [PLAIN, *METHODS[:-1]],
        "entries": summarise(rows, timed=True, nodes=nodes),
        "skipped": {"openai=http://localhost:8000/v1": "no server answers at http://localhost:8000/v1/models"},
        "others": work_of_others(rows),
        "load": {"before": [0.1, 0.2, 0.3], "after": [1.0, 0.5, 0.4]},
        "pass_ms": {"1": 10.0, "2": 10.1, "4": 10.5, "8": 11.0, "16": 12.5, "32": 20.0},
        "settings": {**settings, "threads": 2},
        "parts": [provenance()],
    }


def test_the_page_is_whole_and_asks_nobody(tmp_path: Path) -> None:
    text = page(summary())
    assert "http://www.w3.org" in text
    assert "<script" not in text
    assert 'src="' not in text
    assert "url(http" not in text
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert "&lt;b&gt;" in page({**summary(), "skipped": {"<b>": "x"}})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    with playwright.sync_playwright() as driver:
        try:
            chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: apt-get install chromium, or playwright install chromium ({error.message[:80]})")
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    (tmp_path / "report.html").write_text(page(summary()), encoding="utf-8")
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    errors: list[str] = []
    view.on("request", lambda request: requests.append(request.url))
    view.on("console", lambda message: errors.append(message.text))
    view.goto((tmp_path / "report.html").as_uri())
    assert len(requests) == 1
    assert errors == []
    titles = view.locator("h2").all_inner_texts()
    for title in ("Speed", "Speedup by category", "Speedup by temperature", "Equality", "Acceptance", "Skipped"):
        assert title in titles
    figures = view.locator("figcaption").all_inner_texts()
    for title in ("Speedup by category, temperature 0", "Speedup against temperature", "Where a round's time goes"):
        assert title in figures
    assert "Acceptance length against tree size" in figures
    assert "Cost of a pass against its tokens" in figures
    assert len(figures) == view.locator("figure svg:visible").count() == 7
    assert all(box["height"] > 100 for svg in view.locator("svg").all() if (box := svg.bounding_box()))
    speed = view.locator("section", has=view.get_by_role("heading", name="Speed", exact=True))
    assert speed.locator("tbody tr").count() == 3 * (1 + len(METHODS))
    assert view.get_by_text("NOT EQUAL: auto at temperature 0").is_visible()
    assert view.get_by_text("token 3 is 7 (1.25000) instead of 9 (2.50000)").is_visible()
    assert view.evaluate(OVERFLOWING) == []
    assert view.evaluate(CUT_OFF) == []
    assert view.evaluate(OVERLAPPING) == []
    paper, ink = (
        sum(map(int, view.evaluate(f"getComputedStyle({where})['{what}']")[4:-1].split(",")))
        for where, what in (("document.body", "background-color"), ("document.querySelector('svg text')", "fill"))
    )
    assert (paper > 600 and ink < 200) if scheme == "light" else (paper < 200 and ink > 600)
    view.close()
