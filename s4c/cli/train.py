"""`s4c train`: a drafter learns from text that the target wrote.

s4c train --data text.jsonl --out run --max-seconds 3600 --set heads=3
s4c generate "Why is the sky blue?" --drafter run/best --compare
"""

from __future__ import annotations

import os
import shlex
import sys
import types
import typing
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4c.cli import options

if TYPE_CHECKING:
    from s4c.drafters.base import DraftModel, Method
    from s4c.models.base import Target
    from s4c.training.data import Row
    from s4c.training.trainer import Trainer, TrainResult

RUN, LOSS = "Run", "Loss and optimizer"


def _setting(default: str, help: str, panel: str = RUN) -> Any:
    """An option that is left to TrainConfig where it is not given; `default` is what stands there."""
    return typer.Option(help=help, show_default=default, rich_help_panel=panel)


@options.asking_how
def train(
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the run; the drafter will be in best.", show_default=False)],
    method: Annotated[str, typer.Option(help="What kind of drafter to train; see `s4c info`.")] = "s4c",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, KEY=VALUE; may be repeated. `s4c info` lists them."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Train a copy of the whole target along, which becomes a model of its own (sdsat can). It writes "
            "another text than the target does.",
        ),
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint to start from, of the same sizes (S4C: fewer layers a head, or more heads, do as well). A "
            "draft vocabulary of the same size is kept, one of another size is counted anew.",
            show_default="untrained heads",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved step in --out.")] = False,
    steps: Annotated[int | None, _setting("no limit", "Most optimizer steps.")] = None,
    epochs: Annotated[int | None, _setting("no limit", "Most visits of every row.")] = None,
    max_seconds: Annotated[float | None, _setting("no limit", "Most seconds, validation included.")] = None,
    batch_tokens: Annotated[int | None, _setting("4096", "Most tokens of a batch, padding included.")] = None,
    max_length: Annotated[int | None, _setting("512", "Rows are cut to so many tokens.")] = None,
    step_vocab: Annotated[
        int | None, _setting("0", "Tokens of the draft vocabulary that a step looks at; 0: all.")
    ] = None,
    autocast: Annotated[str | None, _setting("none", "Precision of the drafter: none, bfloat16.")] = None,
    features: Annotated[str | None, _setting("cache", "Target's features: cache (on disk) or fly (anew).")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of cached features, for runs to share.", show_default="OUT/features")
    ] = None,
    held_out: Annotated[float | None, _setting("0.03", "Share of the prompts kept for validation.")] = None,
    validation_rows: Annotated[int | None, _setting("64", "Most rows of a validation.")] = None,
    tree: Annotated[
        str | None, _setting("the method's", "Tree of the simulated drafting, and the drafter's own.")
    ] = None,
    eval_every: Annotated[int | None, _setting("200", "Steps between validations.")] = None,
    save_every: Annotated[int | None, _setting("200", "Steps between saved states.")] = None,
    log_every: Annotated[int | None, _setting("10", "Steps between lines of the log.")] = None,
    seed: Annotated[int | None, _setting("0", "Of the first weights and the order of the data.")] = None,
    learning_rate: Annotated[float | None, _setting("0.001", "At the peak (AdamW).", LOSS)] = None,
    warmup_steps: Annotated[int | None, _setting("50", "Steps of linear warm-up.", LOSS)] = None,
    final_rate: Annotated[float | None, _setting("0.05", "Where the cosine ends, of the peak.", LOSS)] = None,
    weight_decay: Annotated[float | None, _setting("0.01", "Of matrices.", LOSS)] = None,
    beta1: Annotated[float | None, _setting("0.9", "Of AdamW.", LOSS)] = None,
    beta2: Annotated[float | None, _setting("0.95", "Of AdamW.", LOSS)] = None,
    clip: Annotated[float | None, _setting("1.0", "Most norm of the gradient.", LOSS)] = None,
    echo_loss: Annotated[
        bool | None, _setting("False", "Teach the law that the drafter has with its echo.", LOSS)
    ] = None,
    lm_weight: Annotated[float | None, _setting("0.1", "Weight of the true token's loss.", LOSS)] = None,
    teacher_weight: Annotated[float | None, _setting("1.0", "Weight of the target's law.", LOSS)] = None,
    smooth_weight: Annotated[float | None, _setting("0.1", "Weight of the target's feature.", LOSS)] = None,
    acceptance_weight: Annotated[float | None, _setting("0.0", "Weight of the chance of acceptance.", LOSS)] = None,
    depth_weight: Annotated[float | None, _setting("1.0", "Of a head, over that of the one before.", LOSS)] = None,
    reach_weight: Annotated[
        float | None, _setting("0.0", "Power of the chance that rounds come to a position.", LOSS)
    ] = None,
    target: options.Target = options.DEFAULT_TARGET,
    *,
    how: options.How,
) -> None:
    """Train a drafter. A run that was stopped goes on with the same command and --resume."""
    given = {name: value for name, value in locals().items() if value is not None}
    options.start()
    import torch

    from s4c.drafters import METHODS
    from s4c.drafters.checkpoint import load_model
    from s4c.training.losses import LossWeights
    from s4c.training.trainer import TrainConfig, Trainer

    weights = {field.name: given[name] for field in fields(LossWeights) if (name := f"{field.name}_weight") in given}
    named = {field.name: given[field.name] for field in fields(TrainConfig) if field.name in given}
    config = TrainConfig(**named, weights=LossWeights(**weights))
    line = trained_method(method, full)
    method_config = parse_settings(line, settings or [])
    llm = options.load(target, "none", replace(how, device=own_gpu(how.device)))
    torch.set_num_threads(llm.threads)
    rows, held = _rows(data, llm.target, config)
    torch.manual_seed(config.seed)
    start = None if init is None else load_model(init, llm.target, METHODS)
    model = new_model(line, method_config, llm.target, rows, start)
    if start is not None:
        model.start_from(start)
    provenance = {"command": _command(), "data files": ", ".join(path.name for path in data)}
    trainer = Trainer(
        llm.target, line.name, model, rows, held, config, out, resume=resume, cache=cache, provenance=provenance
    )
    _report(trainer, trainer.fit())


