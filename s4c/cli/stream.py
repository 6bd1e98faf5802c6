"""Text as it is written: plain in a pipe, on a terminal coloured by where each token came from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import groupby

from rich.console import Console

from s4c.engine.llm import LLM, Chunk
from s4c.engine.sequence import Decode, Detokenizer, Generation
from s4c.engine.stats import Stats

LEVELS = ("green", "cyan", "blue", "magenta", "yellow", "red")
"""Colours of tokens that the drafter guessed, by level of the tree; deeper levels share the last one."""


class Painter:
    """Tells for every character of a streamed text which level of the draft tree its token came from.

    Text comes later than tokens: a torn character waits for its other half, the beginning of a stop string
    for its end. So the characters of the tokens queue here until a chunk releases them.
    """

    def __init__(self, decode: Decode) -> None:
        self._detokenizer = Detokenizer(decode)
        self._text = ""
        self._origins: list[int] = []

    def paint(self, chunk: Chunk) -> list[tuple[str, int]]:
        """Pieces of text with their origins; joined they are the chunk's text, whatever the tokenizer does."""
        for token, origin in zip(chunk.token_ids, chunk.origins, strict=True):
            piece = self._detokenizer.add(token)
            self._text += piece
            self._origins += [origin] * len(piece)
        size = len(chunk.text)
        last = chunk.origins[-1] if chunk.origins else 0
        origins = self._origins[:size] if chunk.text.startswith(self._text[:size]) else []
        origins += [last] * (size - len(origins))
        self._text, self._origins = self._text[size:], self._origins[size:]
        runs = groupby(zip(chunk.text, origins, strict=True), key=lambda pair: pair[1])
        return [("".join(letter for letter, _ in run), origin) for origin, run in runs]


def show(
    llm: LLM, chunks: Iterator[Chunk], stopped: Callable[[], bool] = lambda: False
) -> tuple[str, Generation | None]:
    """Write chunks to stdout as they come.

    Args:
        llm: whose chunks they are.
        chunks: of `LLM.stream`.
        stopped: asked after each chunk whether to stop there.

    Returns:
        The text, and the outcome; None for the outcome when it was stopped.
    """
    console = Console(highlight=False)
    painter = Painter(llm.decode) if console.is_terminal else None
    text = ""
    for chunk in chunks:
        text += chunk.text
        if painter is None:
            sys.stdout.write(chunk.text)
        else:
            for piece, origin in painter.paint(chunk):
                console.out(printable(piece), style=style(origin), end="")
        sys.stdout.flush()
        if chunk.generation is not None or stopped():
            return text, chunk.generation
    raise AssertionError("the last chunk of a stream has no outcome")


def printable(text: str) -> str:
    """Text whose escape characters a terminal shows and does not obey."""
    return text.replace("\x1b", "\u241b")


def style(origin: int) -> str:
    """The colour of a token from level `origin` of the tree; 0 is the target's own."""
    return LEVELS[min(origin, len(LEVELS)) - 1] if origin else "default"


def summarise(generation: Generation) -> None:
    """One line on stderr: figures, and on a terminal the legend of the colours."""
    console = Console(stderr=True, highlight=False)
    legend = ""
    if console.is_terminal and sys.stdout.isatty():
        levels = range(1, max(generation.origins, default=0) + 1)
        marks = [f"[{style(level)}]\u25a0[/] level {level}" for level in levels]
        legend = "  \u25a0 target" + "".join(f" {mark}" for mark in marks)
    console.print(f"[dim]{figures(generation.stats)}, end: {generation.finish_reason}[/]{legend}", soft_wrap=True)


def figures(stats: Stats) -> str:
    """The figures of a generation in a few words."""
    return (
        f"{stats.new_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"{stats.mean_acceptance_length:.2f} tokens a pass"
        + (f", rule {stats.rule}" if stats.rule != "coupled" else "")
    )
