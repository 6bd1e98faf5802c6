"""`s4c bench quality`: the same answers, not just the same score.

s4c bench quality --questions spec_bench.jsonl --methods auto,ngram
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from s4c.cli import options


@options.asking_how
def quality(
    questions: Annotated[
        Path | None,
        typer.Option(help="JSONL of questions whose references end in a number.", show_default="a set of s4c's own"),
    ] = None,
    categories: Annotated[str, typer.Option(help="Kinds of questions, with commas between.")] = "math_reasoning",
    sample: Annotated[int | None, typer.Option(help="Questions to draw, by the seed.", show_default="all")] = None,
    limit: Annotated[int | None, typer.Option(help="No more than the first N.", show_default="all")] = None,
    methods: Annotated[str, typer.Option(help="As for `s4c bench`.")] = "auto,ngram",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 8,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    target: options.Target = options.DEFAULT_TARGET,
    *,
    how: options.How,
    as_json: options.Json = False,
) -> None:
    """Score plain and speculative decoding by the final number of each answer; code 1 where answers differ."""
    from s4c.cli.bench import build_methods, chosen, progress

    options.start()
    from s4c.bench.quality import scored, with_numbers
    from s4c.bench.report import label
    from s4c.bench.run import Bench
    from s4c.types import SamplingParams

    asked = with_numbers(chosen(questions, categories, sample, limit, seed))
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    llm = options.load(target, "none", how, max_batch=batch)
    bench = Bench(llm, build_methods(llm, methods), params, [temperature])
    bench.check(asked)
    rows = []
    with progress() as bar:
        task = bar.add_task("answers", total=bench.answers(asked))
        for row in bench.run_batched(asked):
            rows.append(row)
            bar.advance(task)
    scores = scored(asked, rows, llm.decode)
    if as_json:
        typer.echo(json.dumps(scores))
    else:
        console = options.console()
        table = Table("method", "temp.", "answers", "right", "score", "same answers as plain")
        for score in scores:
            share = score["right"] / score["answers"] if score["answers"] else 0.0
            cells = [str(score["answers"]), str(score["right"]), f"{share:.1%}", str(score["same_answers"])]
            table.add_row(*label(score), *cells)
        console.print(table)
        for score in scores:
            for line in score["unlike"]:
                console.print(", temperature ".join(label(score)) + f", {line}", markup=False, soft_wrap=True)
    if any(row.error is not None or row.equal.startswith("different") for row in rows):
        raise typer.Exit(1)