def trained_method(name: str, full: bool = False) -> Method:
    """The line of the table of drafters, or of those that are trained together with their target.

    Raises:
        ValueError: there is no such method, or nothing to train in it, or it leaves the target as it is.
    """
    from s4c.drafters import FULL, METHODS

    trained = {method.name: method for method in METHODS.values() if method.model is not None}
    if name not in trained:
        raise ValueError(f"method {name!r} is not known or needs no training; it must be one of {', '.join(trained)}")
    if full and name not in FULL:
        raise ValueError(f"method {name!r} leaves the target as it is; --full must go with one of {', '.join(FULL)}")
    return FULL[name] if full else trained[name]


def parse_settings(method: Method, settings: list[str]) -> Any:
    """The configuration of a method from `key=value` pairs.

    Raises:
        ValueError: a key is not known, or a value is not of its type; the message lists what there is.
    """
    assert method.config is not None
    kinds = typing.get_type_hints(method.config)
    values = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or key not in kinds:
            known = ", ".join(f"{field.name}={field.default}" for field in fields(method.config))
            raise ValueError(f"--set {setting} is no setting of {method.name}; give KEY=VALUE, of: {known}")
        values[key] = _value(text, kinds[key], f"--set {setting}")
    return method.config(**values)


def _value(text: str, kind: Any, where: str) -> Any:
    """A text as a value of a type: int, float, bool, str, or one of these or None."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and text.lower() == "none":
        return None
    switches = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    (one,) = (k for k in kinds if k is not type(None))
    try:
        return switches[text.lower()] if one is bool else one(text)
    except (KeyError, ValueError):
        allowed = "true or false" if one is bool else {int: "a whole number", float: "a number"}[one]
        raise ValueError(f"{where}: {text!r} must be {allowed}") from None


def _rows(data: list[Path], target: Target, config: Any) -> tuple[list[Row], list[Row]]:
    """Rows to learn from, and rows to validate on."""
    from s4c.training.data import read_rows, split, truncate

    with options.spinner("reading the data"):
        rows = read_rows(data, target.spec.vocab_size)
        return split(truncate(rows, min(config.max_length, target.spec.context_length)), config.held_out)


def new_model(
    method: Method, config: Any, target: Target, rows: list[Row], start: DraftModel | None = None
) -> DraftModel:
    """A draft model before training; its vocabulary is `config.draft_vocab` tokens, all where that is 0.

    They are those of the model that it will start from where that has as many, else the most frequent ones of the rows.
    """
    import torch

    from s4c.training.data import frequent_tokens

    assert method.model is not None
    spec = target.spec
    size = min(getattr(config, "draft_vocab", 0) or spec.vocab_size, spec.vocab_size)
    if size == spec.vocab_size:
        return method.model(target, config, torch.arange(size))
    if start is not None and len(start.token_ids) == size:
        return method.model(target, config, start.token_ids)
    return method.model(target, config, frequent_tokens(rows, size, spec.vocab_size, spec.eos_token_ids))


def own_gpu(device: str) -> str:
    """The GPU of this process among those of `accelerate launch`."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device in ("auto", "cuda") and rank is not None and torch.cuda.is_available() else device


def _command() -> str:
    return shlex.join(["s4c", *sys.argv[1:]])


def _report(trainer: Trainer, result: TrainResult) -> None:
    """Say on stderr where the drafter is, what became of the target, and how a stopped run goes on."""
    from s4c.training.log import change_of_perplexity

    if not trainer.main:
        return
    standing = result.standing
    if result.interrupted:
        again = _command() if trainer.resume else f"{_command()} --resume"
        typer.echo(f"s4c: stopped; step {standing.step} is saved in {trainer.out}. Go on with: {again}", err=True)
        raise typer.Exit(130)
    quality = f" (MAL {standing.best_mal:.3f} at step {standing.best_step})" if standing.best_mal else ""
    if result.tuned is None:
        typer.echo(f"s4c: the drafter is in {result.best}{quality}; use it with --drafter {result.best}", err=True)
        return
    held = "its perplexity was not measured, as no row was held out"
    if standing.best_perplexity:
        held = change_of_perplexity(standing.base_perplexity, standing.best_perplexity)
    typer.echo(
        f"s4c: the drafter is in {result.best}{quality} and the model that it drafts for in {result.tuned}; use them "
        f"with --target {result.tuned} --drafter {result.best}\ns4c: {held}",
        err=True,
    )
