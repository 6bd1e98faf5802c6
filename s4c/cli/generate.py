"""`s4c generate`: one answer.

s4c generate "Why is the sky blue?" --compare
echo "Once upon a time" | s4c generate --raw --temperature 0.8 --json
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4c.cli import options

if TYPE_CHECKING:
    from s4c.engine.llm import LLM


@options.asking_how
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin.", show_default="stdin")
    ] = None,
    target: options.Target = options.DEFAULT_TARGET,
    drafter: options.Drafter = "auto",
    tree: options.Tree = "auto",
    rule: options.Rule = "coupled",
    *,
    how: options.How,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put the prompt through the chat template, or take it as it is.",
            show_default="chat where the target has a template",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message of the chat.", show_default=False)] = None,
    stream: Annotated[bool, typer.Option(help="Write while generating.")] = True,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also decode plainly, and compare speed and tokens.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt. On a terminal the colours show which tokens the drafter guessed."""
    text = _read(prompt)
    options.start()
    from s4c.types import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or (),
        seed=seed,
    )
    llm = options.load(target, drafter, how, tree=tree, rule=rule)
    request = _request(llm, text, system, chat)
    if compare:
        _compare(llm, tree, request, params, stream, as_json)
    elif as_json:
        typer.echo(json.dumps(outcome(llm.generate(request, params))))
    else:
        _write(llm, request, params, stream)


def outcome(generation: Any) -> dict[str, Any]:
    """What `--json` prints of a `Generation`."""
    return {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "stats": generation.stats.as_dict(),
    }


def _read(prompt: str | None) -> str:
    """The prompt, from stdin where none is given."""
    if prompt is None or prompt == "-":
        stdin = typer.get_binary_stream("stdin")
        if stdin.isatty():
            typer.echo("s4c: type the prompt; Ctrl-D ends it", err=True)
        try:
            prompt = stdin.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt on stdin is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text as an argument or on stdin")
    return prompt


def _request(llm: LLM, text: str, system: str | None, chat: bool | None) -> Any:
    """The prompt as `LLM.generate` takes it: a text, or a chat."""
    if chat is None:
        chat = bool(getattr(llm.tokenizer, "chat_template", None))
    if chat:
        return [*messages(system), {"role": "user", "content": text}]
    if system is not None:
        raise ValueError("--system is for chats; leave it out, or give --chat with a target that has a chat template")
    return text


def messages(system: str | None) -> list[dict[str, str]]:
    """The beginning of a chat."""
    return [] if system is None else [{"role": "system", "content": system}]


def _write(llm: LLM, request: Any, params: Any, stream: bool) -> Any:
    """Write the answer to stdout and its figures to stderr."""
    from s4c.cli.stream import show, summarise

    if stream:
        _, generation = show(llm, llm.stream(request, params))
        assert generation is not None
        typer.echo()
    else:
        with options.spinner("generating"):
            generation = llm.generate(request, params)
        typer.echo(generation.text)
    summarise(generation)
    return generation


def _compare(llm: LLM, tree: str, request: Any, params: Any, stream: bool, as_json: bool) -> None:
    """Decode plainly and with the drafter, in turn on the same target; ends with code 1 when the tokens differ."""
    from s4c.cli.compare import Comparison, warm_up

    drafter = llm.drafter
    with options.spinner("plain decoding, for comparison"):
        warm_up(llm, drafter, tree, request, params)
        llm.use("none")
        plain = llm.generate(request, params)
    llm.use(drafter, tree)
    drafted = llm.generate(request, params) if as_json else _write(llm, request, params, stream)
    comparison = Comparison.of(llm, plain, drafted, params)
    if as_json:
        typer.echo(json.dumps({**outcome(drafted), "compare": comparison.as_dict()}))
    else:
        comparison.report()
    if comparison.failed:
        raise typer.Exit(1)
