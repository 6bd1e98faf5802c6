"""`s4c bench`: methods side by side on the same questions, in one run.

s4c bench --questions spec_bench.jsonl --sample 80 --methods auto,ngram --transformers
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from s4c.cli import options

if TYPE_CHECKING:
    from s4c.bench.questions import Question
    from s4c.bench.run import Answer, Bench


def bench(
    questions: Annotated[
        Path, typer.Option(help="JSONL with question_id, category and turns, as Spec-Bench's.", show_default=False)
    ],
    sample: Annotated[int, typer.Option(help="Questions to ask, spread evenly over the categories.")] = 80,
    methods: Annotated[
        str,
        typer.Option(
            help="Drafters with commas between, each perhaps with a tree: auto,ngram,auto@comb:4. Plain "
            "decoding always runs."
        ),
    ] = "auto,ngram",
    transformers: Annotated[bool, typer.Option(help="Run transformers' own greedy generate too.")] = False,
    batch: Annotated[
        int, typer.Option(help="Decode in batches of so many and check equality alone; 1 asks one by one, timed.")
    ] = 1,
    singly: Annotated[
        bool, typer.Option("--singly", help="With --batch: also compare with plain decoding one by one.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="JSONL to append every answer to.", show_default=False)] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    target: options.Target = options.DEFAULT_TARGET,
    rule: options.Rule = "coupled",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    runtime: options.Runtime = "auto",
    as_json: options.Json = False,
) -> None:
    """Speed, acceptance and equality of several methods; code 1 where an answer is not that of plain decoding."""
    from s4c.bench.questions import read_questions
    from s4c.bench.questions import sample as choose
    from s4c.bench.run import Bench, summarise
    from s4c.types import SamplingParams
    from s4c.verify.typical import title

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if transformers and temperature > 0:
        raise ValueError("--transformers compares greedy decoding; it needs --temperature 0")
    if transformers and dtype == "int8":
        raise ValueError("--transformers runs no int8; give --dtype float32 or bfloat16")
    chosen = choose(read_questions(questions), sample, seed)
    llm = options.load(
        target, "none", rule=rule, dtype=dtype, device=device, threads=threads, runtime=runtime, max_batch=batch
    )
    peer = None
    if transformers:
        from s4c.bench.peers import transformers_generate
        from s4c.models.loading import resolve

        peer = transformers_generate(resolve(target), llm.target.dtype, llm.target.device, llm.threads)
    runner = Bench(llm, methods.split(","), params, peer)
    answers = _batched(runner, chosen, singly) if batch > 1 else _one_by_one(runner, chosen, seed, out)
    if out is not None and batch > 1:
        _append(out, answers)
    summary = [{"rule": title(rule), **row} for row in summarise(answers)]
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, timed=batch == 1)
    if rule == "coupled" and any(row["different"] for row in summary if row["method"] != "transformers"):
        raise typer.Exit(1)


def _one_by_one(runner: Bench, questions: list[Question], seed: int, out: Path | None) -> list[Answer]:
    answers: list[Answer] = []
    methods = len(runner.methods) + (runner.peer is not None)
    with _progress() as progress:
        task = progress.add_task("answers", total=len(questions) * methods)
        for answer in runner.run(questions, seed):
            answers.append(answer)
            if out is not None:
                _append(out, [answer])
            progress.advance(task)
    return answers


def _batched(runner: Bench, questions: list[Question], singly: bool) -> list[Answer]:
    """Every method's answers in batches, compared with those of plain decoding in batches."""
    methods = [m for m in runner.methods if m != "none"]
    with _progress() as progress:
        task = progress.add_task("answers", total=len(methods) + 1 + singly * len(questions))
        answers = runner.batch(questions, "none")
        plain = {answer.question: answer.token_ids for answer in answers}
        progress.advance(task)

        def compared(question: Question, answer: Answer) -> Answer:
            verdict = runner.compare(runner.prompt(question), plain[question.name], answer.token_ids, answer.method)
            return replace(answer, equal=verdict)

        for method in methods:
            answers += [compared(q, a) for q, a in zip(questions, runner.batch(questions, method), strict=True)]
            progress.advance(task)
        for question in questions if singly else ():
            alone = replace(runner.batch([question], "none")[0], method="none, one by one")
            answers.append(compared(question, alone))
            progress.advance(task)
    return answers


def _append(out: Path, answers: list[Answer]) -> None:
    from s4c.bench.run import write_jsonl

    write_jsonl(out, answers)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _print(summary: list[dict[str, Any]], timed: bool) -> None:
    console = Console(width=160, highlight=False)
    console.print(f"rule: {summary[0]['rule']}")
    table = Table("method", "answers", "equal to plain", "tokens a pass")
    for name in ("tokens/s", "with prefill", "speedup") if timed else ():
        table.add_column(name, justify="right")
    for row in summary:
        equal = f"{row['identical']} + {len(row['ties'])} ties" if row["ties"] else str(row["identical"])
        speed = [f"{row[name]:.2f}" for name in ("tokens_per_second", "tokens_per_second_with_prefill", "speedup")]
        table.add_row(
            row["method"],
            str(row["questions"]),
            equal,
            f"{row['mean_acceptance_length']:.2f}",
            *(speed if timed else []),
        )
    console.print(table)
    if timed:
        categories = list(summary[0]["speedup_by_category"])
        table = Table("speedup", *categories)
        for row in (row for row in summary if row["method"] != "none"):
            table.add_row(row["method"], *(f"{row['speedup_by_category'][c]:.2f}" for c in categories))
        console.print(table)
    for row in summary:
        for line in row["ties"] + row["different"]:
            console.print(f"{row['method']}, question {line}")
