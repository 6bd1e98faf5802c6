"""`s4c bench`: methods and peers side by side on the same questions, in one run.

s4c bench --methods auto,ngram --peers hf,llama.cpp --out runs/first
s4c bench compare runs/first runs/second
s4c bench quality --methods auto
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Shown

from s4c.cli import options
from s4c.cli.bench_compare import compare
from s4c.cli.bench_quality import quality

if TYPE_CHECKING:
    from s4c.bench.contestants import Contestant
    from s4c.bench.questions import Question
    from s4c.bench.run import Bench
    from s4c.bench.store import Store
    from s4c.engine.llm import LLM

BATCH = 8
"""Sequences at once with --equality-only, where --batch names no number."""

Questions = Annotated[
    Path | None,
    typer.Option(
        help="JSONL of questions (Spec-Bench's form), prompts or chats.", show_default="a set that comes with s4c"
    ),
]
Categories = Annotated[str | None, typer.Option(help="Only these, with commas between.", show_default="all")]
Sample = Annotated[
    int | None, typer.Option(help="Questions to draw, by the seed, evenly over the categories.", show_default="all")
]
Limit = Annotated[int | None, typer.Option(help="Take no more than the first N of them.", show_default="all")]
Methods = Annotated[
    str,
    typer.Option(
        help="Drafters with commas between (auto,ngram), each perhaps with options behind @: auto@comb:4, "
        "ngram@temperature=1, shipped@best:24@rule=rejection. A drafter keeps a comma of its own: "
        "draft-model=M,stop=0.2 is one. Plain decoding always runs."
    ),
]

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)
app.command("compare")(compare)
app.command("quality")(quality)


@app.callback()
@options.asking_how
def bench(
    context: typer.Context,
    questions: Questions = None,
    categories: Categories = None,
    sample: Sample = None,
    limit: Limit = None,
    turns: Annotated[int, typer.Option(help="Most turns of a question; the answers stand between them.")] = 1,
    methods: Methods = "auto,ngram",
    peers: Annotated[
        str,
        typer.Option(
            help="Other programs, with commas between: hf (transformers), hf-lookup, hf-assisted=MODEL, llama.cpp "
            "(the same weights), llama.cpp=q4_0 (quantised), llama.cpp=FILE.gguf, llama.cpp=original, openai=URL."
        ),
    ] = "",
    temperatures: Annotated[
        str,
        typer.Option("--temperatures", "--temperature", help="One or several, with commas between."),
    ] = "0",
    repeats: Annotated[int, typer.Option(help="How often everything is asked.")] = 1,
    by_round: Annotated[
        bool,
        typer.Option(
            "--by-round",
            help="Methods take turns round by round, not answer by answer: that tells differences of a percent. The "
            "memory of each is not told.",
        ),
    ] = False,
    equality_only: Annotated[
        bool, typer.Option("--equality-only", help="Decode in batches and check equality alone; nothing is timed.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option(help="Batch of --equality-only; more than 1 implies it.", show_default=str(BATCH))
    ] = None,
    singly: Annotated[
        bool, typer.Option("--singly", help="With --equality-only: plain decoding of each prompt by itself, too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl, summary.json and the reports.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove the run in the folder.")] = False,
    max_new_tokens: options.MaxNewTokens = 128,
    top_p: options.TopP = 1.0,
    seed: options.Seed = 0,
    target: options.Target = options.DEFAULT_TARGET,
    rule: options.Rule = "coupled",
    *,
    how: options.How,
    as_json: options.Json = False,
) -> None:
    """Speed, acceptance and equality of methods and peers; code 1 where an answer is not that of plain decoding."""
    if context.invoked_subcommand is not None:
        return
    if batch is None:
        batch = BATCH if equality_only else 1
    timed = batch == 1 and not equality_only
    _check(turns, repeats, batch, timed, singly, by_round, peers)
    asked = chosen(questions, categories, sample, limit, seed)
    degrees = _numbers(temperatures)
    options.start()
    from s4c.bench.machine import Footprint, load_average, provenance
    from s4c.bench.peers import split
    from s4c.bench.run import Bench
    from s4c.bench.store import Store
    from s4c.types import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=degrees[0], top_p=top_p, seed=seed)
    for degree in degrees:
        SamplingParams(temperature=degree)
    for spec in _split(peers):
        split(spec)
    footprint = Footprint()
    with footprint.watch():
        llm = options.load(target, "none", how, rule=rule, max_batch=batch)
    contestants = build_methods(llm, methods, rule, footprint.held)
    settings = {
        "target": target,
        "fingerprint": llm.target.spec.fingerprint,
        "dtype": str(llm.target.dtype).removeprefix("torch."),
        "device": str(llm.target.device),
        "runtime": llm.target.runtime,
        "threads": llm.threads,
        "context_length": how.context_length,
        "methods": [contestant.name for contestant in contestants],
        "peers": _split(peers),
        "rule": rule,
        "temperatures": degrees,
        "questions": hashlib.sha256(json.dumps([asdict(q) for q in asked]).encode()).hexdigest()[:16],
        "turns": turns,
        "repeats": repeats,
        "max_new_tokens": max_new_tokens,
        "top_p": top_p,
        "seed": seed,
        "by_round": by_round,
        "timed": timed,
        "batch": batch,
        "singly": singly,
    }
    with Store(out, settings, provenance(), resume, force) as store:
        others, skipped = _peers(llm, _split(peers), store)
        try:
            runner = Bench(llm, [*contestants, *others], params, degrees, turns, repeats, seed, store.rows, by_round)
            runner.check(asked)
            run = Run(runner, store, asked, skipped, load_average(), singly)
            try:
                run.go(timed)
            finally:
                summary = run.report(_pass_costs(llm) if timed and run.complete else None)
        finally:
            for other in others:
                other.close()
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(summary, out)
    if summary["failed"]:
        raise typer.Exit(1)


def _check(turns: int, repeats: int, batch: int, timed: bool, singly: bool, by_round: bool, peers: str) -> None:
    for name, value in {"--turns": turns, "--repeats": repeats, "--batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if timed and singly:
        raise ValueError("--singly is for --equality-only; without it every prompt is decoded by itself anyway")
    if not timed and by_round:
        raise ValueError("--by-round is for timing; leave --equality-only and --batch out, or --by-round")
    if not timed and peers:
        raise ValueError("--peers are timed one by one; leave --equality-only and --batch out, or --peers")
    if not timed and repeats > 1:
        raise ValueError("--repeats is for timing; leave --equality-only and --batch out, or --repeats")


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str) -> list[float]:
    try:
        numbers = list(dict.fromkeys(float(part) for part in _split(text)))
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(f"--temperatures is {text!r}; give numbers with commas between, such as 0,0.6,1")
    return numbers


def chosen(
    file: Path | None, categories: str | None, sample: int | None, limit: int | None, seed: int
) -> list[Question]:
    """The questions that the options ask for.

    Raises:
        ValueError: the file is damaged, a category is not known, or a number is not positive.
    """
    from s4c.bench import questions

    for name, value in {"--sample": sample, "--limit": limit}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1, or left out for all questions")
    found = questions.read_questions(file or questions.SHIPPED)
    if categories is not None:
        found = questions.of_categories(found, _split(categories))
    if sample is not None:
        found = questions.sample(found, sample, seed)
    return found[:limit]


def build_methods(llm: LLM, methods: str, rule: str = "coupled", target_bytes: int = 0) -> list[Contestant]:
    """Plain decoding and the methods; all of them decode on the same target."""
    from s4c.bench.contestants import PLAIN, Method, canonical, split_methods

    names = dict.fromkeys(canonical(spec, rule) for spec in split_methods(methods))
    if not names:
        raise ValueError(f"--methods is {methods!r}; name at least one, or plain")
    plain = Method(llm, PLAIN, "coupled", target_bytes)
    return [plain, *(Method(llm, name, rule, target_bytes) for name in names if name != PLAIN)]


def _peers(llm: LLM, specs: Sequence[str], store: Store) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can run here, and why others cannot."""
    if not specs:
        return [], {}
    from s4c.bench.contestants import Unavailable
    from s4c.bench.peers.child import Child
    from s4c.bench.peers.setting import Setting
    from s4c.models.loading import resolve

    setting = Setting(
        directory=str(resolve(llm.target.spec.name)),
        name=llm.target.spec.name,
        fingerprint=llm.target.spec.fingerprint,
        dtype=store.settings["dtype"],
        device=store.settings["device"],
        threads=llm.threads,
        eos_token_ids=llm.target.spec.eos_token_ids,
        context_length=llm.target.spec.context_length,
    )
    peers: list[Contestant] = []
    skipped = {}
    try:
        for spec in specs:
            with options.spinner(f"starting {spec}"):
                try:
                    peers.append(Child(spec, setting))
                except Unavailable as error:
                    skipped[spec] = str(error)
    except BaseException:
        for peer in peers:
            peer.close()
        raise
    return peers, skipped


