"""`s4c distill`: training text that the target writes itself.

s4c distill --prompts prompts.jsonl --out text.jsonl
s4c distill --count 2000 --out text.jsonl          # the target writes the prompts too
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from s4c.cli import options

if TYPE_CHECKING:
    from s4c.engine.llm import LLM
    from s4c.training.distill import DistillConfig, DistillResult, Generate, TokenPrompt
    from s4c.types import SamplingParams


@options.asking_how
def distill(
    out: Annotated[
        Path, typer.Option(help="JSONL to write; rows that stand in it are not made again.", show_default=False)
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to answer: .jsonl with `prompt`, `messages` or `turns`, or any text with one a line.",
            show_default="the target writes its own",
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Rows to write (without --prompts), or most prompts to take.", show_default="all prompts"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.")] = 512,
    temperatures: Annotated[
        str, typer.Option(help="Of the answers, with commas; each as likely as it stands here often.")
    ] = "0,0.8,1.0",
    batch: Annotated[int, typer.Option(help="Answers to write at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Folder in which to keep what the target thought while it wrote: the --cache of `s4c train` with the "
            "same --dtype, which then need not compute it.",
            show_default="not kept",
        ),
    ] = None,
    target: options.Target = options.DEFAULT_TARGET,
    drafter: options.Drafter = "none",
    *,
    how: options.How,
) -> None:
    """Let the target write training text. A run that was stopped goes on when it is started again."""
    numbers = _temperatures(temperatures)
    if count is not None and count < 1:
        raise ValueError(f"--count is {count}; it must be at least 1")
    if prompts is None and count is None:
        raise ValueError("without --prompts the target writes its own: say with --count how many rows it is to write")
    if features is not None and drafter != "none":
        raise ValueError(f"--features is kept in plain decoding; leave --drafter {drafter} out")
    options.start()
    from s4c.training.data import read_prompts
    from s4c.training.distill import DistillConfig

    config = DistillConfig(max_new_tokens, max_prompt_tokens, numbers, seed)
    texts = None if prompts is None else read_prompts(prompts)[:count]
    llm = options.load(target, drafter, how, max_batch=batch)
    config = replace(config, max_prompt_tokens=min(max_prompt_tokens, llm.target.spec.context_length - 1))
    try:
        with nullcontext() if features is None else _recording(llm, features):
            if texts is None:
                assert count is not None
                result = _without_prompts(llm, count, out, config)
            else:
                with options.spinner("reading the prompts"):
                    tokens = [tokenise(llm, list(p.messages), p.source) for p in texts]
                result = _with_prompts(llm, tokens, out, config)
    except KeyboardInterrupt:
        typer.echo(f"s4c: stopped; the rows in {out} are whole, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    left_out = f", {result.too_long} prompts were too long" if result.too_long else ""
    typer.echo(
        f"s4c: {out} holds {result.rows} rows, {result.new_rows} of them new ({result.new_tokens} tokens){left_out}",
        err=True,
    )
    if result.failures and texts is not None:  # in place of prompts of its own that failed the target wrote others
        typer.echo(
            f"s4c: {len(result.failures)} requests failed and gave no row, such as: {result.failures[0]}. The same "
            "command asks again for rows that are missing",
            err=True,
        )
        raise typer.Exit(1)


@contextmanager
def _recording(llm: LLM, folder: Path) -> Iterator[None]:
    """Let the engine keep the target's features in a store; a failure costs the latest, which training adds."""
    from s4c.training.features import FeatureStore, Recording

    recording = Recording(FeatureStore(folder, llm.target))
    llm.use(recording)
    yield
    recording.close()


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--temperatures is {text!r}; it must be numbers with commas between, as 0,0.8,1.0") from None


def _with_prompts(llm: LLM, prompts: list[TokenPrompt], out: Path, config: DistillConfig) -> DistillResult:
    from s4c.training.distill import distill

    return distill(prompts, _generator(llm), out, config)


def _without_prompts(llm: LLM, count: int, out: Path, config: DistillConfig) -> DistillResult:
    from s4c.training.distill import ChatFrame, distill_self

    tokenizer = llm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{llm.target.spec.name} has no chat template to write prompts in; give --prompts")
    frame = ChatFrame.of(
        lambda chat: str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)),
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
    )
    return distill_self(frame, count, llm.target.spec.eos_token_ids, _generator(llm), out, config)


def tokenise(llm: LLM, chat: list[dict[str, str]], source: str) -> TokenPrompt:
    """A prompt as token ids: a chat, or for a target without a chat template the bare words of one turn."""
    from s4c.training.distill import TokenPrompt

    bare = len(chat) == 1 and not getattr(llm.tokenizer, "chat_template", None)
    return TokenPrompt(tuple(llm.token_ids(chat[0]["content"] if bare else chat)), source)


def _generator(llm: LLM) -> Generate:
    """The engine as distillation asks for it."""

    def generate(prompts: list[list[int]], params: list[SamplingParams]) -> Iterator[tuple[int, list[int] | str]]:
        for index, generation in llm.complete(prompts, params):
            yield index, generation.error or generation.token_ids

    return generate
