"""`s4c chat`: a conversation. The answers go back through the chat template, as the model wrote them."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from s4c.cli import options
from s4c.cli.generate import messages

if TYPE_CHECKING:
    from s4c.engine.llm import LLM
    from s4c.engine.sequence import Generation
    from s4c.types import SamplingParams

HELP = "/reset starts a new conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


@options.asking_how
def chat(
    target: options.Target = options.DEFAULT_TARGET,
    drafter: options.Drafter = "auto",
    tree: options.Tree = "auto",
    rule: options.Rule = "coupled",
    *,
    how: options.How,
    max_new_tokens: options.MaxNewTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    stop: options.Stop = None,
    seed: options.Seed = 0,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
) -> None:
    """Talk with the target, turn by turn. Ctrl-C stops an answer, not the program."""
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
    if not getattr(llm.tokenizer, "chat_template", None):
        raise ValueError(f"{target} has no chat template; use `s4c generate --raw`")
    conversation = Conversation(llm, params, system)
    _tell(HELP)
    for line in _lines():
        if line in ("/exit", "/quit"):
            return
        conversation.take(line)


@dataclass
class Conversation:
    """A chat and its history."""

    llm: LLM
    params: SamplingParams
    system: str | None
    history: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.history = messages(self.system)

    def take(self, line: str) -> None:
        """Act on a line: a command, or words to answer."""
        if line == "/reset":
            self.reset()
            _tell("a new conversation")
        elif line.startswith("/") and len(line.split()) == 1:
            _tell(HELP if line == "/help" else f"{line} is no command; {HELP}")
        elif line:
            self._answer(line)

    def _answer(self, words: str) -> None:
        """Answer and remember both; a question that could not be taken is not remembered."""
        from s4c.cli.stream import show

        asked = [*self.history, {"role": "user", "content": words}]
        try:
            with stop_on_interrupt() as stop:
                text, generation = show(self.llm, self.llm.stream(asked, self.params), stop.is_set)
        except ValueError as error:
            _tell(f"{error}. The question was not taken; /reset starts a new conversation")
            return
        typer.echo()
        self.history = [*asked, {"role": "assistant", "content": text}]
        _tell(self._ending(generation))

    def _ending(self, generation: Generation | None) -> str:
        from s4c.cli.stream import figures

        if generation is None:
            return "stopped; what was written stays in the conversation"
        note = figures(generation.stats)
        if generation.finish_reason == "length":
            full = generation.prompt_tokens + len(generation.token_ids) >= self.llm.target.spec.context_length
            note += "; the context is full, /reset starts a new conversation" if full else "; cut at --max-new-tokens"
        return note


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Event]:
    """An event that Ctrl-C sets, so that an answer ends between two rounds; a second Ctrl-C ends the program."""
    stop = Event()
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What the user types, until the end of the input."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and editing)
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo(err=True)
            _tell("/exit or Ctrl-D leaves")


def _tell(message: str) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(f"s4c: {message}", style="dim", markup=False, soft_wrap=True)