def _pass_costs(llm: LLM) -> dict[int, float]:
    from s4c.cli.info import pass_costs

    with options.spinner("measuring passes"):
        return pass_costs(llm.target)


class Run:
    """A run under way: rows go to the store as they come, and the reports tell of what is there.

    Args:
        runner: asks.
        store: keeps.
        questions: to ask.
        skipped: peers that cannot run, and why.
        load: averages before the run.
        singly: as the option.
    """

    def __init__(
        self,
        runner: Bench,
        store: Store,
        questions: Sequence[Question],
        skipped: dict[str, str],
        load: list[float],
        singly: bool,
    ) -> None:
        self.runner, self.store, self.questions = runner, store, questions
        self.skipped, self.load, self.singly = skipped, load, singly
        self.expected = runner.answers(questions, singly)
        self.complete = False

    def go(self, timed: bool) -> None:
        """Ask until all is answered."""
        rows = self.runner.run(self.questions) if timed else self.runner.run_batched(self.questions, self.singly)
        with progress() as bar:
            task = bar.add_task("answers", total=self.expected, completed=len(self.runner.done))
            for row in rows:
                self.store.add(row)
                bar.advance(task)
        self.complete = True

    def report(self, pass_ms: dict[int, float] | None) -> dict[str, Any]:
        """Write the reports; the summary."""
        from s4c.bench.machine import load_average
        from s4c.bench.page import page
        from s4c.bench.report import markdown
        from s4c.bench.store import PAGE, REPORT, SUMMARY
        from s4c.bench.summary import failed, summarise, work_of_others

        own = [contestant.name for contestant in self.runner.contestants if contestant.own]
        nodes = {contestant.name: contestant.nodes for contestant in self.runner.contestants}
        entries = summarise(self.store.rows, self.store.settings["timed"], nodes)
        summary = {
            "complete": self.complete,
            "failed": failed(entries, own),
            "answers": len(self.runner.done),
            "expected": self.expected,
            "questions": len(self.questions),
            "categories": sorted({question.category for question in self.questions}),
            "own": own,
            "entries": entries,
            "skipped": self.skipped,
            "others": work_of_others(self.store.rows),
            "load": {"before": self.load, "after": load_average()},
            "pass_ms": {str(tokens): cost for tokens, cost in (pass_ms or {}).items()},
            "settings": dict(self.store.settings),
            "parts": self.store.parts,
        }
        self.store.write(SUMMARY, json.dumps(summary, indent=1) + "\n")
        self.store.write(REPORT, markdown(summary))
        if self.store.folder is not None:
            self.store.write(PAGE, page(summary))
        return summary


def progress() -> Progress:
    """A bar with the time that is left, on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _print(summary: dict[str, Any], out: Path | None) -> None:
    from s4c.bench.report import differences, tables, warnings

    console = options.console()
    for table in tables(summary):
        shown = Shown(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for line in [*differences(summary), *warnings(summary)]:
        console.print(line, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"reports in {out}", markup=False, soft_wrap=True)
