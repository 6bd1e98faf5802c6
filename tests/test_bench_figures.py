"""The arithmetic of the bench on hand-made numbers, two runs side by side, scores, and what a page says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny_models
from typer.testing import CliRunner

from s4c.bench import statistics
from s4c.bench.compare import compare_runs
from s4c.bench.contestants import PLAIN
from s4c.bench.machine import BUSY, Footprint, OtherWork, provenance
from s4c.bench.quality import final_number, scored, with_numbers
from s4c.bench.questions import Question
from s4c.bench.report import facts, interval, markdown, tables, warnings
from s4c.bench.run import Row
from s4c.bench.statistics import Estimate, acceptance, added, quartiles, quotient
from s4c.bench.store import Store, read_rows, read_run
from s4c.bench.summary import committed, summarise, work_of_others
from s4c.cli.main import app


def row(question: str, method: str, tokens: int, seconds: float, **more: Any) -> Row:
    values: dict[str, Any] = {
        "token_ids": list(range(tokens)),
        "decode_tokens": tokens,
        "decode_seconds": seconds,
        "prefill_seconds": 1.0,
        "prompt_tokens": 10,
        "histogram": [tokens],
        "equal": "" if method == PLAIN else "identical",
    }
    return Row(question, more.pop("category", "qa"), 0, more.pop("temperature", 0.0), 0, method, **{**values, **more})


# Statistics


def test_a_quotient_is_pooled() -> None:
    assert quotient([(10, 1), (30, 1)]).value == pytest.approx(20)
    assert quotient([(10, 5), (30, 11)]).value == pytest.approx(2.5)
    assert quotient([(10, 1, 1, 10), (30, 1, 5, 30)]).value == pytest.approx(3)


def test_one_question_has_no_interval_and_equal_ones_an_empty_one() -> None:
    assert quotient([(4, 2)]) == Estimate(2, 2, 2)
    assert quotient([(4, 2)] * 5) == Estimate(2, 2, 2)


def test_the_interval_is_that_of_all_resamples() -> None:
    """Of two questions a resample is (a, a), (a, b), (b, a) or (b, b): a quarter lies at each end."""
    assert quotient([(1, 1), (3, 1)]) == Estimate(2, 1, 3)


def test_the_interval_covers_the_truth_and_shrinks_with_the_square_root() -> None:
    import numpy as np

    numbers, covered, widths = np.random.default_rng(1), 0, {}
    for count in (50, 200):
        for _ in range(60):
            estimate = quotient([(x, 1.0) for x in numbers.normal(10, 2, count)])
            covered += estimate.low <= 10 <= estimate.high
            widths.setdefault(count, []).append(estimate.high - estimate.low)
    assert 0.88 * 120 <= covered <= 120  # a fair 95% interval covers fewer than 106 of 120 with chance 0.004
    assert np.mean(widths[50]) == pytest.approx(2 * 1.96 * 2 / 50**0.5, rel=0.1)
    assert np.mean(widths[50]) / np.mean(widths[200]) == pytest.approx(2, rel=0.1)


def test_resamples_are_the_same_every_time() -> None:
    rows = [(float(n), 1.0) for n in range(10)]
    first = quotient(rows)
    statistics._draws.cache_clear()
    assert quotient(rows) == first


def test_a_histogram_gives_length_and_acceptance() -> None:
    histogram = [2, 3, 5]
    assert committed(replace(row("1", "fast", 23, 1.0), histogram=histogram)) == (2 * 1 + 3 * 2 + 5 * 3, 10)
    given, reached = acceptance(histogram)
    assert given == pytest.approx([8 / 10, 5 / 8])
    assert reached == pytest.approx([8 / 10, 5 / 10])
    assert acceptance([4]) == ([], [])
    assert added([[1], [0, 2], []]) == [1, 2]
    assert quartiles([1, 2, 3, 4, 5]) == [2, 3, 4]


# The summary


def test_the_summary_pools_and_compares_in_place() -> None:
    rows = [
        row("1", PLAIN, 10, 1.0),
        row("2", PLAIN, 30, 5.0, category="rag"),
        row("1", "fast", 10, 1.0, histogram=[0, 5]),
        row("2", "fast", 30, 1.0, histogram=[2, 5, 6], category="rag", steps={"draft": 0.2, "verify": 0.6}),
        row("1", "hf", 10, 2.0, histogram=None),
        row("2", "hf", 30, 5.0, category="rag", histogram=None),
    ]
    plain, fast, hf = summarise(rows, timed=True)
    assert fast["tokens_per_second"] == pytest.approx(20)
    assert fast["tokens_per_second_with_prefill"] == pytest.approx(10)
    assert fast["speedup"]["value"] == pytest.approx(3)
    assert fast["speedup_with_prefill"]["value"] == pytest.approx((40 / 4) / (40 / 8))
    assert fast["speedup_over_peer"]["value"] == pytest.approx((40 / 2) / (40 / 7))
    assert {name: e["value"] for name, e in fast["speedup_by_category"].items()} == pytest.approx({"qa": 1, "rag": 5})
    assert fast["quartiles"] == pytest.approx([2, 3, 4])
    assert fast["mal"]["value"] == pytest.approx(40 / 18)
    assert fast["histogram"] == [2, 10, 6]
    assert fast["round_ms"] == pytest.approx({"draft": 200 / 18, "verify": 600 / 18})
    assert hf["mal"] is None
    assert plain["speedup"]["value"] == 1
    assert "speedup" not in summarise(rows, timed=False)[0]


def test_the_last_row_of_an_answer_counts_and_errors_stay_apart() -> None:
    failed = Row("1", "qa", 0, 0.0, 0, "peer", error="OSError: gone")
    entry = summarise([row("1", PLAIN, 5, 1.0), failed, row("1", "peer", 5, 1.0)], timed=True)[1]
    assert (entry["answers"], entry["errors"]) == (1, [])
    entry = summarise([row("1", PLAIN, 5, 1.0), failed], timed=True)[1]
    assert (entry["answers"], entry["errors"]) == (0, ["question 1: OSError: gone"])


def test_work_of_others_is_weighted_by_time() -> None:
    rows = [row("1", PLAIN, 5, 1.0, others=0.0), row("2", PLAIN, 5, 5.0, others=0.4)]
    assert work_of_others(rows)["cores"] == pytest.approx((2 * 0.0 + 6 * 0.4) / 8)
    assert work_of_others(rows)["busy"] is (BUSY < 0.3)
    assert not work_of_others(rows[:1])["busy"]


# Folders


def store(folder: Path, rows: list[Row], **settings: Any) -> Path:
    with Store(folder, {"timed": True, **settings}, {"commit": "abc"}) as kept:
        for each in rows:
            kept.add(each)
    return folder


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    rows = [row("1", PLAIN, 3, 0.25), replace(row("1", "x", 3, 0.1), steps={"draft": 0.5}, memory=7)]
    assert read_rows(store(tmp_path / "a", rows) / "results.jsonl") == rows
    with Store(tmp_path / "a", {"timed": True}, {"commit": "def"}, resume=True) as kept:
        assert kept.rows == rows
        with pytest.raises(ValueError, match="another process writes"):
            Store(tmp_path / "a", {"timed": True}, {}, resume=True)
    assert [part["commit"] for part in read_run(tmp_path / "a")["parts"]] == ["abc", "def"]
    (tmp_path / "a" / "results.jsonl").write_text('{"question": "1"}\n')
    with pytest.raises(ValueError, match="line 1 is no row"):
        read_rows(tmp_path / "a" / "results.jsonl")


def test_two_runs_are_compared_on_what_both_have(tmp_path: Path) -> None:
    before, after = [], []
    for number in range(20):
        slow = 1 + number / 10
        before += [row(str(number), PLAIN, 10, slow), row(str(number), "x", 10, slow / 2, histogram=[0, 5])]
        after += [row(str(number), PLAIN, 10, slow), row(str(number), "x", 10, slow / 3, histogram=[0, 5])]
    after += [row("extra", PLAIN, 10, 99.0), row("extra", "x", 10, 1.0)]
    first, second = store(tmp_path / "a", before, threads=1), store(tmp_path / "b", after, threads=2)
    comparison = compare_runs(first, second)
    assert comparison["questions"] == 20
    assert comparison["settings"] == ["threads: 1 and 2"]
    figures = {(r["method"], r["figure"]): r for r in comparison["rows"]}
    assert set(figures) == {(PLAIN, "tokens/s"), ("x", "tokens/s"), ("x", "speedup"), ("x", "tokens a pass")}
    assert figures["x", "speedup"]["first"]["value"] == pytest.approx(2)
    assert figures["x", "speedup"]["second"]["value"] == pytest.approx(3)
    assert figures["x", "speedup"]["change"] == pytest.approx({"value": 1.5, "low": 1.5, "high": 1.5})
    assert figures["x", "speedup"]["verdict"] == "higher"
    assert figures[PLAIN, "tokens/s"]["verdict"] == figures["x", "tokens a pass"]["verdict"] == "within the noise"
    shown = CliRunner().invoke(app, ["bench", "compare", str(first), str(second)])
    assert shown.exit_code == 0
    assert "settings differ: threads" in shown.stdout
    assert json.loads(CliRunner().invoke(app, ["bench", "compare", str(first), str(second), "--json"]).stdout)
    nothing = CliRunner().invoke(app, ["bench", "compare", str(first), str(tmp_path)])
    assert nothing.exit_code == 2
    assert "holds no run of s4c bench" in nothing.stderr


def test_a_change_within_the_noise_is_called_so(tmp_path: Path) -> None:
    jitter = [0.8, 1.25, 1.1, 0.9, 1.05, 0.97, 1.2, 0.85]
    runs = []
    for name, factors in (("a", [1.0] * 8), ("b", jitter)):
        rows = [row(str(n), PLAIN, 10, 1.0) for n in range(8)]
        rows += [row(str(n), "x", 10, 0.5 * factor) for n, factor in enumerate(factors)]
        runs.append(store(tmp_path / name, rows))
    change = next(r for r in compare_runs(*runs)["rows"] if r["figure"] == "speedup")
    assert change["change"]["low"] < 1 < change["change"]["high"]
    assert change["verdict"] == "within the noise"


# Scores


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 5.", "5"),
        ("First 3, then 4,000.50 in all.", "4000.50"),
        ("a #### 12\n", "12"),
        ("7 #### -3 apples of 9", "-3"),
        ("costs $1,234,567.", "1234567"),
        ("none", None),
        ("about .5", "0.5"),
        ("He owes -$12.50.", "-12.50"),
        ("so \u22125, or 10-5", "5"),
        ("the set 1,2,3", "3"),
        ("so 1/2.", "0.5"),
        ("on 3/4/2020 it fell to 2.5", "2.5"),
        ("that is 3e5 metres", "300000"),
        ("**12.**", "12"),
        ("it grows to 1e99999999", "99999999"),
    ],
)
def test_the_final_number_of_an_answer(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_an_equal_score_does_not_hide_other_answers() -> None:
    questions = [Question(str(n), "math_reasoning", ("?",), references=(f"#### {n}",)) for n in (1, 2)]
    told = {PLAIN: ([1], [9]), "other": ([9], [2]), "same": ([1], [9])}
    rows = [
        Row(str(n), "math_reasoning", 0, 0.0, 0, method, token_ids=answers[n - 1], equal="" if method == PLAIN else "?")
        for method, answers in told.items()
        for n in (1, 2)
    ]
    scores = {s["method"]: s for s in scored(questions, rows, lambda tokens: f"It is {tokens[0]}.")}
    assert [scores[name]["right"] for name in told] == [1, 1, 1]
    assert [scores[name]["same_answers"] for name in told] == [2, 0, 2]
    warm = [replace(r, temperature=1.0, token_ids=[8]) for r in rows if r.method == PLAIN]
    warm += [replace(r, method="warm") for r in warm]
    told_apart = [(s["method"], s["temperature"], s["same_answers"]) for s in scored(questions, [*rows, *warm], str)]
    assert told_apart == [(PLAIN, 0, 2), ("other", 0, 0), ("same", 0, 2), (PLAIN, 1, 2), ("warm", 1, 2)]
    with pytest.raises(ValueError, match="no question has a reference with a number"):
        with_numbers([Question("1", "qa", ("?",), references=("blue",))])


def test_the_quality_command(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path, "llama", tokenizer=True, max_position_embeddings=512)
    args = ["bench", "quality", "--target", str(model), "--methods", "ngram", "--max-new-tokens", "8", "--threads", "1"]
    result = CliRunner().invoke(app, [*args, "--limit", "3", "--json"])
    assert result.exit_code == 0, result.output
    assert [(s["method"], s["same_answers"]) for s in json.loads(result.stdout)] == [(PLAIN, 3), ("ngram", 3)]
    assert "same answers as plain" in CliRunner().invoke(app, [*args, "--limit", "1"]).stdout


# Machine and words


def test_a_footprint_tells_what_is_held_and_the_peak() -> None:
    footprint = Footprint(held=1000)
    with footprint.watch():
        kept = bytearray(64 << 20)
    if footprint.peak is None:
        pytest.skip("the system does not tell the peak of the memory")
    assert footprint.held >= 60 << 20
    with footprint.watch():
        bytearray(64 << 20)
    assert footprint.peak >= 120 << 20
    assert len(kept)


def test_provenance_and_the_work_of_others_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OtherWork().look() >= 0
    counted = iter([0.0, 1e6])
    monkeypatch.setattr(OtherWork, "_seconds", lambda self: next(counted))
    assert OtherWork().look() == psutil.cpu_count()
    told = provenance()
    assert {"torch", "transformers", "s4c"} <= told["versions"].keys()
    assert told["machine"]["cores"] >= 1


def test_the_report_says_what_must_be_known() -> None:
    unlike = row("2", "x", 10, 1.0, equal="different: token 0 is 7 (1.00000) instead of 5 (2.00000)", others=0.9)
    rows = [row("1", PLAIN, 10, 1.0, others=0.9), row("2", PLAIN, 10, 1.0, others=0.9), row("1", "x", 10, 0.5), unlike]
    summary = {
        "complete": False,
        "answers": 4,
        "expected": 6,
        "questions": 3,
        "categories": ["qa"],
        "own": [PLAIN, "x"],
        "entries": summarise(rows, timed=True, nodes={"x": 9}),
        "skipped": {"llama.cpp": "llama-cpp-python is not installed: pip install llama-cpp-python"},
        "others": work_of_others(rows),
        "load": {"before": [0, 0, 0], "after": [1, 1, 1]},
        "pass_ms": {"1": 10.0, "2": 11.0},
        "settings": {
            "target": "t",
            "fingerprint": "f" * 64,
            "dtype": "float32",
            "device": "cpu",
            "runtime": "native",
            "turns": 1,
            "max_new_tokens": 9,
            "top_p": 1.0,
            "seed": 0,
            "timed": True,
            "repeats": 1,
            "by_round": False,
            "threads": 2,
        },
        "parts": [provenance()],
    }
    said = " ".join(warnings(summary))
    for words in ("Partial: 4 of 6 answers", "Busy machine", "NOT EQUAL: x at temperature 0"):
        assert words in said
    titles = [table.title for table in tables(summary)]
    assert titles[:2] == ["Speed", "Speedup by category"]
    assert titles[-1] == "Skipped"
    text = markdown(summary)
    assert "question 2: different: token 0 is 7 (1.00000) instead of 5 (2.00000)" in text
    assert dict(facts(summary))["threads"] == "2"
    assert interval(None) not in interval({"value": 1.0, "low": 0.5, "high": 2.0}) == "1.00 [0.50, 2.00]"


def test_the_work_of_a_helper_is_not_that_of_others() -> None:
    """A process that spins for a second of its CPU counts with others, unless it is named as a helper."""
    spin = "import time\nwhile time.process_time() < 1.2: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        stranger, ours = OtherWork(), OtherWork([process.pid])
        deadline = time.monotonic() + 60
        while sum(psutil.Process(process.pid).cpu_times()[:2]) < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stranger.look() - ours.look() > 0
        assert stranger._seconds() - ours._seconds() > 0.9
        process.communicate(b"\n")
    assert OtherWork([process.pid])._seconds() == pytest.approx(OtherWork()._seconds(), abs=0.5)
