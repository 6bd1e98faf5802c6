"""`s4c eval`: how good a drafter is.

    s4c eval --drafter run/best --data text.jsonl

Three looks at it: how often each head has the target's token among its first k, the mean acceptance length
(MAL) simulated over recorded answers at temperature 0, and the MAL of the engine on the same prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4c.cli import options
from s4c.cli.distill import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from s4c.engine.llm import LLM
    from s4c.training.data import Row

BATCH_TOKENS = 2048
TEMPERATURES = (0.0, 1.0)


@options.asking_how
def evaluate(
    data: options.Data,
    drafter: options.Drafter = "auto",
    target: options.Target = options.DEFAULT_TARGET,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts for the engine, as for `s4c distill`.", show_default="those of the data"),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the prompts that training held out; 1 takes all of them.")
    ] = 0.03,
    rows: Annotated[int, typer.Option(help="Most rows, and most prompts.")] = 64,
    max_length: Annotated[int, typer.Option(help="Rows are cut to so many tokens.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens that the engine writes for a prompt.")] = 128,
    batch: Annotated[int, typer.Option(help="Prompts that the engine answers at once.")] = 8,
    seed: options.Seed = 0,
    tree: options.RecommendedTree = "auto",
    rule: options.Rule = "coupled",
    *,
    how: options.How,
    as_json: options.Json = False,
) -> None:
    """Measure a drafter on text that it was not trained on, with the tree that it recommends unless one is named."""
    from s4c.verify.typical import title

    llm = options.load(target, drafter, how, tree=tree, rule=rule, max_batch=batch)
    chosen = _held_out(llm, data, held_out, rows, max_length)
    asked = [list(row.prompt_ids) for row in chosen] if prompts is None else _prompts(llm, prompts, rows)
    folder = _folder(llm, drafter)
    if tree == "auto":  # the drafter's own, so that its figures do not depend on this machine
        llm.use(llm.drafter, llm.drafter.default_tree)
    report: dict[str, Any] = {"drafter": drafter, "tree": llm.tree, "rule": title(rule)}
    report["rows"] = len(chosen)
    with options.spinner("features of the target"):
        features = _features(llm, chosen, llm.drafter.taps)
    with options.spinner("heads"):
        report["heads"] = None if folder is None else _heads(llm, folder, chosen, features)
    with options.spinner("simulated drafting"):
        report["simulated"] = _simulated(llm, chosen, features)
    report["engine"] = {}
    for temperature in TEMPERATURES:
        with options.spinner(f"the engine at temperature {temperature:g}"):
            report["engine"][f"{temperature:g}"] = _engine(llm, asked, temperature, max_new_tokens, seed)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _print(report)


def _held_out(llm: LLM, data: list[Path], share: float, most: int, max_length: int) -> list[Row]:
    from s4c.training.data import read_rows, split, truncate

    if not 0 < share <= 1:
        raise ValueError(f"--held-out is {share}; it must be a share above 0 and at most 1 (all rows)")
    if most < 1:
        raise ValueError(f"--rows is {most}; it must be at least 1")
    spec = llm.target.spec
    room = min(max_length, spec.context_length)
    with options.spinner("reading the data"):
        every = truncate(read_rows(data, spec.vocab_size), room)
    if not every:
        raise ValueError(f"every row has a prompt of {room} tokens or more; raise --max-length, or --context-length")
    _, held = split(every, share)
    if not held:
        raise ValueError(f"none of the {len(every)} rows is held out at a share of {share}; raise --held-out, 1 is all")
    return held[:most]


def _prompts(llm: LLM, path: Path, most: int) -> list[list[int]]:
    from s4c.training.data import read_prompts

    return [list(tokenise(llm, list(p.messages), p.source).token_ids) for p in read_prompts(path)[:most]]


def _folder(llm: LLM, drafter: str) -> Path | None:
    """The checkpoint of the drafter, or of the first of two that has one; None where nothing was trained."""
    from s4c.drafters.checkpoint import standing
    from s4c.engine.llm import shipped_for

    for name in (drafter, *drafter.split("+")):
        folder = shipped_for(llm.target) if name in ("auto", "shipped") else standing(Path(name))
        if folder is not None and folder.is_dir():
            return folder
    return None


def _features(llm: LLM, rows: list[Row], taps: tuple[int, ...]) -> list[Tensor]:
    from s4c.training.features import ComputedFeatures

    source = ComputedFeatures(llm.target, rows, taps)
    return [source(row).clone() for row in range(len(rows))]


def _heads(llm: LLM, folder: Path, rows: list[Row], features: list[Tensor]) -> dict[str, Any]:
    """Acceptance of each head, teacher-forced: [heads][k] shares."""
    from s4c.drafters import METHODS
    from s4c.drafters.checkpoint import load_model
    from s4c.training.data import batch_order, collate
    from s4c.training.simulate import HeadAcceptance

    device = llm.target.device
    model = load_model(folder, llm.target, METHODS).to(device)
    if model.taps != llm.drafter.taps:
        features = _features(llm, rows, model.taps)
    heads = HeadAcceptance()
    for batch in batch_order([len(row) for row in rows], BATCH_TOKENS, 0, 0):
        heads.add(model, collate([rows[r] for r in batch], [features[r] for r in batch], device))
    shares = {"conditional": heads.conditional, "unconditional": heads.unconditional}
    return {name: [[round(s, 4) for s in head] for head in table] for name, table in shares.items()}


def _simulated(llm: LLM, rows: list[Row], features: list[Tensor]) -> dict[str, Any] | None:
    """MAL over the recorded answers at temperature 0; None where there are none, or where passes decide on the tree."""
    from s4c.engine.planner import NAME
    from s4c.training.simulate import simulate
    from s4c.verify.tree import TreePlan

    greedy = [r for r, row in enumerate(rows) if row.temperature == 0]
    if not greedy or llm.tree == NAME:
        return None
    result = simulate(
        llm.drafter,
        [rows[r] for r in greedy],
        lambda r: features[greedy[r]],
        TreePlan.parse(llm.tree),
        llm.target.spec.vocab_size,
        device=llm.target.device,
        target=llm.target,
    )
    return {"mean_acceptance_length": result.mean_acceptance_length, "rounds": result.rounds, "rows": len(greedy)}


def _engine(llm: LLM, prompts: list[list[int]], temperature: float, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """MAL of the engine: all tokens over all passes.

    Raises:
        BadLogits: a prompt could not be answered.
    """
    from s4c.errors import BadLogits
    from s4c.types import SamplingParams

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    done = llm.generate(prompts, params)
    failed = [generation.error for generation in done if generation.error]
    if failed:
        raise BadLogits(f"{len(failed)} of {len(done)} prompts failed, such as: {failed[0]}")
    rounds, tokens = (sum(getattr(g.stats, name) for g in done) for name in ("rounds", "new_tokens"))
    return {"mean_acceptance_length": tokens / rounds, "rounds": rounds, "new_tokens": tokens, "prompts": len(done)}


def _print(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from s4c.engine.planner import NAME

    console = options.console()
    console.print(f"{report['drafter']} with {report['tree']} on {report['rows']} rows", markup=False, soft_wrap=True)
    if report["heads"] is None:
        console.print("nothing in it was trained, so there are no heads to look at")
    else:
        ranks = len(report["heads"]["conditional"][0])
        table = Table("acceptance", *(f"top {k + 1}" for k in range(ranks)), box=box.SIMPLE_HEAD)
        for name, kind in (("conditional", "given"), ("unconditional", "")):
            for head, shares in enumerate(report["heads"][name], 1):
                table.add_row(f"head {head} {kind}", *(f"{s:.3f}" for s in shares))
        console.print(table)
        console.print("given: where the heads before had the token first\n")
    missing = "not told with --tree plan" if report["tree"] == NAME else "no rows at temperature 0"
    table = Table("mean acceptance length", "MAL", "passes", box=box.SIMPLE_HEAD)
    lines = {"simulated, temperature 0": report["simulated"]}
    lines |= {f"engine, temperature {name}, rule {report['rule']}": value for name, value in report["engine"].items()}
    for name, value in lines.items():
        if value is None:
            table.add_row(name, missing, "")
        else:
            table.add_row(name, f"{value['mean_acceptance_length']:.3f}", str(value["rounds"]))
    console.print(table)
